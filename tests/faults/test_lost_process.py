"""One of several processes is killed: the others notice, and together they go on from where they were."""

import os
import re
import signal
import time

import pytest
from several import PROGRAM, children, launched, until

from sora_jax import processes


@pytest.mark.parametrize(("victim", "devices"), [(0, 4), (1, 4), (1, 1)])
def test_a_killed_process_is_noticed_and_resumed_from(tmp_path, figures, victim, devices):
    """Of several devices a collective whose peer is gone waits; of one it fails at once, before heartbeats say why."""
    with launched(tmp_path, PROGRAM, tmp_path, 100_000, devices=devices) as (process, log):
        # A folder is renamed to its number when all of a checkpoint is in it.
        until(lambda: any(path.name.isdigit() for path in tmp_path.glob("vae/*")), process, log)
        os.kill(children(process.pid)[victim], signal.SIGKILL)
        began = time.monotonic()
        process.wait(60)
        seconds = time.monotonic() - began
    told = log.read_text()
    assert seconds <= 15 + 2, told  # of starting and ending Python
    codes = [int(code) for code in re.search(r"exit codes (-?\d+), (-?\d+)", told).groups()]
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == processes.LOST, told
    assert "start all processes again" in told
    if victim == 1 and devices > 1:
        # Started again, on another number of processes, it goes on from the newest checkpoint.
        with launched(tmp_path, PROGRAM, tmp_path, 100_000, count=1, devices=8) as (process, log):
            until(lambda: "/100000  loss" in log.read_text(), process, log)
            assert "resumed from step" in log.read_text()
    figures(
        f"process {victim} of two with {devices} devices killed",
        other_exits_with=processes.LOST,
        seconds=round(seconds, 1),
    )
