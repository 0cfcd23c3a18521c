"""From requests to videos: text states, noise keyed by seed, packed rows, the sampler, the VAE's decoder.

Every mode of prompting is the same call: what is known stays at time 0 while the rest is denoised.

    made = pipeline.load(Path("runs/prompting/dit")).generate([Order(prompt="a red circle moves left", image="start.png")])
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sora_jax import checkpoint, config, sharding
from sora_jax.config import DiTRun
from sora_jax.data import pack
from sora_jax.diffusion import flow, sampler
from sora_jax.generate import canvas, layouts, media
from sora_jax.generate.canvas import Job, Pass, Result
from sora_jax.generate.codec import Codec
from sora_jax.generate.known import Known, known_cells, known_patches
from sora_jax.generate.requests import Order, RequestError, Size
from sora_jax.models import dit, vae
from sora_jax.nn import attention, kernels
from sora_jax.nn.layers import abstract, parameters
from sora_jax.structs import Layout, PackedBatch
from sora_jax.text.captions import CaptionText

# The root of sampling noise: with it and a request's seed, its noise is the same in every packing and every model, of one patch.
NOISE_KEY = 0
# Rows are as long as the longest clip needs, in steps of this, so that few lengths compile.
ROW_STEP = 32
# Tokens that are denoised together, where rows are split over devices on each of them.
BATCH_TOKENS = 4096
# Batches of videos that are made and kept together before the first is handed on.
TOGETHER = 8
# Clips that a row has room for, however small the smallest is: each takes slots and text, used or not.
MOST_SHARE = 16
# Stands in the settings for any known_guidance but 1, whose branch is a part of the program; that of each request is an argument.
INSISTING = 2.0


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to make: frames must be 1 + 4k and sizes multiples of 8 (for a 4x8x8 VAE). known says what of it is given, and
    known_guidance how much to insist on it (None: as the sampler's settings say, but at most most_known_guidance)."""

    prompt: str
    height: int
    width: int
    frames: int
    fps: float
    seed: int
    known: Known | None = None
    known_guidance: float | None = None
    most_known_guidance: float = math.inf

    def __post_init__(self) -> None:
        size = (self.frames, self.height, self.width)
        if self.known is not None and self.known.given_THW.shape != size:
            raise ValueError(
                f"what is known has {list(self.known.given_THW.shape)} pixels and the request {list(size)}; they must agree"
            )


@dataclasses.dataclass(frozen=True)
class Start:
    """What a request starts from: its clean latent (t, h, w, c), which patches (n,) of it are known and which pixels (T, H, W)
    are given, and the time that the rest starts from."""

    clean_thwc: np.ndarray
    known_N: np.ndarray
    given_THW: np.ndarray
    ceiling: float


class Program(NamedTuple):
    """What is compiled, for several calls to share: the shape of its rows, and whether it can insist on what is given."""

    packing: pack.PackConfig
    insisting: bool


class Pipeline:
    """A trained model, ready to sample, on a mesh, or on that of the context. The run's text encoder is resolved."""

    def __init__(
        self,
        run: DiTRun,
        vae_config: vae.VAEConfig,
        params: Any,
        vae_weights: tuple[Any, Any],
        text: CaptionText,
        mesh: Mesh | None = None,
    ) -> None:
        run = anywhere(run)
        self.run, self.params, self.text, self.mesh = run, params, text, mesh
        self.codec = Codec(vae_config, *vae_weights)
        self.geometry = pack.Geometry(run.dit.patch, vae_config.stride)
        self.vae_config = vae_config
        # Pixels down and across that training reached. Seconds stay what they are: closer together they would be another speed.
        self._reach_3 = np.array([np.inf, *np.max(run.data.world.clip_sizes, axis=0)], np.float32)
        self._denoise = jax.jit(denoiser(run.dit), static_argnames="settings")

    def generate(self, orders: Sequence[Order], settings: sampler.SamplerConfig | None = None) -> list[np.ndarray]:
        """uint8 videos (T, H, W, 3) of what users ask for (requests.Order), in order; one after the other of their samples.

        settings are those of the model's own config if None. Raises RequestError and MediaError, one sentence with a remedy.
        """
        varied = [variation for order in orders for variation in order.variations()]
        return self.make(self.prepare(varied), settings or self.run.sampler)

    def prepare(self, orders: Sequence[Order]) -> list[Job]:
        """Orders laid out for this model; what differs in its prompt and seed alone is read once. Raises RequestError and
        MediaError, which of several orders name the one that is wrong."""
        laid: dict[Order, Job] = {}
        jobs = []
        several = len({dataclasses.replace(order, seed=0) for order in orders}) > 1
        for order in orders:
            alike = dataclasses.replace(order, seed=0, prompt="any")
            if alike not in laid:
                try:
                    laid[alike] = layouts.prepare(alike, self._defaults(alike), self.grid)
                except (RequestError, media.MediaError) as error:
                    if not several:
                        raise
                    raise type(error)(f"in the order {order.in_short()}: {error}") from error
            jobs.append(dataclasses.replace(laid[alike], order=order))
        return jobs

    @property
    def grid(self) -> layouts.Grid:
        """What its sizes are multiples of."""
        return layouts.Grid(self.geometry.stride, self.geometry.patch, self.run.loader.known.next_frame == 1)

    @property
    def usual_size(self) -> Size:
        """Of the clips that it was trained on: the first of their sizes, and the longest."""
        world = self.run.data.world
        height, width = world.clip_sizes[0]
        return Size(height, width, max(world.frame_counts), world.fps[0])

    def _defaults(self, order: Order) -> Size:
        """The usual size, but of an order's file the size of training whose shape is nearest; where the order says one side
        alone, the other by the file's shape."""
        paths = [path for mode, several in order.paths().items() if mode == order.mode for path in several]
        if not paths:
            return self.usual_size
        shape = media.size_of(Path(paths[0]))
        height, width = media.nearest_shape(self.run.data.world.clip_sizes, shape)
        (_, *strides), (_, *patches) = self.geometry.stride, self.geometry.patch
        high, wide = (stride * patch for stride, patch in zip(strides, patches, strict=True))
        # Without borders, as the file is.
        if order.height is None and order.width is not None:
            inner = order.width - (order.left or 0) - (order.right or 0)
            height = max(1, round(inner * shape[0] / (shape[1] * high))) * high
        elif order.width is None and order.height is not None:
            inner = order.height - (order.top or 0) - (order.bottom or 0)
            width = max(1, round(inner * shape[1] / (shape[0] * wide))) * wide
        return dataclasses.replace(self.usual_size, height=height, width=width)

    def make(self, jobs: Sequence[Job], settings: sampler.SamplerConfig) -> list[np.ndarray]:
        """uint8 videos (T, H, W, 3) of orders that are laid out (layouts.prepare), in order."""
        made = dict(self.making(jobs, settings))
        return [made[number].frames_THWC for number in range(len(jobs))]

    def making(self, jobs: Sequence[Job], settings: sampler.SamplerConfig) -> Iterator[tuple[int, Result]]:
        """(number, result) of orders that are laid out, each as soon as it is there, so that no more has to be kept than a few
        batches.

        Their passes share rows, which have one shape throughout, so that the model is compiled once for all of them.
        """
        self.text.prepare(["", *(job.order.prompt for job in jobs)])
        tokens = [self._most_tokens(job) for job in jobs]
        with self._on_mesh():
            packing = packing_for(tokens, max(self._words(job.order.prompt) for job in jobs))
        program = Program(packing, any(_insists(job, settings.known_guidance) for job in jobs))

        def sampled(passes: list[Pass]) -> list[np.ndarray]:
            requests = [
                Request(
                    each.prompt,
                    **dataclasses.asdict(each.size),
                    seed=each.seed,
                    known=each.known,
                    known_guidance=each.known_guidance,
                    most_known_guidance=each.most_known_guidance,
                )
                for each in passes
            ]
            return self.sample(requests, settings, program)

        begun, most = np.cumsum([0, *tokens]), TOGETHER * packing.rows * packing.row_tokens
        for _, group in itertools.groupby(range(len(jobs)), key=lambda number: int(begun[number]) // most):
            numbers = list(group)
            for number, result in canvas.run([jobs[number] for number in numbers], sampled):
                yield numbers[number], result

    def _most_tokens(self, job: Job) -> int:
        """Of the longest pass of a job."""
        shapes = [
            self.vae_config.latent_shape(window.stop - window.start, *timeline.given_THW.shape[1:])
            for timeline in job.timelines
            for window in timeline.windows
        ]
        return max(math.prod(pack.grid_shape(shape, self.geometry.patch)) for shape in shapes)

    def _words(self, prompt: str) -> int:
        """Text tokens of a prompt."""
        return len(next(part for part in self.text(prompt) if part is not None))

    def sample(
        self,
        requests: Sequence[Request],
        settings: sampler.SamplerConfig,
        program: Program | None = None,
    ) -> list[np.ndarray]:
        """uint8 videos (T, H, W, 3), in order; what was given comes back as the VAE makes it from what was given.

        The program is what these requests need if None. Raises ValueError for sizes the model cannot make.
        """
        made: list[Any] = [None] * len(requests)
        starts = self.starts(requests)
        given = {i: start.given_THW for i, start in enumerate(starts) if start.given_THW.any()}
        wanted = [i for i, start in enumerate(starts) if not start.given_THW.all()]
        latents = self.sample_latents([requests[i] for i in wanted], settings, [starts[i] for i in wanted], program)
        with self._on_mesh():
            sampled = self.codec.decode(latents)
            round_trips = self.codec.decode([starts[i].clean_thwc for i in given])
        for i, frames_THWC in zip(wanted, sampled, strict=True):
            made[i] = frames_THWC
        for (i, given_THW), frames_THWC in zip(given.items(), round_trips, strict=True):
            made[i] = frames_THWC if made[i] is None else np.where(given_THW[..., None], frames_THWC, made[i])
        return made

    def sample_latents(
        self,
        requests: Sequence[Request],
        settings: sampler.SamplerConfig,
        starts: Sequence[Start] | None = None,
        program: Program | None = None,
    ) -> list[np.ndarray]:
        """Normalised latents (t, h, w, c), in order. starts and program are those of the requests if None."""
        if not requests:
            return []
        starts = self.starts(requests) if starts is None else starts
        self.text.prepare(["", *(request.prompt for request in requests)])
        pairs = list(enumerate(zip(requests, starts, strict=True)))
        clips = [self._tokens(number, request, start, request.prompt) for number, (request, start) in pairs]
        unprompted = [self._tokens(number, request, start, "") for number, (request, start) in pairs]
        insistences = [_insistence(request, start, settings) for _, (request, start) in pairs]
        with self._on_mesh():
            if program is None:
                packing = packing_for([len(clip.index_N) for clip in clips], max(clip.num_text for clip in clips))
                program = Program(packing, any(insistence != 1 for insistence in insistences))
            settings = dataclasses.replace(settings, known_guidance=INSISTING if program.insisting else 1.0)
            seeds = [request.seed for request in requests]
            patches = self._denoised(clips, unprompted, seeds, insistences, settings, program.packing)
        return [
            pack.unpatchify(patches[i], start.clean_thwc.shape, self.geometry.patch) for i, start in enumerate(starts)
        ]

    def starts(self, requests: Sequence[Request]) -> list[Start]:
        """What requests start from: their known frames, encoded, or nothing."""
        known = {i: request.known for i, request in enumerate(requests) if request.known is not None}
        with self._on_mesh():
            encoded = self.codec.encode([each.frames_THWC for each in known.values()])
        latents = {i: mean_thwc for i, (mean_thwc, _) in zip(known, encoded, strict=True)}

        def start(number: int, request: Request) -> Start:
            size = (request.frames, request.height, request.width)
            shape = self.vae_config.latent_shape(*size)
            given_THW = known[number].given_THW if number in known else np.zeros(size, bool)
            cells_thw = known_cells(given_THW, self.geometry.stride)
            pack.grid_shape(shape, self.geometry.patch)  # refuses sizes that are no whole patches
            return Start(
                latents.get(number, np.zeros(shape, np.float32)),
                known_patches(cells_thw, self.geometry.patch),
                given_THW,
                known[number].strength if number in known else 1.0,
            )

        return [start(number, request) for number, request in enumerate(requests)]

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _denoised(
        self,
        clips: Sequence[pack.Tokens],
        unprompted: Sequence[pack.Tokens],
        seeds: Sequence[int],
        insistences: Sequence[float],
        settings: sampler.SamplerConfig,
        packing: pack.PackConfig,
    ) -> dict[int, np.ndarray]:
        """Clean patches (n, P) of every clip."""
        rows, _ = pack.pack_rows(clips, packing, np.random.default_rng(0))

        def batch_of(rows: Sequence[Sequence[pack.Tokens]]) -> PackedBatch:
            return pack.stack([pack.fill_row(row, packing, self.run.dit.patch_dim, self.text.width) for row in rows])

        found: dict[int, np.ndarray] = {}
        for start in range(0, len(rows), packing.rows):
            some = rows[start : start + packing.rows]
            some = some + [[]] * (packing.rows - len(some))
            batch, blind = batch_of(some), batch_of([[unprompted[clip.clip] for clip in row] for row in some])
            seed_BS, insistence_BS = (
                np.asarray(values, dtype)[batch.clip_BS]
                for values, dtype in ((seeds, np.int32), (insistences, np.float32))
            )
            clean = self._denoise(self.params, batch, blind.layout, seed_BS, insistence_BS, settings=settings)
            found |= pack.unpack(np.asarray(clean), batch)
        return found

    def _tokens(self, number: int, request: Request, start: Start, prompt: str) -> pack.Tokens:
        shape, count = start.clean_thwc.shape, len(start.known_N)
        text_LM, text_token_L = self.text(prompt)
        extent_3 = pack.extent(shape, self.geometry, request.fps)
        # What is larger than all of training lies closer together rather than where no token ever was: position
        # interpolation (arXiv:2306.15595).
        scale_3 = np.minimum(1, self._reach_3 / np.maximum(extent_3, 1))
        return pack.Tokens(
            mean_NP=pack.patchify(start.clean_thwc, self.geometry.patch),
            std_NP=np.zeros((count, self.run.dit.patch_dim), np.float32),
            position_N3=pack.positions(shape, self.geometry, request.fps) * scale_3,
            index_N=np.arange(count, dtype=np.int32),
            known_N=start.known_N,
            ceiling=start.ceiling,
            extent_3=extent_3 * scale_3,
            clip=number,
            draw=0,
            text_LM=text_LM,
            text_token_L=text_token_L,
        )


def packing_for(tokens: Sequence[int], most_text: int) -> pack.PackConfig:
    """Rows for clips of so many tokens, on the mesh of the context: no longer than the longest clip needs, and as many at a time
    as BATCH_TOKENS allows."""
    # Kernels of long rows take tokens, and the text's too, in steps of their own.
    step = ROW_STEP if max(tokens) ** 2 <= attention.SHORT else kernels.SPLASH_LANES
    longest = sharding.padded(max(tokens), "tokens", step)
    share = max(1, min(longest // min(tokens), len(tokens), MOST_SHARE))
    over = sharding.shards("rows")
    rows = max(1, min(over * BATCH_TOKENS // longest, -(-sum(tokens) // longest)))
    return pack.PackConfig(
        rows=sharding.padded(rows, "rows"),
        row_tokens=longest,
        row_slots=2 * share,
        row_text=sharding.padded(most_text * share, "none", step),
        window=len(tokens),
    )


def _insistence(request: Request, start: Start, settings: sampler.SamplerConfig) -> float:
    """Where nothing is known there is nothing to insist on, and a third of the work to save."""
    if not start.known_N.any():
        return 1.0
    usual = min(settings.known_guidance, request.most_known_guidance)
    return usual if request.known_guidance is None else request.known_guidance


def _insists(job: Job, usual: float) -> bool:
    """Whether a pass of a job may insist on what is given, where the checkpoint's way is to insist `usual`."""
    if job.order.known_guidance is not None:
        return job.order.known_guidance != 1 and job.goes_on
    given = any(timeline.given_THW.any() or timeline.loop > 0 for timeline in job.timelines)
    # Windows after the first are given what was made before.
    going_on = any(len(timeline.windows) > 1 for timeline in job.timelines)
    return (given and usual != 1) or (going_on and min(usual, canvas.ONLY_GOING_ON) != 1)


def denoiser(config: dit.DiTConfig) -> Callable[..., jax.Array]:
    """denoise(params, batch, blind, seed_BS, known_guidance_BS, settings) -> clean patches (B, N, P): a whole batch from its noise,
    one program.

    blind is the batch's layout without prompts, seed_BS a seed for every slot, as is known_guidance_BS, which has a part in it
    if the settings' is not 1.
    """
    graphdef = nnx.split(abstract(dit.DiT, config), nnx.Param)[0]

    def denoise(
        params: Any,
        batch: PackedBatch,
        blind: Layout,
        seed_BS: jax.Array,
        known_guidance_BS: jax.Array,
        settings: sampler.SamplerConfig,
    ) -> jax.Array:
        model = nnx.merge(graphdef, params)
        layout = batch.layout
        seed_BN, ceiling_BN = (flow.spread(x_BS, layout.slot_BN) for x_BS in (seed_BS, batch.ceiling_BS))

        def noise(draw: int) -> jax.Array:
            draw_BN, width = jnp.full_like(seed_BN, draw), batch.mean_BNP.shape[-1]
            return flow.token_noise(jax.random.key(NOISE_KEY), seed_BN, draw_BN, batch.index_BN, width)

        noise_BNP = noise(0)
        mine_BSS = layout.slot_segment_BS[:, :, None] == layout.slot_segment_BS[:, None, :]
        slots_BNS = jax.nn.one_hot(layout.slot_BN, seed_BS.shape[1]) * (layout.segment_BN > 0)[..., None]

        def count_BS(such_BN: jax.Array) -> jax.Array:
            """How many tokens of each slot's clip are such."""
            return jnp.einsum("bst,bnt,bn->bs", mine_BSS.astype(jnp.float32), slots_BNS, such_BN.astype(jnp.float32))

        given_BN = ceiling_BN == 0
        # Of clips that go on from given ones, other than from their first frame alone, the prompt says less than these.
        going_on_BS = count_BS(given_BN & (layout.position_BN3[..., 0] > 0)) > 0
        insistence_BS = jnp.where(going_on_BS, min(settings.guidance, settings.guidance_going_on), settings.guidance)
        # Branches of guidance are one batch: one program, and each is wanted at every step.
        branches = [layout, blind, blind][: settings.branches]
        layouts = jax.tree.map(lambda *parts: jnp.concatenate(parts), *branches)

        def velocity(noisy_BNP: jax.Array, time_BS: jax.Array) -> jax.Array:
            noisy, times = [noisy_BNP] * len(branches), [time_BS] * len(branches)
            if settings.known_guidance != 1:
                # Known tokens as if they were not, with as much noise as the others of their clip.
                times[2] = jnp.where(mine_BSS, time_BS[:, None, :], 0.0).max(-1)
                hidden_BNP = flow.corrupt(batch.mean_BNP, noise_BNP, flow.spread(times[2], layout.slot_BN))
                noisy[2] = jnp.where(given_BN[..., None], hidden_BNP, noisy_BNP)
            found = jnp.split(model(jnp.concatenate(noisy), jnp.concatenate(times), layouts), len(branches))
            if len(branches) == 1:
                return found[0]
            low, high = settings.guidance_interval
            time_BN = flow.spread(time_BS, layout.slot_BN)
            insistence_BN = flow.spread(insistence_BS, layout.slot_BN)
            guidance_BN = jnp.where((time_BN >= low) & (time_BN <= high), insistence_BN, 1.0)
            made_BNP = sampler.guided(found[0], found[1], guidance_BN[..., None])
            if len(branches) == 3:
                # Two guidances in turn (arXiv:2211.09800, equation 3).
                more_BN = flow.spread(known_guidance_BS, layout.slot_BN) - 1
                made_BNP = made_BNP + more_BN[..., None] * (found[1] - found[2])
            if settings.guidance_rescale:
                made_BNP = sampler.rescaled(made_BNP, found[0], slots_BNS, settings.guidance_rescale)
            return made_BNP

        times_KBS = sampler.schedule(settings, batch.ceiling_BS, count_BS(jnp.ones_like(given_BN)))
        start_BNP = flow.corrupt(batch.mean_BNP, noise_BNP, ceiling_BN)
        made_BNP = sampler.sample(velocity, start_BNP, layout.slot_BN, times_KBS, settings.method)
        if settings.steps_again:
            # Only what is made beside something given has anything to meet: the others take steps of length 0.
            with_given_BS = count_BS(given_BN) > 0
            again_KBS = times_KBS[-1 - settings.steps_again :] * with_given_BS

            def again(made_BNP: jax.Array) -> jax.Array:
                start_BNP = flow.corrupt(made_BNP, noise(1), flow.spread(again_KBS[0], layout.slot_BN))
                return sampler.sample(velocity, start_BNP, layout.slot_BN, again_KBS, settings.method)

            made_BNP = jax.lax.cond(with_given_BS.any(), again, lambda made_BNP: made_BNP, made_BNP)
        return sharding.everywhere(made_BNP)

    return denoise


def load_run(path: Path, step: int | None = None) -> DiTRun:
    """The resolved config of a DiT's work dir. Raises FileNotFoundError or ConfigError."""
    meta = checkpoint.read_meta(path, step)
    run = config.from_stored(meta.get("config"))
    if not isinstance(run, DiTRun):
        raise config.ConfigError(
            f"{path} holds a {meta['config']['task']} checkpoint; give the work dir of a trained DiT"
        )
    return run


def anywhere(run: DiTRun) -> DiTRun:
    """The run with its attention chosen where it runs: a backend that was named for training need not take the rows that are
    sampled, nor their chips."""
    return dataclasses.replace(run, dit=dataclasses.replace(run.dit, attention="auto"))


def load(path: Path, step: int | None = None, mesh: Mesh | None = None) -> Pipeline:
    """The pipeline of a DiT's work dir, from its averaged weights; the VAE's weights are in the same checkpoint.

    Without a mesh it runs on one device. Raises FileNotFoundError if there is no checkpoint, ConfigError if it is not one of a
    DiT, and ValueError if the model does not divide over the mesh.
    """
    run = load_run(path, step)
    vae_config = config.vae_config(checkpoint.read_meta(path, step).get("vae"))
    mesh = mesh or sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    sharding.check(mesh, heads=run.dit.common_heads)
    params, weights = restored(path, step, beside(abstract(dit.DiT, run.dit), abstract(vae.VAE, vae_config)), mesh)
    return Pipeline(run, vae_config, params, weights, CaptionText(run.text, run.text.encoder), mesh)


def restored(path: Path, step: int | None, like: tuple[Any, Any], mesh: Mesh) -> tuple[Any, tuple[Any, Any]]:
    """(averaged params, the VAE's params and rest) of a checkpoint of a model on latents, given the shapes beside() has."""
    whole = sharding.replicated(mesh)
    placed = sharding.parameter_shardings(like[0], mesh), jax.tree.map(lambda _: whole, like[1])
    like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like, placed)
    items = checkpoint.restore(path, {"ema": like[0], "rest": like[1]}, step).items
    weights = items["rest"]["vae"]
    return items["ema"], (weights["params"], weights["rest"])


def initial_weights(run: DiTRun, vae_config: vae.VAEConfig, key: jax.Array) -> tuple[Any, Any]:
    """(params, rest) of a DiT run: the transformer's parameters, and the VAE it works with, which it does not train."""
    return beside(dit.DiT(run.dit, nnx.Rngs(key)), vae.VAE(vae_config, nnx.Rngs(key)))


def beside(model: nnx.Module, network: vae.VAE) -> tuple[Any, Any]:
    """(params of the model, rest that holds the VAE)."""
    _, vae_params, vae_rest = vae.split(network)
    rest = {"vae": {"params": nnx.to_pure_dict(vae_params), "rest": nnx.to_pure_dict(vae_rest)}}
    return parameters(model), rest


def load_vae_config(path: Path) -> vae.VAEConfig:
    """The architecture of the VAE in a work dir. Raises FileNotFoundError or ConfigError."""
    told = checkpoint.read_meta(path).get("config")
    if not isinstance(told, dict) or told.get("task") != "vae":
        raise config.ConfigError(f"{path} holds no VAE checkpoint; give the work dir of a trained VAE")
    # Its architecture alone: how it was trained may be told otherwise by now.
    return config.vae_config(told.get("vae"))


def load_vae(path: Path) -> tuple[vae.VAEConfig, Any, Any]:
    """(config, averaged params, rest) of a VAE's work dir. Raises FileNotFoundError or ConfigError."""
    shape = load_vae_config(path)
    like = tuple(nnx.to_pure_dict(part) for part in vae.split(abstract(vae.VAE, shape))[1:])
    items = checkpoint.restore(path, {"ema": like[0], "rest": like[1]}).items
    return shape, jax.device_get(items["ema"]), jax.device_get(items["rest"])
