"""A full disk and a kill in the middle of a write cost no run, and no line but the half one."""

import errno
import json
import logging
import os
import struct
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from sora_jax.train import appended, progress


def events(path):
    """The events of a TensorBoard file, every checksum held against its bytes."""
    content, found = path.read_bytes(), []
    while content:
        length = struct.unpack("<Q", content[:8])[0]
        body = content[12 : 12 + length]
        assert content[8:12] == struct.pack("<I", masked_crc32c(content[:8]))
        assert content[12 + length : 16 + length] == struct.pack("<I", masked_crc32c(body))
        found.append(event_pb2.Event.FromString(body))
        content = content[16 + length :]
    return found


class Disk:
    """os.write on a disk with room for so many bytes."""

    def __init__(self, monkeypatch):
        self.room, self.write = 10**9, os.write
        monkeypatch.setattr(appended.os, "write", self)

    def __call__(self, file, content):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.write(file, content[: self.room])
        self.room -= written
        return written


def test_a_full_disk_is_told_once_and_costs_no_line(tmp_path, monkeypatch, caplog):
    disk, path = Disk(monkeypatch), tmp_path / "metrics.jsonl"
    file = appended.Appended(path)
    file.write(b"one\n")
    disk.room = 2
    for line in (b"two\n", b"three\n", b"four\n"):
        file.write(line)
        assert path.read_bytes() == b"one\n"  # also when a part of the line had room
    assert file.failed == 3
    assert [r.levelno for r in caplog.records] == [logging.ERROR] and "No space left" in caplog.text
    disk.room = 10**9
    file.write(b"five\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\nfive\n"
    assert len(caplog.records) == 2 and "written again, after 3 writes" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_run_reports_on_where_nothing_can_be_written(tmp_path, caplog, capfd):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with progress.Reporter(tmp_path, 100, 0, "clips", 1.0) as report:
        # More than the ten that tensorboardX's own queue holds, after which its run hung.
        for step in range(1, 31):
            report.train(step, {"loss": 1.0, "units_per_second": 1.0, "flops_per_second": 1.0})
    assert capfd.readouterr().err.count("loss 1.0000") == 30
    assert caplog.text.count("the run goes on") == 2 and caplog.text.count("lacks its last 3") == 2


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_line_that_was_cut_short_hurts_no_other(tmp_path, cut, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text(lines[0] + lines[1][:-cut])
    file = appended.Appended(path, appended.mend(path))
    file.write(lines[2].encode())
    file.close()
    assert path.read_text() == "".join(lines if cut == 1 else [lines[0], lines[2]])
    assert ("half a line" in caplog.text) == (cut > 1)


def test_damaged_lines_are_passed_over_with_a_warning(tmp_path, caplog):
    good = [{"kind": "train", "step": 1, "loss": 3.0}, {"kind": "train", "step": 4, "loss": 2.0}]
    texts = [json.dumps(line).encode() for line in good]
    damaged = [b'{"kind": "train", "st', b"\x00\xff\x00", b"7", b'{"step": 9}', b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([texts[0], *damaged, texts[1]]))
    assert progress.read_metrics(tmp_path, "train") == good
    assert "5 damaged lines" in caplog.text
    assert progress.last_step(tmp_path) == 4 and progress.last_step(tmp_path / "none") == 0


def test_what_tensorboard_reads(tmp_path):
    with progress.Reporter(tmp_path, 4, 0, "clips", 1.0) as report:
        report.evaluation(2, {"psnr": 20.5, "attributes/all": 0.25})
    first, second = events(next((tmp_path / "tensorboard").iterdir()))
    assert first.file_version == "brain.Event:2" and second.step == 2
    assert {value.tag: value.simple_value for value in second.summary.value} == {
        "eval/psnr": 20.5,
        "eval/attributes/all": 0.25,
    }
    theirs = RecordWriter(str(tmp_path / "theirs"))
    theirs.write(second.SerializeToString())
    theirs.close()
    assert next((tmp_path / "tensorboard").iterdir()).read_bytes().endswith((tmp_path / "theirs").read_bytes())
