"""FLOPs of training and sampling, analytic and by part: XLA's own count sees the body of a scan once.

One multiply-add is 2 FLOPs. Matrix products, convolutions and attention are counted, elementwise work is not; products with
the zeros around a picture are not, as XLA does not. Checked against XLA's count in tests/test_compute.py.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sora_jax.config import ComputeConfig, ConfigError, DiTRun, VAETrainConfig
from sora_jax.data.pack import PackConfig
from sora_jax.diffusion.sampler import SamplerConfig
from sora_jax.models.captioner import CaptionerConfig
from sora_jax.models.dit import MOST_BLOCKS, MOST_WIDTH, DiTConfig
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.vae import VAEConfig

WIDTH_STEPS = 4  # what a model's width is at least divided into for growing it, if it has fewer heads than that
SMALLEST_HEAD = 12  # what rotary positions of three axes need


class Product(NamedTuple):
    """Matrix products of one forward pass that belong to one part of a model.

    gradients: of how many of the two operands the backward pass needs one, at the price of a forward pass each.
    recomputed: how many more times the forward pass is made for the backward pass, because its result was not kept.
    moves: it only puts numbers where they belong, as a gather would.
    """

    part: str
    flops: float
    gradients: int = 2
    recomputed: int = 0
    moves: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """FLOPs of a training step. total is the model's own work, which budgets are stated in; executed adds recomputation."""

    products: tuple[Product, ...]

    @property
    def forward(self) -> float:
        return sum(each.flops for each in self.products)

    @property
    def backward(self) -> float:
        return sum(each.gradients * each.flops for each in self.products)

    @property
    def total(self) -> float:
        return self.forward + self.backward

    @property
    def useful(self) -> float:
        """total without what only moves numbers: what a model's speed is told by."""
        return self.total - sum((1 + each.gradients) * each.flops for each in self.products if each.moves)

    @property
    def executed(self) -> float:
        return self.total + sum(each.recomputed * each.flops for each in self.products)

    def by_part(self) -> dict[str, float]:
        """Forward and backward FLOPs of every part."""
        parts: dict[str, float] = {}
        for each in self.products:
            parts[each.part] = parts.get(each.part, 0.0) + (1 + each.gradients) * each.flops
        return parts


def dit(
    config: DiTConfig,
    rows: int,
    row_tokens: int,
    row_slots: int,
    row_text: int,
    pairs: float | None = None,
    text_pairs: float | None = None,
) -> list[Product]:
    """Products of one forward pass over packed rows, padding included.

    pairs and text_pairs are how many (query, key) pairs self- and cross-attention look at: all of a row's as dense attention
    executes them, or, where given, those within segments that are of use (pack.Count).
    """
    D, P, M, S = config.width, config.patch_dim, config.text_width, rows * row_slots
    N, L = rows * row_tokens, rows * row_text
    pairs = rows * row_tokens**2 if pairs is None else pairs
    text_pairs = rows * row_tokens * row_text if text_pairs is None else text_pairs
    # Dots without a batch axis are kept by the policy "dots", attention's and the slots' are not. It keeps what attention in blocks
    # gave, as "attention" does, but what is counted is what the reference executes.
    plain, batched = {"none": (0, 0), "dots": (0, 1), "offload": (0, 1), "attention": (1, 1), "full": (1, 1)}[
        config.remat
    ]
    learned = int(config.text is not None)  # text states that need gradients

    block = [
        Product("self-attention", 2 * N * D * (3 * D + D), recomputed=plain),
        Product("self-attention", 2 * 2 * pairs * D, recomputed=batched),
        Product("cross-attention", 2 * N * D * (D + D) + 2 * L * D * 2 * D, recomputed=plain),
        Product("cross-attention", 2 * 2 * text_pairs * D, recomputed=batched),
        Product("mlp", 2 * 2 * N * D * config.mlp_ratio * D, recomputed=plain),
        Product("modulation", 2 * S * D * 6 * D, recomputed=plain),
        Product("modulation", 2 * N * row_slots * 6 * D, gradients=1, recomputed=batched, moves=True),
    ]
    outside = [
        Product("modulation", 2 * S * D * 2 * D),
        Product("modulation", 2 * N * row_slots * 2 * D, gradients=1, moves=True),
        Product("ends", 2 * N * D * (P + 48), gradients=1),
        Product("ends", 2 * N * D * P),
        Product("condition", 2 * S * D * (64 + 48), gradients=1),
        Product("condition", 2 * S * D * D),
        Product("condition", 2 * (L + S) * M * D, gradients=1 + learned),
        Product("condition", 2 * S * row_text * M, gradients=learned),
    ]
    encoder = [] if config.text is None else text_encoder(config.text, rows, row_text)
    return [each._replace(flops=config.blocks * each.flops) for each in block] + outside + encoder


def captioner(config: CaptionerConfig, rows: int, row_tokens: int, row_text: int) -> list[Product]:
    """Products of one forward pass over packed rows, padding included."""
    D, N, L = config.width, rows * row_tokens, rows * row_text
    mlp = 2 * 2 * D * config.mlp_ratio * D
    seeing = N * (2 * D * 4 * D + 2 * 2 * row_tokens * D + mlp)
    saying = L * (2 * D * 4 * D + 2 * 2 * row_text * D + mlp)
    across = L * (2 * D * 2 * D + 2 * 2 * row_tokens * D) + N * 2 * D * 2 * D
    return [
        Product("ends", 2 * N * D * (config.patch_dim + 48), gradients=1),
        Product("encoder", float(config.blocks * seeing)),
        Product("decoder", float(config.text_blocks * (saying + across))),
        Product("ends", 2 * L * D * config.words),
    ]


def text_encoder(config: TextEncoderConfig, rows: int, row_tokens: int) -> list[Product]:
    """Products of one forward pass over rows of text, padding included."""
    D, N = config.width, rows * row_tokens
    layer = 2 * N * D * (4 * D + 2 * config.mlp_width) + 2 * 2 * N * row_tokens * D
    return [Product("text encoder", float(config.layers * layer))]


def taps(size: int, kernel: int) -> int:
    """Products along one axis of a convolution that keeps its size: kernel a place, less those with what lies outside."""
    before, after = (kernel - 1) // 2, kernel // 2
    return size * kernel - sum(max(0, b - place) for b in (before, after) for place in range(min(b, size)))


def vae(config: VAEConfig, clips: int, frames: int, height: int, width: int) -> list[Product]:
    """Products of encoding and decoding clips of one size, in parts 'encoder' and 'decoder'."""
    t, h, w, _ = config.latent_shape(frames, height, width)
    _, kh, kw = config.kernel
    frames, below = t * config.stride[0], 3
    encoder: list[Product] = []
    decoder: list[Product] = []
    for level, (fold, size, blocks) in enumerate(zip(config.folds, config.widths, config.blocks, strict=True)):
        frames, height, width = frames // fold[0], height // fold[1], width // fold[2]
        cells = clips * frames * height * width
        ends = cells * 2 * math.prod(fold) * below * size
        encoder.append(Product("encoder", ends, gradients=2 if level else 1))
        decoder.append(Product("decoder", ends))
        spatial = clips * frames * taps(height, kh) * taps(width, kw)
        for part, products, kt in (
            ("encoder", encoder, config.encoder_frames),
            ("decoder", decoder, config.kernel[0]),
        ):
            # A block's last convolution is added to its input: no gradient needs its result again.
            products.append(Product(part, blocks * 2 * spatial * size * size, recomputed=int(config.remat)))
            products.append(Product(part, blocks * 2 * cells * kt * size * size))
        below = size
    latents = clips * t * h * w
    encoder.append(Product("encoder", latents * 2 * config.widths[-1] * 2 * config.channels))
    decoder.append(Product("decoder", latents * 2 * config.widths[-1] * config.channels))
    return encoder + decoder


def encoding(config: VAEConfig, shapes: Iterable[Sequence[int]]) -> float:
    """FLOPs of encoding clips, given the shapes (t, h, w) of their latents."""
    total = 0.0
    for (t, *cells), clips in collections.Counter(map(tuple, shapes)).items():
        height, width = (count * stride for count, stride in zip(cells, config.stride[1:], strict=True))
        products = vae(config, clips, 1 + (t - 1) * config.stride[0], height, width)
        total += sum(each.flops for each in products if each.part == "encoder")
    return total


def vae_step(config: VAEConfig, settings: VAETrainConfig) -> Step:
    """A training step on crops, decoded at half their size too where settings ask for it."""
    frames, height, width = settings.crop
    products = vae(config, settings.batch, frames, height, width)
    if settings.half_size_weight:
        halves = vae(config, settings.batch, frames, height // 2, width // 2)
        products += [each for each in halves if each.part == "decoder"]
    return Step(tuple(products))


def captioner_step(config: CaptionerConfig, packing: PackConfig) -> Step:
    """A training step on packed rows."""
    return Step(tuple(captioner(config, packing.rows, packing.row_tokens, packing.row_text)))


def dit_step(
    config: DiTConfig, packing: PackConfig, pairs: float | None = None, text_pairs: float | None = None
) -> Step:
    """A training step on packed rows; pairs and text_pairs as for dit."""
    sizes = packing.rows, packing.row_tokens, packing.row_slots, packing.row_text
    return Step(tuple(dit(config, *sizes, pairs, text_pairs)))


def sampling(
    config: DiTConfig,
    packing: PackConfig,
    settings: SamplerConfig,
    pairs: float | None = None,
    text_pairs: float | None = None,
) -> float:
    """FLOPs of denoising rows of requests from beginning to end; pairs and text_pairs as for dit."""
    sizes = packing.rows, packing.row_tokens, packing.row_slots, packing.row_text
    return settings.evaluations * Step(tuple(dit(config, *sizes, pairs, text_pairs))).forward


def scaled(run: DiTRun) -> DiTRun:
    """The run whose training steps cost compute.multiplier times its base; its steps follow, and its model if it may grow.

    The result states its own cost as its budget, so that scaling it again changes nothing. Its schedule is that of its own
    steps: a run of 1x is a finished run, not the beginning of a longer one. Raises ConfigError for a budget that is not met
    within 1 %, as when it buys too few steps.
    """
    settings = run.compute
    base = dit_step(run.dit, run.pack).total
    budget = settings.multiplier * (settings.budget or run.loop.steps * base)
    growth = {"steps": 0.0, "model": 1.0, "frontier": settings.exponent}[settings.along]
    model = run.dit if settings.multiplier == 1 or not growth else grown(run, settings.multiplier**growth)
    cost = dit_step(model, run.pack).total
    steps = round(budget / cost)
    if steps < 1 or abs(steps * cost / budget - 1) > 0.01:
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs is {budget / cost:.3g} steps of a model of width {model.width} and "
            f"{model.blocks} blocks; raise compute.budget or compute.multiplier"
        )
    settings = ComputeConfig(budget, 1.0, settings.along, settings.exponent)
    return dataclasses.replace(run, dit=model, loop=dataclasses.replace(run.loop, steps=steps), compute=settings)


def grown(run: DiTRun, factor: float) -> DiTConfig:
    """The model whose step costs `factor` times that of run.dit: wider and deeper in proportion, with heads of the same size.

    Of a model of fewer than four heads a width of whole heads would be too coarse; it grows by a quarter of itself or less, and
    the size of its heads varies a little.
    """
    model, base = run.dit, dit_step(run.dit, run.pack).total
    head = model.width // model.heads
    step = head
    if model.heads < WIDTH_STEPS:
        finest = [size for size in range(2, model.width // WIDTH_STEPS + 1, 2) if model.width % size == 0]
        step = max(finest, default=head)

    def distance(candidate: DiTConfig) -> float:
        shape = (candidate.blocks / model.blocks) / (candidate.width / model.width)
        cost = dit_step(candidate, run.pack).total / base / factor
        return abs(math.log(cost)) + 0.25 * abs(math.log(shape))

    most = min(math.ceil(4 * max(1.0, factor)) * model.width, MOST_WIDTH + 1)
    candidates = []
    for width in range(step, most, step):
        heads = heads_of(width, head)
        if heads is None:
            continue
        near = model.blocks * width / model.width
        blocks = range(max(1, math.ceil(near - 2)), min(math.floor(near + 2), MOST_BLOCKS) + 1)
        candidates += [dataclasses.replace(model, width=width, heads=heads, blocks=number) for number in blocks]
    return min(candidates, key=distance)


def heads_of(width: int, head: int) -> int | None:
    """Into how many heads of nearly the size `head` a width goes; None if into none within half more or a third less."""
    sizes = [size for size in range(SMALLEST_HEAD, width + 1, 2) if width % size == 0]
    nearest = min(sizes, key=lambda size: abs(math.log(size / head)), default=None)
    return None if nearest is None or not 2 / 3 < nearest / head < 3 / 2 else width // nearest
