"""What a run says while it runs: a bar on a terminal, plain lines elsewhere, metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import socket
import struct
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from sora_jax import disk, processes
from sora_jax.train import appended

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

    def state(self) -> dict[str, Any]:
        """What it holds so far, of all processes, as JSON: a run that is resumed goes on with it (restored), so that its lines are
        those of one that was never stopped."""
        return {
            "steps": [
                # JSON has no NaN.
                {name: float(value) if np.isfinite(value) else None for name, value in step.items()}
                for step in jax.device_get(self._device)
            ],
            "host": processes.summed(self._host),
            "seconds": time.perf_counter() - self._since,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on with what another held. Raises LookupError, TypeError or ValueError if it is none."""
        steps = [
            {name: math.nan if value is None else float(value) for name, value in dict(step).items()}
            for step in state["steps"]
        ]
        if any({"bad", "spike", "skipped"} - set(step) or set(step) != set(steps[0]) for step in steps):
            raise ValueError("the metrics of its steps are not alike")
        # Counts are summed over the processes once more when the window closes.
        host = {str(name): float(value) for name, value in dict(state["host"]).items()} if processes.is_first() else {}
        self._device, self._host, self._since = steps, host, time.perf_counter() - float(state["seconds"])

    def close(self) -> dict[str, float]:
        """Means over the steps that counted, sums of host counts, speed; then the window starts anew."""
        steps = jax.device_get(self._device)
        good = [step for step in steps if not step["skipped"]]
        means = [name for name in steps[0] if name not in ("bad", "spike", "skipped")]
        # As float64, which a window that went through JSON has too.
        line = {name: float(np.mean([float(step[name]) for step in good])) for name in means} if good else {}
        seconds = time.perf_counter() - self._since
        self._host = processes.summed(self._host)
        line |= self._host | {
            "steps": float(len(steps)),
            "bad_steps": float(sum(step["bad"] for step in steps)),
            "spike_steps": float(sum(step["spike"] for step in steps)),
            # The most in any row of them, not the last: lines may be further apart than the most that a run bears.
            "skipped_in_a_row": float(max(step["skipped"] for step in steps)),
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
        import tqdm

        lines = self.workdir / "metrics.jsonl"
        self._lines = appended.Appended(lines, appended.mend(lines))
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._board = appended.Appended(self.workdir / "tensorboard" / name, _record(file_version="brain.Event:2"))
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
        self._lines.write((json.dumps({"kind": kind, "step": step} | line) + "\n").encode())
        self._board.write(scalars(step, {f"{kind}/{name}": value for name, value in line.items()}))


def scalars(step: int, values: dict[str, float]) -> bytes:
    """What TensorBoard reads: one record with all values of a step.

    tensorboardX's own writer is a thread: it ends when a write fails, and then the run waits for ever for its full queue.
    """
    board = _tensorboard()
    summary = board.summary_pb2.Summary()
    for name, value in values.items():
        summary.MergeFrom(board.scalar(name, value))
    return _record(step=step, summary=summary)


def _record(**fields: Any) -> bytes:
    """An event as a TFRecord: its length and its content, each with its checksum."""
    board = _tensorboard()
    content = board.event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(content))
    sums = [struct.pack("<I", board.masked_crc32c(part)) for part in (length, content)]
    return length + sums[0] + content + sums[1]


@functools.cache
def _tensorboard() -> types.SimpleNamespace:
    """What is needed of tensorboardX, which imports torch where there is one: for nothing, in two seconds and 190 MB. A reporter
    calls this before there are other threads, which could not import torch meanwhile."""
    hidden = {"torch": None} if "torch" not in sys.modules else {}
    sys.modules.update(hidden)  # type: ignore[arg-type]
    try:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
    return types.SimpleNamespace(
        event_pb2=event_pb2, summary_pb2=summary_pb2, masked_crc32c=masked_crc32c, scalar=scalar
    )


def reporter(workdir: Path, steps: int, start: int, unit: str, units_per_step: float) -> Reporter | Silent:
    """Of several processes the first reports."""
    return Reporter(workdir, steps, start, unit, units_per_step) if processes.is_first() else Silent()


def read_metrics(workdir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of metrics.jsonl; a step that was run again after a resume counts as last written."""
    return list({line["step"]: line for line in _lines(workdir) if line["kind"] == kind}.values())


def last_step(workdir: Path) -> int:
    """The furthest step that metrics.jsonl tells of; 0 if there is none."""
    return max((line["step"] for line in _lines(workdir)), default=0)


def _lines(workdir: Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl; damaged ones are told and passed over."""
    path = workdir / "metrics.jsonl"
    lines, damaged = [], 0
    if path.is_file():
        with path.open("rb") as file:
            while text := file.readline(appended.MAX_LINE_BYTES):
                try:
                    line = disk.parse_json(text, path)
                except disk.FileError:
                    line = None
                if _is_line(line):
                    lines.append(line)
                else:
                    damaged += 1
    if damaged:
        logging.warning("%s: %d damaged lines are passed over", path, damaged)
    return lines


def _is_line(line: Any) -> bool:
    """Whether the reporter can have written it: a kind, a step, and else numbers."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or type(line.get("step")) is not int:
        return False
    return line["step"] >= 0 and all(isinstance(value, int | float) for name, value in line.items() if name != "kind")
