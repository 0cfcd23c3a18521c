"""Numbers for people, and what a terminal and a file are shown."""

import importlib.util
import io
import subprocess
import sys

import pytest

from sora_jax.train import progress


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23e10, "12.3 G"),
        (999.7e9, "1 T"),
        (999.4e9, "999 G"),
        (-2e3, "-2 k"),
        (999.0, "999 "),
        (0.5, "0.5 "),
        (0, "0 "),
    ],
)
def test_three_digits_and_a_prefix(value, text):
    assert progress.si(value) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(stream, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.Reporter(tmp_path, 4, 0, "tokens", 100.0) as report:
        for step in (2, 4):
            report.train(step, {"loss": 0.5, "units_per_second": 2000.0, "flops_per_second": 3e9})
        report.evaluation(4, {"val_loss": 0.25})
    return stream.getvalue()


def test_a_file_gets_plain_lines(monkeypatch, tmp_path):
    lines = told(io.StringIO(), monkeypatch, tmp_path).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4", "step 4/4"]
    assert "loss 0.5000  2 ktokens/s  3 GFLOP/s" in lines[0] and lines[2] == "step 4/4  val_loss 0.25"
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_a_terminal_gets_a_bar_and_lines_of_evaluations(monkeypatch, tmp_path):
    shown = told(Terminal(), monkeypatch, tmp_path)
    assert "\r" in shown and "100%" in shown and "4/4" in shown and "loss 0.5000" in shown
    assert "step 4/4  val_loss 0.25\n" in shown and "step 2/4  loss" not in shown


def test_tensorboard_gets_its_records_without_torch():
    """Which takes seconds to import, and stays what it is for others."""
    code = """
import importlib.util, sys
from sora_jax.train import progress
assert progress.scalars(1, {"loss": 0.5}) and "torch" not in sys.modules
print(importlib.util.find_spec("torch") is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(importlib.util.find_spec("torch") is not None)
