"""What a run says while it runs: a bar on a terminal, plain lines elsewhere, metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from sora_jax import processes

# Host metrics that are counts add up between two log lines.
SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float) -> str:
    """'12.3 G' for 1.23e10."""
    for scale, prefix in SI:
        if abs(value) >= 0.9995 * scale:  # what three digits round up to it
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def clock(seconds: float) -> str:
    """'1:02:03' or '02:03'."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


class Window:
    """Metrics since the last log line. Device values are fetched when it closes, so that steps are not held up."""

    def __init__(self, flops_per_step: float, units_per_step: float) -> None:
        self.flops_per_step, self.units_per_step = flops_per_step, units_per_step
        self._device: list[dict[str, Any]] = []
        self._host: dict[str, float] = {}
        self._since = time.perf_counter()

    def add(self, device: dict[str, Any], host: dict[str, float]) -> None:
        self._device.append(device)
        for name, value in host.items():
            self._host[name] = self._host.get(name, 0.0) + value

    def close(self) -> dict[str, float]:
        """Means over finite steps, sums of host counts, speed; then the window starts anew."""
        steps = jax.device_get(self._device)
        good = [step for step in steps if not step["bad"]]
        line = {
            name: float(np.mean([step[name] for step in good])) for name in (good[0] if good else {}) if name != "bad"
        }
        seconds = time.perf_counter() - self._since
        self._host = processes.summed(self._host)
        line |= self._host | {
            "steps": float(len(steps)),
            "bad_steps": float(len(steps) - len(good)),
            "seconds_per_step": seconds / len(steps),
            "units_per_second": self.units_per_step * len(steps) / seconds,
            "flops_per_second": self.flops_per_step * len(steps) / seconds,
        }
        if self._host.get("packing/row_tokens"):
            line["packing/fill"] = self._host["packing/tokens"] / self._host["packing/row_tokens"]
        self._device, self._host, self._since = [], {}, time.perf_counter()
        return line


class Silent:
    """The reporter of every process but the first."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def train(self, step: int, line: dict[str, float]) -> None:
        pass

    def evaluation(self, step: int, line: dict[str, float]) -> None:
        pass


class Reporter:
    """Writes metrics.jsonl and TensorBoard events into workdir and keeps the terminal informed."""

    def __init__(self, workdir: Path, steps: int, start: int, unit: str, units_per_step: float) -> None:
        self.workdir, self.steps, self.start = workdir, steps, start
        self.unit, self.units_per_step = unit, units_per_step
        self.began = time.perf_counter()

    def __enter__(self) -> Reporter:
        import tensorboardX
        import tqdm

        self._lines = (self.workdir / "metrics.jsonl").open("a")
        self._board = tensorboardX.SummaryWriter(str(self.workdir / "tensorboard"), flush_secs=30)
        shown = sys.stderr.isatty()
        self._bar = tqdm.tqdm(total=self.steps, initial=self.start, unit="step", disable=not shown, dynamic_ncols=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        self._board.close()
        self._lines.close()

    def train(self, step: int, line: dict[str, float]) -> None:
        left = (self.steps - step) * (time.perf_counter() - self.began) / max(1, step - self.start)
        speed = f"{si(line['units_per_second'])}{self.unit}/s"
        words = f"loss {line.get('loss', math.nan):.4f}  {speed}  {si(line['flops_per_second'])}FLOP/s"
        if self._bar.disable:
            print(f"step {step}/{self.steps}  {words}  left {clock(left)}", file=sys.stderr, flush=True)
        else:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(words)
        self._write("train", step, line)

    def evaluation(self, step: int, line: dict[str, float]) -> None:
        # The losses of parts and the counts behind attributes are for metrics.jsonl.
        shown = [name for name in line if name != "total_flops" and not name.startswith("val_loss_")]
        words = "  ".join(f"{name} {line[name]:.4g}" for name in shown if not name.endswith("_count"))
        self._bar.clear()
        print(f"step {step}/{self.steps}  {words}", file=sys.stderr, flush=True)
        self._bar.refresh()
        self._write("eval", step, line)

    def _write(self, kind: str, step: int, line: dict[str, float]) -> None:
        self._lines.write(json.dumps({"kind": kind, "step": step} | line) + "\n")
        self._lines.flush()
        for name, value in line.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def reporter(workdir: Path, steps: int, start: int, unit: str, units_per_step: float) -> Reporter | Silent:
    """Of several processes the first reports."""
    return Reporter(workdir, steps, start, unit, units_per_step) if processes.is_first() else Silent()


def read_metrics(workdir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of metrics.jsonl; a step that was run again after a resume counts as last written."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({line["step"]: line for line in lines if line["kind"] == kind}.values())
