"""Several processes on this machine, started by tools/launch_local."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import xla

ROOT = Path(__file__).parent.parent
# Trains a tiny VAE, and a DiT on it, for as many steps as its second argument says, in the folder that is its first; or, of very
# many steps, the VAE alone. The DiT works on the VAE of its third argument, if there is one, and so on the very same latents.
# It ends as the command does, whatever happens.
PROGRAM = """
import dataclasses, jax, logging, pathlib, sys, tiny
logging.basicConfig(level=logging.INFO, force=True)  # importing jax's friends may have set it up otherwise
from sora_jax import main, processes, sharding
if "--distributed" in sys.argv:
    processes.start()
from sora_jax.train import dit, loop, vae

def train(argv):
    folder, steps = pathlib.Path(argv[0]), int(argv[1])
    mesh = sharding.MeshConfig(data=2, fsdp=jax.device_count() // 2)
    save_every = 4 if steps > 1000 else steps // 2
    run = dataclasses.replace(tiny.vae_run(steps=steps, log_every=1, save_every=save_every), mesh=mesh)
    loop.fit(vae.VAETask(run), folder / "vae")
    trained = pathlib.Path(argv[2]) if argv[2:] and not argv[2].startswith("-") else folder
    run = dataclasses.replace(tiny.dit_run(trained / "vae", steps=steps, log_every=1, save_every=save_every), mesh=mesh)
    run = dataclasses.replace(run, loader=dataclasses.replace(run.loader, lanes=2))
    loop.fit(dit.DiTTask(run, folder / "encoded"), folder / "dit")
    processes.leave()
    return 0

main._run = train
sys.exit(main.run())
"""


def environment(devices):
    paths = [str(ROOT / "tests"), str(ROOT / "experiments")]
    return os.environ | {
        "XLA_FLAGS": xla.flags(),
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@contextlib.contextmanager
def launched(folder, *program, count=2, devices=4):
    """tools/launch_local with a program, its own process group, and the file of what it says; killed at the end."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "launch_local"),
        f"--processes={count}",
        f"--devices={devices}",
        "--",
    ]
    log = folder / f"log{count}"
    with log.open("w") as told:
        process = subprocess.Popen(
            [*command, sys.executable, "-c", *map(str, program)],
            env=environment(devices),
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        # Each of those that it started is a group of its own.
        with contextlib.suppress(OSError):
            for child in children(process.pid):
                os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(found, process, log, seconds=300):
    """Waits until found() is true; fails if the process ends before, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def children(pid):
    """What the threads of a process have started and has not ended."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a thread that has ended since
            found += map(int, path.read_text().split())
    return found
