"""What a packed row costs, by the tool that times it."""

import argparse
import importlib.util
from pathlib import Path

TOOL = Path(__file__).parent.parent / "tools" / "bench_attention.py"


def test_a_row_of_eight_clips_takes_a_third_of_the_dense_time_at_most():
    """0.04 was measured, 0.125 of the pairs are within clips. The fastest round is the one that neighbours kept waiting least."""
    spec = importlib.util.spec_from_file_location("bench_attention", TOOL)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.measure(argparse.Namespace(heads=1, clips=8, rounds=5), 4096)
    (dense, of_dense), (skipping, of_skipping) = found["dense"], found["skipping"]
    assert min(skipping) <= 0.35 * min(dense) and of_skipping <= 0.35 * of_dense
