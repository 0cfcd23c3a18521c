"""What watches a run: the account of a real one, profiles of just the steps asked for, stacks that name what hangs."""

import ctypes
import gzip
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest
import tiny

from sora_jax import main
from sora_jax.train import loop, vae, watch

add_one = jax.jit(lambda x: x + 1)


def test_a_run_says_where_its_time_went(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    save, began = loop._save, time.perf_counter()

    def killed(task, workdir, state, *rest):
        if int(state.step) == 4:
            raise KeyboardInterrupt
        save(task, workdir, state, *rest)

    run = tiny.vae_run(log_every=1, save_every=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_save", killed)
        loop.fit(vae.VAETask(run), tmp_path)
    first = [line for line in tiny.lines(tmp_path) if line["kind"] == "train"]
    loop.fit(vae.VAETask(run), tmp_path)
    again = [line for line in tiny.lines(tmp_path) if line["kind"] == "train"][len(first) :]
    assert [line["step"] for line in first] == [1, 2, 3, 4] and [line["step"] for line in again] == [4]
    causes = [name for name in first[-1] if name.startswith("time/")]
    for line in (first[-1], again[-1]):
        total = sum(line[name] for name in causes)
        assert 0 < total < time.perf_counter() - began
        assert line["goodput"] == pytest.approx(line["time/step"] / total)
        assert line["memory/host"] > 1e7
    assert first[-1]["time/lost"] == 0 < first[-1]["time/step"] and first[-1]["time/save"] > 0
    # Step 4 was logged before it was lost.
    assert again[-1]["time/step"] == 0 < again[-1]["time/lost"] and again[-1]["goodput"] == 0
    # The first step is compiled, so it has no lap.
    assert "step_seconds/p50" not in first[0] and first[1]["step_seconds/p50"] == first[1]["step_seconds/max"] > 0
    assert caplog.text.count("goodput ") == 2


def quick(watching, numbers, x):
    for number in numbers:
        x = watching.step(number, add_one, x)
    return x


def profiled(folder):
    """Step numbers in each profile."""
    found = []
    for path in sorted(folder.rglob("*.trace.json.gz")):
        trace = json.loads(gzip.decompress(path.read_bytes()))
        marks = [each for each in trace["traceEvents"] if "step_num" in each.get("args", {})]
        found.append(sorted({int(each["args"]["step_num"]) for each in marks}))
    return found


def test_a_profile_holds_the_steps_asked_for(tmp_path, caplog):
    caplog.set_level("INFO")
    with watch.watched(tmp_path, watch.Options((3, 4), 0)) as watching:
        x = quick(watching, range(1, 7), jnp.zeros(8))
        assert profiled(tmp_path) == [[3, 4]] and "profile of steps 3 to 4" in caplog.text
        time.sleep(1.1)  # jax names profiles by the second
        os.kill(os.getpid(), signal.SIGUSR1)
        quick(watching, range(7, 20), x)
    assert profiled(tmp_path) == [[3, 4], [7, 8, 9, 10, 11]]


def test_a_profile_ends_with_its_run_and_cannot_end_it(tmp_path, caplog):
    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt), watch.watched(tmp_path, watch.Options((2, 9), 0)) as watching:
        quick(watching, range(1, 4), jnp.zeros(8))
        raise KeyboardInterrupt
    assert profiled(tmp_path) == [[2, 3]]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "profile").write_text("a file where the folder should be")
    with watch.watched(tmp_path / "b", watch.Options((2, 3), 0)) as watching:
        assert quick(watching, range(1, 6), jnp.zeros(())) == 5
    assert "no profile in" in caplog.text
    with watch.watched(tmp_path, watch.Options((2, 3), 0)) as watching:
        quick(watching, range(8, 10), jnp.zeros(8))
    assert "goes on from step 7" in caplog.text


def the_planted_hang(x):
    time.sleep(1.3)
    return x


def test_a_hang_is_named_and_the_run_goes_on(tmp_path, caplog):
    with watch.watched(tmp_path, watch.Options(None, 0.5)) as watching:
        for number in range(1, 5):  # together longer than any may take alone
            watching.step(number, lambda: time.sleep(0.2))
        with watching.of("save"):
            time.sleep(0.4)
        with watching.of("evaluate"):
            time.sleep(0.4)
        assert not (tmp_path / "stacks.txt").read_text()
        assert watching.step(5, the_planted_hang, 7) == 7
    stacks = (tmp_path / "stacks.txt").read_text()
    # Again and again, until it goes on.
    assert stacks.count("the_planted_hang") == 2 and "Timeout" in stacks
    assert "nothing has finished for 0.5 s, after step 4" in caplog.text and "the_planted_hang" in caplog.text


def test_a_stuck_interpreter_is_named_too(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "GRACE", 0.2)
    with watch.watched(tmp_path, watch.Options(None, 0.3)) as watching:
        watching.step(1, lambda: ctypes.PyDLL(None).usleep(800_000))  # no other thread has its turn meanwhile
        stacks = (tmp_path / "stacks.txt").read_text()
        # By faulthandler, as it says in its own words; a thread that had its turn afterwards says others.
        assert "Timeout (0:00:00.5" in stacks and "test_a_stuck_interpreter" in stacks


def test_stacks_end_with_their_run(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "GRACE", 0.1)
    dump = watch.faulthandler.dump_traceback
    monkeypatch.setattr(
        watch.faulthandler, "dump_traceback", lambda *given, **named: (time.sleep(0.5), dump(*given, **named))
    )
    with watch.watched(tmp_path, watch.Options(None, 0.2)):
        time.sleep(0.25)  # the run ends while its stacks are written
    with (tmp_path / "another").open("wb") as another:  # which has the number that the file of stacks had
        time.sleep(0.5)
        assert (tmp_path / "stacks.txt").exists() and not os.fstat(another.fileno()).st_size


def test_waiting_for_data_is_no_sign_of_life(tmp_path):
    with watch.watched(tmp_path, watch.Options(None, 0.5)) as watching:
        watching.step(1, lambda: None)
        for _ in range(4):
            with watching.of("data"):
                time.sleep(0.2)
    assert "Timeout" in (tmp_path / "stacks.txt").read_text()


def test_sigusr2_shows_stacks_and_nothing_is_left_without(tmp_path, caplog):
    before = signal.getsignal(signal.SIGUSR1)
    with watch.watched(tmp_path / "..", watch.Options(None, 0)):
        pass
    assert not (tmp_path / ".." / "stacks.txt").exists() and signal.getsignal(signal.SIGUSR1) == before
    with watch.watched(tmp_path, watch.USUAL):
        os.kill(os.getpid(), signal.SIGUSR2)
    assert "test_sigusr2_shows" in (tmp_path / "stacks.txt").read_text()
    assert "asked by SIGUSR2" in caplog.text and "test_sigusr2_shows" in caplog.text


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--profile=5", "'5' is not a first and a last step"),
        ("--profile=0:3", "counted from 1"),
        ("--profile=7:3", "holds no step"),
        ("--profile=5:9", "begins after the run's last step, 4"),
        ("--hang_seconds=-1", "not a number of seconds"),
        ("--hang_seconds=nan", "not a number of seconds"),
    ],
)
def test_what_cannot_be_watched_is_refused_in_a_sentence(flag, words, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main.run(["train", f"--config={tiny.__file__}:vae", f"--workdir={workdir}", flag]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not workdir.exists()
