"""A signal stops a run in order: the state is saved, what was being judged is judged on resuming, and nothing else changes."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny

from sora_jax import checkpoint, signals
from sora_jax.train import loop, vae


class Told(vae.VAETask):
    """A task that gets a signal when it makes its batch number `at`, or in the evaluation after step number `judging`."""

    def __init__(self, run, at=None, judging=None):
        super().__init__(run)
        self.at, self.judging, self.judged = at, judging, []

    def batches(self, share):
        source, task = super().batches(share), self

        class Counting:
            made = 0

            def __next__(self):
                self.made += 1
                if self.made == task.at:
                    os.kill(os.getpid(), signal.SIGTERM)
                return next(source)

            def __getattr__(self, name):
                return getattr(source, name)

        return Counting()

    def evaluate(self, state):
        if int(state.step) == self.judging:
            os.kill(os.getpid(), signal.SIGINT)
        self.judged.append(int(state.step))
        return super().evaluate(state)


def same(one, other):
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_a_second_signal_ends_a_process_that_is_deaf_to_the_first():
    """As one that compiles, or waits for others, outside of Python: there no handler runs."""
    code = """
import ctypes, os, signal, threading, time
from sora_jax import signals
sleep = ctypes.CDLL(None).sleep
def tell():
    for number in (signal.SIGTERM, signal.SIGTERM):
        time.sleep(0.3)
        os.kill(os.getpid(), number)
# Signals that come while the C library sleeps would wake it.
def deaf(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sleep(int(seconds))
with signals.handled(), signals.held(1):
    threading.Thread(target=tell, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)  # handled by other threads, so that this one goes on sleeping
    deaf(60)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 143 and time.monotonic() - began < 30, done.stderr
    assert "stopped at once" in done.stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return loop.fit(vae.VAETask(tiny.vae_run(save_every=0)), tmp_path_factory.mktemp("straight"))


def test_a_signal_lets_the_step_end_and_saves_it(straight, tmp_path):
    run = tiny.vae_run(save_every=0)
    with signals.handled(), pytest.raises(signals.Stopped, match="stopped by SIGTERM") as stopped:
        loop.fit(Told(run, at=2), tmp_path)
    assert stopped.value.code == 143 and checkpoint.latest_step(tmp_path) == 2
    assert same(loop.fit(vae.VAETask(run), tmp_path), straight)


def test_what_was_being_judged_is_judged_on_resuming(straight, tmp_path):
    run = tiny.vae_run(save_every=0, evaluate_every=2)
    task = Told(run, judging=2)
    with signals.handled(), pytest.raises(signals.Stopped, match="SIGINT") as stopped:
        loop.fit(task, tmp_path)
    assert stopped.value.code == 130 and checkpoint.latest_step(tmp_path) == 2 and task.judged == []
    again = Told(run)
    assert same(loop.fit(again, tmp_path), straight) and again.judged == [2, 4]
    assert [line["step"] for line in tiny.lines(tmp_path) if line["kind"] == "eval"] == [2, 4]


def test_the_last_judgement_is_cut_short_too_and_made_up_for_once(straight, tmp_path):
    run = tiny.vae_run(save_every=0)
    with signals.handled(), pytest.raises(signals.Stopped, match="SIGINT"):
        loop.fit(Told(run, judging=4), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 4 and not list(tmp_path.glob("samples/*"))
    for judged in ([4], []):
        again = Told(run)
        assert same(loop.fit(again, tmp_path), straight) and again.judged == judged
    assert [line["step"] for line in tiny.lines(tmp_path) if line["kind"] == "eval"] == [4]
    assert list(tmp_path.glob("samples/step_0000004.png"))


def test_before_the_first_step_a_signal_ends_at_once(tmp_path):
    run = tiny.vae_run(save_every=0)
    with signals.handled(), pytest.raises(signals.Stopped), signals.abandonable():
        os.kill(os.getpid(), signal.SIGTERM)
    with signals.handled(), pytest.raises(signals.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        loop.fit(vae.VAETask(run), tmp_path)
    assert checkpoint.latest_step(tmp_path) is None


def test_handlers_are_put_back_and_belong_to_the_main_thread():
    before = [signal.getsignal(number) for number in signals.NUMBERS]
    with signals.handled():
        assert [signal.getsignal(number) for number in signals.NUMBERS] != before
    assert [signal.getsignal(number) for number in signals.NUMBERS] == before
    found = []

    def elsewhere():
        with signals.handled():
            found.append([signal.getsignal(number) for number in signals.NUMBERS])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]
