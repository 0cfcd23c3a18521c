"""One training loop for every task: a jitted pure step under a mesh, resume, skipped steps, metrics and progress.

A task says what is trained (weights, loss), on what (batches) and how it is judged; everything else is here.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import Array

import sora_jax
from sora_jax import checkpoint, config, disk, processes, sharding, signals
from sora_jax.structs import Share, TrainState
from sora_jax.train import guard, lock, optimizer, progress, watch

# (params, rest, batch, key) -> (loss, metrics): pure; key is made from (seed, step).
Loss = Callable[[Any, Any, Any, Array], tuple[Array, dict[str, Array]]]


@runtime_checkable
class Task(Protocol):
    """What a run trains. batch metrics are host numbers, summed between two log lines, such as counts of packed clips."""

    run: Any
    unit: str  # what a step consumes: 'tokens' or 'clips'
    units_per_step: float
    rows: int  # of a batch, over all processes
    sizes: dict[str, int]  # of logical axes of activations that a mesh may split, beside rows
    flops_per_step: float

    def flops_before(self) -> float:
        """Spent on what this run builds on, such as the VAE of a DiT and encoding with it, which it may do first."""
        ...

    def meta(self) -> dict[str, Any]: ...

    def init(self, key: Array) -> tuple[Any, Any]: ...

    def loss(self, params: Any, rest: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]: ...

    def batches(self, share: Share) -> Iterator[tuple[Any, dict[str, float]]]: ...

    def evaluate(self, state: TrainState) -> dict[str, float]: ...

    def sample(self, state: TrainState, path: Path) -> None: ...

    def finish(self, state: TrainState) -> TrainState: ...


class Past(NamedTuple):
    """Of a run that is resumed: seconds spent, whether what was due after its last step was evaluated and sampled, how often it
    went back to an older checkpoint, and the metrics since its last line, as progress.Window.state has them."""

    seconds: float = 0.0
    judged: bool = True
    rollbacks: int = 0
    window: dict[str, Any] | None = None


class DivergedError(RuntimeError):
    """Too many steps in a row were skipped."""


def make_step(
    loss: Loss, tx: optax.GradientTransformation, ema_decay: float, seed: int, spike_factor: float
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """The pure training step. One that guard.judged does not count leaves parameters, average and optimizer as they were.

    Of its metrics `bad` is 1 where loss or gradient were not finite, `spike` where the gradient was far above the usual, and
    `skipped` is how many steps in a row were either.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.rest, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        guarded, good, spike = guard.judged(state.guard, finite, norm, spike_factor)
        # A whole tree of zeros instead of NaN, so that nothing below can mix them in.
        grads = jax.tree.map(lambda g: jnp.where(good, g, 0), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The window of the average grows with the run, so that the first steps do not weigh on it.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), state.ema, params)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

        following = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            rest=state.rest,
            opt_state=keep(opt_state, state.opt_state),
            guard=guarded,
        )
        counted = {"bad": (~finite).astype(jnp.int32), "spike": spike.astype(jnp.int32), "skipped": guarded.skipped}
        return following, metrics | {"loss": value, "grad_norm": norm} | counted

    return step


def initial(task: Task, tx: optax.GradientTransformation) -> Callable[[], TrainState]:
    """Makes the state of step 0. One function for its shapes and its arrays: jax traces it once, which takes seconds."""

    def state() -> TrainState:
        params, rest = task.init(jax.random.key(task.run.seed))
        return TrainState(jnp.int32(0), params, params, rest, tx.init(params), guard.fresh())

    return jax.jit(state)


def abstract_state(make: Callable[[], TrainState], mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of step 0, as the sharding table says, and no arrays."""
    shapes = jax.eval_shape(make)
    return sharding.abstract(shapes, state_shardings(shapes, mesh))


def new_state(make: Callable[[], TrainState], like: TrainState) -> TrainState:
    """The state of step 0, created where abstract_state says."""
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))()


def state_shardings(shapes: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    params = sharding.parameter_shardings(shapes.params, mesh)
    whole = sharding.replicated(mesh)
    return TrainState(
        step=whole,
        params=params,
        ema=params,
        rest=jax.tree.map(lambda _: whole, shapes.rest),
        opt_state=sharding.like_parameters(shapes.opt_state, shapes.params, params, mesh),
        guard=jax.tree.map(lambda _: whole, shapes.guard),
    )


def versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy")
    return {"sora_jax": sora_jax.__version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def fit(task: Task, workdir: Path, options: watch.Options = watch.USUAL) -> TrainState:
    """Train to the end of the run, from the newest checkpoint in workdir if there is one; returns the last state.

    Raises ConfigError if the work dir holds a run of another config or another process writes there, sharding.MeshError if the run
    does not divide over the devices, checkpoint.SaveError if more saves in a row fail than loop.max_failed_saves, DivergedError if
    too many steps in a row are skipped, and, inside signals.handled, Stopped once the state is saved.
    """
    run, loop = task.run, task.run.loop
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(run.mesh)
    tx = optimizer.make(run.optimizer, loop.steps)
    with lock.locked(workdir), watch.watched(workdir, options) as watching, jax.set_mesh(mesh):
        # Before clips are encoded: what does not divide over the mesh is told at once.
        share, make = sharding.share(mesh, task.rows), initial(task, tx)
        shapes = abstract_state(make, mesh)
        sharding.check(mesh, **task.sizes)
        source = task.batches(share)
        if checkpoint.latest_step(workdir) is None:
            state, past = new_state(make, shapes), Past()
        else:
            # Without arrays, which would lie in memory twice while the checkpoint's are read.
            state, past = _resume(task, workdir, shapes, source)
        if int(state.step) >= loop.steps and past.judged:
            logging.info("%s: already trained for %d steps", workdir, int(state.step))
            return state
        if mesh.size > 1:
            logging.info("on %d devices: %s", mesh.size, sharding.in_words(mesh.shape))
        if processes.is_first():
            _write_config(run, workdir / "config.json")
        step = jax.jit(make_step(task.loss, tx, loop.ema, run.seed, loop.spike_factor), donate_argnums=0)
        with progress.reporter(workdir, loop.steps, int(state.step), task.unit, task.units_per_step) as report:
            state = _run(task, workdir, state, source, step, report, past, watching)
    return state


def _write_config(run: Any, path: Path) -> None:
    content = config.to_json(run).encode()
    try:
        # On a full disk the one that is there stays.
        if not path.is_file() or path.read_bytes() != content:
            disk.write_atomically(path, content)
    except OSError as error:
        raise checkpoint.SaveError(
            f"cannot write {path}: {error.strerror}; free space or mend the disk, and run again"
        ) from error


def _run(
    task: Task, workdir: Path, state: TrainState, source: Any, step: Any, report: Any, past: Past, watching: watch.Watch
) -> TrainState:
    loop = task.run.loop
    mesh = jax.sharding.get_mesh()
    number, saved, failed = int(state.step), int(state.step), 0
    owed = False  # a save that was due
    began, window = time.perf_counter(), progress.Window(task.flops_per_step, task.units_per_step)
    if past.window is not None:
        try:
            window.restore(past.window)
        except (LookupError, TypeError, ValueError) as error:
            raise config.ConfigError(
                f"the metrics kept in the checkpoint in {workdir} are none ({error!r:.200}); start in another --workdir"
            ) from error

    def save(judged: bool = True) -> None:
        with watching.of("save"):
            now = Past(past.seconds + time.perf_counter() - began, judged, past.rollbacks, window.state())
            _save(task, workdir, state, source, now)

    with signals.held(number):
        if not past.judged:
            judged = {line["step"] for line in progress.read_metrics(workdir, "eval")}
            _judge(task, workdir, state, number, report, watching, evaluated=number in judged)
        while number < loop.steps:
            if stop := signals.stop_after(number):
                if number > saved:
                    save()
                raise stop
            with watching.of("data"):
                batch, host_metrics = next(source)
            state, metrics = watching.step(number + 1, step, state, sharding.place_rows(batch, mesh, task.rows))
            number += 1
            window.add(metrics, host_metrics)
            last = number == loop.steps
            if number % loop.log_every == 0 or last:
                line = window.close() | {"total_flops": task.flops_before() + number * task.flops_per_step}
                report.train(number, line | watching.line())
                if line["skipped_in_a_row"] >= loop.max_bad_steps:
                    state = _back(task, workdir, state, past, int(line["skipped_in_a_row"]))
                    past = past._replace(rollbacks=past.rollbacks + 1)
                    number = saved = int(state.step)
                    owed = False
                    continue
            if last:
                with watching.of("evaluate"):
                    state = task.finish(state)
            try:
                _judge(task, workdir, state, number, report, watching)
            except BaseException as error:
                # What was trained is kept, whatever judging raises; of several processes another may not have come here.
                if isinstance(error, signals.Stopped) or (last and jax.process_count() == 1):
                    save(judged=False)
                raise
            owed |= _due(number, loop.save_every, last)
            # What were saved while steps are skipped could push out what the run would go back to.
            if owed and (last or not int(state.guard.skipped)):
                owed = False
                try:
                    save()
                    saved, failed = number, 0
                except checkpoint.SaveError as error:
                    failed += 1
                    if last or failed > loop.max_failed_saves:
                        raise
                    logging.error("%s; going on (%d of %d times in a row)", error, failed, loop.max_failed_saves)
    return state


def _back(task: Task, workdir: Path, state: TrainState, past: Past, row: int) -> TrainState:
    """The newest checkpoint from before the steps that are being skipped; later ones are set aside. row is how many were skipped
    in a row, perhaps some steps ago: parameters that were saved since then are as good as those before.

    The loader goes on where it is: what comes next is other data than what went wrong. Raises DivergedError if the run has
    gone back as often as it may, or there is nothing to go back to.
    """
    number, skipped, most = int(state.step), int(state.guard.skipped), task.run.loop.rollbacks
    what = f"{row} steps in a row up to step {number} were skipped, as loss or gradient were not finite or spikes"
    if past.rollbacks >= most:
        again = f" (the run has gone back {most} times)" if most else ", or set loop.rollbacks to go on with other data"
        raise DivergedError(f"{what}; lower optimizer.rate{again}")
    good = [step for step in checkpoint.steps(workdir) if step <= number - skipped]
    if not good:
        raise DivergedError(f"{what}, and no checkpoint is older; lower optimizer.rate, or save more often")
    processes.first_then_all(lambda: checkpoint.set_aside(workdir, after=good[-1], name="diverged"))
    restored = checkpoint.restore(workdir, _items(state), good[-1])
    logging.warning("%s; going back to step %d (%d of %d times)", what, good[-1], past.rollbacks + 1, most)
    return TrainState(step=jnp.int32(restored.step), **restored.items)


def _judge(
    task: Task,
    workdir: Path,
    state: TrainState,
    number: int,
    report: Any,
    watching: watch.Watch,
    evaluated: bool = False,
) -> None:
    """Evaluation and samples after step `number`, if they are due and, where it was evaluated before, not there yet. A signal may
    cut them short."""
    loop = task.run.loop
    last = number == loop.steps
    path = workdir / "samples" / f"step_{number:07d}.png"
    with signals.abandonable():
        if _due(number, loop.evaluate_every, last) and not evaluated:
            with watching.of("evaluate"):
                found = task.evaluate(state)
            report.evaluation(number, found | {"total_flops": task.flops_before() + number * task.flops_per_step})
        if _due(number, loop.sample_every, last) and not (evaluated and path.exists()):
            try:
                with watching.of("sample"):
                    task.sample(state, path)
            except OSError as error:
                logging.error("cannot write %s: %s; the run goes on", path, error.strerror)


def _due(number: int, every: int, last: bool) -> bool:
    return last or (every > 0 and number % every == 0)


def _items(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in state._fields if name != "step"}


def _save(task: Task, workdir: Path, state: TrainState, source: Any, past: Past) -> None:
    number = int(state.step)
    meta = {
        "config": config.to_dict(task.run),
        "total_flops": task.flops_before() + number * task.flops_per_step,
        "flops_before": task.flops_before(),
        "loader": processes.joined(source.get_state()),
        "versions": versions(),
    }
    meta |= past._asdict() | task.meta()
    checkpoint.save(workdir, number, _items(state), meta, keep=task.run.loop.keep)


def _resume(task: Task, workdir: Path, like: TrainState, source: Any) -> tuple[TrainState, Past]:
    """The state and the past of the newest checkpoint, its batches wound on to where it stopped."""
    stored = checkpoint.read_meta(workdir)
    changed = config.differences(config.to_dict(config.from_stored(stored.get("config"))), config.to_dict(task.run))
    # A longer or shorter run is another schedule: only what is written and shown may change.
    free: tuple[str, ...] = (
        "loop.log_every",
        "loop.save_every",
        "loop.evaluate_every",
        "loop.sample_every",
        "loop.keep",
        "loop.max_failed_saves",
        "loop.max_bad_steps",
        "loop.rollbacks",
        "loader.patience",
        "loader.skip_quota",
        "sampler.",
        "mesh.",
        "dit.attention",
        "dit.remat",
        "captioner.attention",
    )
    if (weights := stored.get("vae_weights")) is not None:
        # Which VAE it is counts, not where it lies; older checkpoints say only that.
        changed += config.differences({"vae_weights": weights}, {"vae_weights": task.meta()["vae_weights"]})
        free += ("vae_checkpoint",)
    changed = [change for change in changed if not change.startswith(free)]
    if changed:
        raise config.ConfigError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:3])}); choose another --workdir or undo the change"
        )
    items = _items(like)
    if "guard" not in checkpoint.held_items(workdir):  # a checkpoint from before there was one
        del items["guard"]
        like = like._replace(guard=guard.fresh())
    restored = checkpoint.restore(workdir, items)
    try:
        source.set_state(restored.meta["loader"])
    # Grain has no class of its own for a state that is none.
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise config.ConfigError(
            f"the loader's position in the checkpoint in {workdir} is none ({error!r:.200}); start in another --workdir"
        ) from error
    logging.info("%s: resumed from step %d", workdir, restored.step)
    past = Past(
        config.stored_number(restored.meta, "seconds", workdir) if "seconds" in restored.meta else 0.0,
        restored.meta.get("judged") is not False,
        int(config.stored_number(restored.meta, "rollbacks", workdir)) if "rollbacks" in restored.meta else 0,
        restored.meta.get("window"),
    )
    return like._replace(step=jnp.int32(restored.step), **restored.items), past
