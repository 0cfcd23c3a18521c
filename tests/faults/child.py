"""Training runs in processes of their own that are there at once: forked from one that has imported everything.

Nothing of jax has run in the one that forks, so that each run starts its own backend, as a fresh process would.
"""

import contextlib
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

import several

TESTS = Path(__file__).parent.parent
LOOP = {"steps": 100_000, "log_every": 1, "save_every": 1}  # no run comes to its end by itself


def run(stage, workdir, cache, overrides, devices):
    """`sora-jax train` of a stage of tests/tiny.py; what it says goes to log_path."""
    import jax
    import xla

    os.environ["XLA_FLAGS"] = xla.flags()
    # Not by the environment, which jax has read when it was imported.
    for name, value in {
        "jax_platforms": "cpu",
        "jax_num_cpu_devices": devices,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
    log = os.open(log_path(cache, workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from sora_jax import main

    logging.getLogger().handlers.clear()  # what imports have set up, of which a process that imports when it must has nothing
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    sys.argv = ["sora-jax", "train", f"--config={TESTS / 'tiny.py'}:{stage}", f"--workdir={workdir}", *flags]
    sys.exit(main.run())


class Runs:
    """Starts runs with one cache of compiled programs."""

    def __init__(self, cache):
        self.cache = cache
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [
                "sora_jax.main",
                "sora_jax.train.loop",
                "sora_jax.train.vae",
                "sora_jax.train.dit",
                "sora_jax.train.captioner",
                "quickstart",
                "child",
            ]
        )

    def start(self, workdir, stage="vae", devices=1, of_run=None, **of_loop):
        overrides = {f"loop.{name}": value for name, value in of_loop.items()} | (of_run or {})
        process = self._context.Process(target=run, args=(stage, workdir, self.cache, overrides, devices))
        process.start()
        return process

    def log(self, workdir):
        return log_path(self.cache, workdir).read_text()

    def finish(self, workdir, *arguments, **settings):
        """The exit code of a run that is left alone."""
        process = self.start(workdir, *arguments, **settings)
        process.join(300)
        return process.exitcode

    def reach(self, step, workdir, *arguments, **settings):
        """The checkpoint of a step of a run, which is killed once it is there; its loader's workers end by themselves."""
        process = self.start(workdir, *arguments, **(LOOP | {"keep": 1000} | settings))
        wait_for(lambda: (workdir / str(step)).exists() or process.exitcode is not None, 300)
        workers = several.children(process.pid)
        process.kill()
        process.join()
        wait_for(lambda: not any(Path("/proc", str(worker)).exists() for worker in workers), 30)
        assert (workdir / str(step)).exists(), self.log(workdir)
        return workdir / str(step)


def log_path(cache, workdir):
    """Beside the cache: the disk of the work dir may be full."""
    return cache / f"{str(workdir).replace(os.sep, '_')}.log"


def wait_for(condition, seconds=120.0, every=0.02):
    """Until condition() gives something true, which it returns."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        time.sleep(every)
    raise TimeoutError(f"nothing happened for {seconds} s")
