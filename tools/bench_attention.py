#!/usr/bin/env python3
"""Attention of a packed row, forward and backward: all pairs at once, in blocks, and in blocks that skip other clips.

python tools/bench_attention.py                       # rows of 8 equal clips, 1k to 16k tokens
python tools/bench_attention.py --tokens 4096 --clips 16

Measured in alternation on this machine; medians are shown, their share of the dense time, and the memory that XLA counts for
temporaries. "dense" is the reference of nn/attention.py, "one clip" the blockwise backend on a row without anything to skip.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from sora_jax.nn import attention as attention_module  # noqa: E402
from sora_jax.nn.blockwise import blockwise  # noqa: E402

# Beyond this the logits of all pairs, forward and backward, are many GiB.
MOST_DENSE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], metavar="N", help="of a row")
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="equal clips of a row (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=6, metavar="N", help="of 64 features (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="that count (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    arguments = parser.parse_args()
    found = {tokens: measure(arguments, tokens) for tokens in arguments.tokens}
    for tokens, each in found.items():
        print(f"{tokens} tokens, {arguments.clips} clips, forward and backward")
        medians = {name: statistics.median(seconds) for name, (seconds, _) in each.items()}
        for name, (_, size) in each.items():
            share = f"{medians[name] / medians['dense']:8.2f} of dense" if "dense" in each else ""
            print(f"  {name:<10}{1e3 * medians[name]:10.1f} ms{size / 2**20:10.1f} MiB{share}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(arguments: argparse.Namespace, tokens: int) -> dict[str, tuple[list[float], int]]:
    """(seconds of every round, bytes of temporaries) by name."""
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal((1, tokens, arguments.heads, 64)), jnp.float32) for _ in range(3)]
    clips = jnp.asarray(np.arange(tokens)[None] * arguments.clips // tokens + 1, jnp.int32)
    ones = jnp.ones_like(clips)

    def gradient(attend: Any) -> Any:
        return jax.jit(jax.grad(lambda x, segment: jnp.sum(jnp.square(attend(*x, segment, segment))), argnums=0))

    skipping, dense = (
        gradient(lambda *x: blockwise(*x)[0]),
        gradient(lambda *x: attention_module.reference(*x)),
    )
    contenders = {"dense": (dense, clips), "one clip": (skipping, ones), "skipping": (skipping, clips)}
    if tokens > MOST_DENSE:
        del contenders["dense"]
    sizes = {
        name: function.lower(inputs, segment).compile().memory_analysis().temp_size_in_bytes
        for name, (function, segment) in contenders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(arguments.rounds + 1):
        for name, (function, segment) in contenders.items():
            began = time.perf_counter()
            jax.block_until_ready(function(inputs, segment))
            if number:  # the first is for warming up
                seconds[name].append(time.perf_counter() - began)
    return {name: (seconds[name], sizes[name]) for name in contenders}


if __name__ == "__main__":
    main()
