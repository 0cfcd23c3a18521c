#!/usr/bin/env python3
"""A training step of DiT-S on packed rows, ours and the same model in PyTorch, measured in alternation on this machine.

python tools/bench_step.py                  # 4 x 256, 2 x 1024 and 1 x 4096 tokens, 8 clips a row
python tools/bench_step.py --shapes=2x1024 --rounds=9

Each contender has a process of its own that waits for its turn; a turn is two steps, of which the second counts. Medians are shown,
as tokens/s and as GFLOP/s within clips beside those of the fastest matrix product, of 2048^3, that its own library makes here.
PyTorch gets its fused attention with a mask of which tokens share a clip, autocast, and with --compile torch.compile, which needs a
C++ compiler. Needs torch: pip install torch==2.13.0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH, BLOCKS, HEADS, PATCH_DIM, TEXT_WIDTH, TEXT = 384, 12, 6, 64, 384, 16
CLIPS = 8  # a row
CONTENDERS = ("jax f32", "jax bf16", "torch f32", "torch bf16")
MATMUL = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_of,
        default=["4x256", "2x1024", "1x4096"],
        metavar="ROWSxTOKENS",
        help=f"rows of tokens, {CLIPS} clips a row (default: 4x256 2x1024 1x4096)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="steps of each that count (default: %(default)s)"
    )
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--attention", default="auto", help="our backend of attention (default: %(default)s)")
    parser.add_argument("--remat", default="dots", help="our remat policy (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for PyTorch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    found = {}
    for shape in arguments.shapes:
        found[shape] = measure(arguments, shape)
        print(table(shape, found[shape]), flush=True)  # each takes minutes
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def shape_of(text: str) -> str:
    """ROWSxTOKENS as it is. Raises ArgumentTypeError."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None or int(found[2]) % CLIPS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ROWSxTOKENS with a multiple of {CLIPS} tokens, such as 2x1024"
        )
    return text


# The judge -----------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, shape: str) -> dict[str, dict[str, float]]:
    """By contender: median seconds of a step, its losses' first, and FLOP/s of its library's matrix product."""
    # Threads that wait must not spin while another works.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "PYTHONPATH": str(ROOT)}
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    workers, about = {}, {}
    for name in arguments.contenders:
        command = [sys.executable, __file__, f"--worker={name}", f"--shapes={shape}", f"--remat={arguments.remat}"]
        command += [f"--attention={arguments.attention}"] + ["--compile"] * arguments.compile
        workers[name] = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        # Compiled and warm, before the next one begins to.
        told = workers[name].stdout.readline()
        if not told:
            for worker in workers.values():
                worker.kill()
                worker.communicate()
            sys.exit(
                f"bench_step.py: {name} ended before its first step, for the reason above; or leave it out: --contenders"
            )
        about[name] = json.loads(told)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {
        name: about[name] | {"seconds": statistics.median(seconds[name]), "fastest": min(seconds[name])}
        for name in workers
    }


def table(shape: str, results: dict[str, dict[str, float]]) -> str:
    rows, tokens = map(int, shape.split("x"))
    useful, dense = flops(rows, tokens)
    peers = [name for name in results if name.startswith("torch")]
    lines = [
        f"{shape} tokens, {CLIPS} clips a row; a step is {useful / 1e9:.0f} GFLOP within clips, {dense / 1e9:.0f} dense",
        f"{'':>12}{'s a step':>10}{'tokens/s':>10}"
        + "".join(f"{f'x {name}':>14}" for name in peers)
        + f"{'GFLOP/s':>9}{'matmul':>9}{'share':>8}{'first loss':>12}",
    ]
    for name, each in results.items():
        speed = useful / each["seconds"]
        lines.append(
            f"{name:>12}{each['seconds']:>10.3f}{rows * tokens / each['seconds']:>10.0f}"
            + "".join(f"{results[peer]['seconds'] / each['seconds']:>14.2f}" for peer in peers)
            + f"{speed / 1e9:>9.1f}{each['matmul'] / 1e9:>9.1f}{speed / each['matmul']:>8.1%}{each['loss']:>12.5f}"
        )
    return "\n".join(lines)


def flops(rows: int, tokens: int) -> tuple[float, float]:
    """Of a step, with attention within clips alone and with all pairs of a row."""
    sys.path.insert(0, str(ROOT))
    from sora_jax import compute
    from sora_jax.data import pack

    model, packing = ours(), pack.PackConfig(rows, tokens, CLIPS, CLIPS * TEXT, window=8)
    useful = compute.dit_step(model, packing, rows * tokens**2 / CLIPS, rows * tokens * TEXT)
    return useful.useful, compute.dit_step(model, packing).total


# The contenders ------------------------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    library, dtype = arguments.worker.split()
    rows, tokens = map(int, arguments.shapes[0].split("x"))
    make = {"jax": jax_step, "torch": torch_step}[library]
    step, speed = make(arguments, {"f32": "float32", "bf16": "bfloat16"}[dtype], rows, tokens)
    loss = step()
    step()
    print(json.dumps({"loss": loss, "matmul": speed}), flush=True)
    for _ in sys.stdin:
        # The first step after another process has given memory back gets it slowly, which in training no step has to.
        step()
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


def arrays(rows: int, tokens: int) -> dict[str, Any]:
    """The same rows for all: 8 equal clips each, their captions, positions, and times."""
    import numpy as np

    rng = np.random.default_rng(0)
    segment = np.tile(np.repeat(np.arange(1, CLIPS + 1), tokens // CLIPS), (rows, 1)).astype(np.int32)
    return {
        "noisy": rng.standard_normal((rows, tokens, PATCH_DIM)).astype(np.float32),
        "target": rng.standard_normal((rows, tokens, PATCH_DIM)).astype(np.float32),
        "segment": segment,
        "position": rng.uniform(0, 60, (rows, tokens, 3)).astype(np.float32),
        "time": rng.uniform(0, 1, (rows, CLIPS)).astype(np.float32),
        "extent": np.full((rows, CLIPS, 3), 32.0, np.float32),
        "text": rng.standard_normal((rows, CLIPS * TEXT, TEXT_WIDTH)).astype(np.float32),
        "text_segment": np.tile(np.repeat(np.arange(1, CLIPS + 1), TEXT), (rows, 1)).astype(np.int32),
        "slot_segment": np.tile(np.arange(1, CLIPS + 1), (rows, 1)).astype(np.int32),
    }


def ours(dtype: str = "float32", attention: str = "auto", remat: str = "none") -> Any:
    from sora_jax.models import dit

    return dit.DiTConfig(
        width=WIDTH, blocks=BLOCKS, heads=HEADS, channels=PATCH_DIM, text_width=TEXT_WIDTH, dtype=dtype,
        attention=attention, remat=remat,
    )  # fmt: skip


def weights() -> Any:
    """The same starting weights for both, with last maps that are not zero."""
    import jax
    from flax import nnx

    from sora_jax.models import dit

    params = nnx.to_pure_dict(nnx.state(dit.DiT(ours(), nnx.Rngs(0)), nnx.Param))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)


def jax_step(arguments: argparse.Namespace, dtype: str, rows: int, tokens: int) -> tuple[Any, float]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from sora_jax.models import dit
    from sora_jax.structs import Layout

    data = {name: jnp.asarray(x) for name, x in arrays(rows, tokens).items()}
    config = ours(dtype, arguments.attention, arguments.remat)
    graphdef = nnx.split(nnx.eval_shape(lambda: dit.DiT(config, nnx.Rngs(0))), nnx.Param)[0]
    layout = Layout(
        segment_BN=data["segment"],
        slot_BN=data["segment"] - 1,
        position_BN3=data["position"],
        slot_segment_BS=data["slot_segment"],
        extent_BS3=data["extent"],
        text_segment_BL=data["text_segment"],
        text_BLM=data["text"],
    )
    tx = optax.adamw(1e-4)

    def step(state: Any) -> Any:
        params, opt_state = state

        def loss(params: Any) -> Any:
            out = nnx.merge(graphdef, params)(data["noisy"], data["time"], layout)
            return jnp.mean(jnp.square(out - data["target"]))

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    params = weights()
    holder = [(params, tx.init(params))]
    run = jax.jit(step, donate_argnums=0)

    def once() -> float:
        holder[0], value = run(holder[0])
        jax.block_until_ready(holder[0])
        return float(value)

    x = jnp.ones((MATMUL, MATMUL), dtype)
    multiply = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    multiply(x).block_until_ready()
    return once, matmul(lambda: multiply(x).block_until_ready())


def torch_step(arguments: argparse.Namespace, dtype: str, rows: int, tokens: int) -> tuple[Any, float]:
    import contextlib

    import numpy as np
    import torch

    data = {name: torch.from_numpy(x) for name, x in arrays(rows, tokens).items()}
    params = leaves(weights())
    tensors = {name: torch.nn.Parameter(torch.from_numpy(np.array(x))) for name, x in params.items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-4, fused=True)
    forward = torch.compile(torch_dit) if arguments.compile else torch_dit
    auto = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        with auto:
            out = forward(tensors, data)
        loss = (out.float() - data["target"]).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    x = torch.ones(MATMUL, MATMUL, dtype=getattr(torch, dtype))
    return once, matmul(lambda: x @ x)


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + str(name): value}
    return found


def torch_dit(p: dict[str, Any], data: dict[str, Any]) -> Any:
    """models/dit.py written in PyTorch."""
    import torch
    import torch.nn.functional as F

    def linear(name: str, x: Any, block: int | None = None) -> Any:
        kernel, bias = (
            p[f"{name}.{part}"] if block is None else p[f"{name}.{part}"][block] for part in ("kernel", "bias")
        )
        return F.linear(x, kernel.t(), bias)

    def fourier(x: Any, short: float, long: float, count: int) -> Any:
        ratio = torch.arange(count) / (count - 1)
        angle = x[..., None] * (2 * torch.pi / (short * (long / short) ** ratio))
        return torch.cat([angle.cos(), angle.sin()], -1)

    def axis_features(x: Any) -> Any:
        return torch.cat([fourier(x[..., a], short, 2 * long, 8) for a, (short, long) in enumerate(wavelengths)], -1)

    def norm(x: Any) -> Any:
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)

    def rms(name: str, x: Any, block: int) -> Any:
        return F.rms_norm(x.float(), x.shape[-1:], p[name][block], eps=1e-6)

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def rotate(x: Any) -> Any:
        one, two = x.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        kind = v.dtype
        return F.scaled_dot_product_attention(q.to(kind), k.to(kind), v, attn_mask=mask).transpose(1, 2).flatten(2)

    from sora_jax.nn import rope

    wavelengths = ours().wavelengths
    segment, text_segment, slot = data["segment"], data["text_segment"], data["segment"].long() - 1
    own = segment[:, None, :, None] == segment[:, None, None, :]
    told = segment[:, None, :, None] == text_segment[:, None, None, :]
    belongs = (data["slot_segment"][:, :, None] == text_segment[:, None, :]).float()
    pooled = belongs @ data["text"] / belongs.sum(-1, keepdim=True)
    angle = data["position"] @ torch.from_numpy(rope.frequencies(WIDTH // HEADS, wavelengths)).T
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    time = linear("time_out", F.silu(linear("time_in", fourier(data["time"], 0.02, 4.0, 32))))
    condition = F.silu(time + linear("extent_in", axis_features(data["extent"])) + linear("pooled_in", pooled))
    text = norm(linear("text_in", data["text"]))
    x = linear("patch_in", data["noisy"]) + linear("position_in", axis_features(data["position"]))

    def modulation(name: str, count: int, block: int | None = None) -> Any:
        slots = linear(name, condition, block)
        return torch.gather(slots, 1, slot[..., None].expand(-1, -1, slots.shape[-1])).chunk(count, -1)

    for b in range(BLOCKS):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation("blocks.modulation", 6, b)
        h = norm(x) * (1 + scale1) + shift1
        qkv = linear("blocks.attention.qkv", h, b).unflatten(-1, (HEADS, 3, -1))
        q, k, v = (qkv[..., i, :].transpose(1, 2) for i in range(3))
        q, k = rotate(rms("blocks.attention.q_norm.scale", q, b)), rotate(rms("blocks.attention.k_norm.scale", k, b))
        x = x + gate1 * linear("blocks.attention.out", attend(q, k, v, own), b)
        q = rms("blocks.cross.q_norm.scale", heads(linear("blocks.cross.q", norm(x), b)), b)
        kv = linear("blocks.cross.kv", text, b).unflatten(-1, (HEADS, 2, -1))
        k, v = rms("blocks.cross.k_norm.scale", kv[..., 0, :].transpose(1, 2), b), kv[..., 1, :].transpose(1, 2)
        x = x + linear("blocks.cross.out", attend(q, k, v, told), b)
        h = norm(x) * (1 + scale2) + shift2
        up = F.gelu(linear("blocks.mlp.up", h, b), approximate="tanh")
        x = x + gate2 * linear("blocks.mlp.down", up, b)
    shift, scale = modulation("modulation", 2)
    return linear("patch_out", norm(x) * (1 + scale) + shift)


def matmul(once: Any) -> float:
    """FLOP/s of the best of a few."""
    once()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - began)
    return 2 * MATMUL**3 / best


if __name__ == "__main__":
    main()
