"""A plan tells what the compiled step needs, and refuses what could never work before anything is compiled."""

import argparse
import dataclasses
import functools
import json
import math
import re
import shlex
import types
from pathlib import Path

import captioner as captioner_experiment
import dit as dit_experiment
import jax
import numpy as np
import pytest
import quickstart
from flax import nnx

from sora_jax import config, hlo, main, sharding
from sora_jax.cli import configs
from sora_jax.data.pack import PackConfig
from sora_jax.generate import pipeline
from sora_jax.models import dit as dit_model
from sora_jax.models import vae as vae_model
from sora_jax.plan import kernels, packing, page, roofline, search, step, text, topology
from sora_jax.train import dit


@pytest.fixture(scope="module")
def network():
    return config.from_config_dict(quickstart.get_config("vae")).vae


FSDP = sharding.MeshConfig(data=2, fsdp=4)
# A chip that is not there.
TPU = types.SimpleNamespace(platform="tpu")
PLANS = Path(__file__).parent.parent / "experiments" / "results" / "plans"


def resolved(mesh=FSDP, **changes):
    run = config.from_config_dict(quickstart.get_config("dit"))
    run = dataclasses.replace(
        run,
        text=dataclasses.replace(run.text, encoder="scratch"),
        dit=dataclasses.replace(run.dit, width=32, blocks=3, heads=2, **changes),
        pack=dataclasses.replace(run.pack, rows=8),
        # Muon turns whole stacks of matrices at once.
        optimizer=dataclasses.replace(run.optimizer, name="adamw"),
        # The loss then asks the VAE how large its channels are.
        flow=dataclasses.replace(run.flow, emphasis=1.0),
        mesh=mesh,
    )
    return dit.resolve(run)


@pytest.fixture(scope="module")
def target():
    return topology.target("cpu:8")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """What several tests ask for is compiled once: a program does not depend on the chip whose peaks it is held against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "lower_step", functools.cache(step.lower_step))
        patch.setattr(roofline, "lower_sampler", functools.cache(step.lower_sampler))
        yield


def test_a_shape_of_cpus_is_their_product():
    assert len(topology.target("cpu:2x4").devices) == 8


@pytest.fixture(scope="module")
def numbers(network, target):
    return roofline.plan(resolved(), network, target)


def test_memory_of_a_device_is_the_compilers_and_its_kinds_add_up(numbers, network):
    memory = numbers["memory"]
    assert sum(size for kind, size in memory.items() if kind != "total") == memory["total"]
    # Kernels are split over fsdp, vectors are not.
    whole = 4 * numbers["model"]["parameters"]
    assert whole / 4 < memory["parameters"] < whole and memory["ema"] == memory["parameters"]
    assert min(memory.values()) > 0
    vae = jax.eval_shape(lambda: vae_model.split(vae_model.VAE(network, nnx.Rngs(0)))[1:])
    assert memory["vae"] == sum(4 * leaf.size for leaf in jax.tree.leaves(vae))  # whole on every device


def test_what_blocks_keep_is_told_apart(network, target, numbers):
    frugal = roofline.plan(resolved(remat="full"), network, target)
    run = resolved()
    tokens = run.pack.rows * run.pack.row_tokens / 8
    # With full recomputation a block keeps its input alone.
    assert frugal["memory"]["activations"] == pytest.approx(tokens * run.dit.width * 4 * run.dit.blocks, rel=0.01)
    assert numbers["memory"]["activations"] > 4 * frugal["memory"]["activations"]


# Mesh -> what its table of shardings asks for: weights of fsdp are gathered, products over a split width are summed, keys of split
# tokens go round, gradients are summed. What else is sent XLA's partitioner decides, another in each version.
COLLECTIVES = {
    (8, 1, 1, 1): {"all-reduce": {"data"}},
    (2, 4, 1, 1): {"all-gather": {"fsdp"}, "all-reduce": {"fsdp", "data"}},
    (2, 2, 2, 1): {"all-gather": {"fsdp"}, "all-reduce": {"fsdp", "tensor", "data"}},
    (1, 2, 1, 4): {
        "all-gather": {"fsdp"},
        "all-reduce": {"fsdp", "sequence"},
        "collective-permute": {"sequence"},
    },
}


def of_mesh(sizes):
    """Rows as short as these meet their keys at once; rings are asked for."""
    return resolved(sharding.MeshConfig(*sizes), attention="blockwise" if sizes[3] > 1 else "auto")


@pytest.mark.parametrize("sizes", COLLECTIVES)
def test_collectives_are_those_of_the_mesh(network, target, sizes):
    run = of_mesh(sizes)
    numbers = roofline.plan(run, network, target)
    found = {(each["kind"], each["axes"]) for each in numbers["collectives"]}
    assert {(kind, axes) for kind, over in COLLECTIVES[sizes].items() for axes in over} <= found
    split = {axis for axis, size in numbers["mesh"].items() if size > 1}
    assert {axis for _, axes in found for axis in axes.split("+")} == split
    # Who has weights whole sends sums alone.
    assert split != {"data"} or {kind for kind, _ in found} == {"all-reduce"}
    # Gradients of blocks are summed over all devices that have other rows or other tokens, each its part of the weights.
    part = 4 * search.WEIGHTS * run.dit.width**2 * run.dit.blocks / (run.mesh.fsdp * run.mesh.tensor)
    for axis in ("data", "fsdp", "sequence"):
        count = getattr(run.mesh, axis)
        summed = sum(
            each["bytes"]
            for each in numbers["collectives"]
            if each["kind"] == "all-reduce" and axis in each["axes"].split("+") and each["devices"] >= count
        )
        assert count == 1 or summed > part, axis


def program_of(run, network, target):
    """The compiled step of a run, as text that is read; its weights and its mesh."""
    mesh = sharding.make_mesh(run.mesh, target.devices)
    made = roofline.lower_step(run, network, mesh)
    return hlo.Program(made.program.as_text()), made.weights, mesh


def test_in_a_ring_a_device_sends_its_keys_on_and_no_row_is_whole(network, target):
    """Keys and values n - 1 times forward, and with their gradients n times backward, in each block."""
    n = 4
    run = of_mesh((1, 2, 1, n))
    program, _, mesh = program_of(run, network, target)
    found = program.collectives(mesh.shape)
    row = 4 * run.pack.rows // 2 * run.pack.row_tokens * run.dit.width  # of one device's rows, all tokens
    sent = [each.times for each in found if each.kind == "collective-permute" and each.axes == "sequence"
            and each.bytes == row // n]  # fmt: skip
    assert sorted(sent) == sorted(run.dit.blocks * times for times in (n - 1, n - 1, n, n, n, n))
    assert not any(each.kind == "all-gather" and each.bytes == row for each in found)


@pytest.mark.parametrize("sizes", [sizes for sizes in COLLECTIVES if sizes[1] > 1])
def test_no_weights_are_gathered_before_their_block_needs_them(network, target, sizes):
    """In the compiled step no stacked weight of all blocks is whole on a device: only one block's at a time."""
    run = of_mesh(sizes)
    program, weights, _ = program_of(run, network, target)
    stacks = jax.tree.leaves((weights["blocks"], weights["text"]["blocks"]))
    # Whole, or the part of a mesh that splits inputs or outputs over tensor too.
    n = run.mesh.tensor
    stacked = {
        (L, *size)
        for L, a, b in (x.shape for x in stacks if x.ndim == 3)
        for size in ((a, b), (a // n, b), (a, b // n))
    }
    gathered = [
        (shape, program.runs[name])
        for name in program.runs
        for each in program.computations[name].instructions.values()
        if each.kind.startswith("all-gather")
        for _, shape in hlo.arrays(each.type)
    ]
    assert stacked and not stacked & {shape for shape, _ in gathered}
    assert [each for each in gathered if each[1] == run.dit.blocks]


def test_what_cannot_work_is_refused_before_it_is_compiled(network, target, monkeypatch):
    monkeypatch.setattr(roofline, "lower_step", None)
    run = resolved()
    short = dataclasses.replace(run, pack=dataclasses.replace(run.pack, row_tokens=60))
    with pytest.raises(config.ConfigError, match=r"longest clip has 120 tokens .* raise pack\.row_tokens \(60\)"):
        roofline.plan(short, network, target)
    few = dataclasses.replace(run, data=dataclasses.replace(run.data, train_clips=8))
    with pytest.raises(config.ConfigError, match="less than a batch of 8"):
        roofline.plan(few, network, target)
    with pytest.raises(ValueError, match="product is 8"):
        roofline.plan(dataclasses.replace(run, mesh=sharding.MeshConfig(5)), network, target)
    odd = dataclasses.replace(run, pack=dataclasses.replace(run.pack, rows=6))
    with pytest.raises(ValueError, match="6 rows do not divide over 8 devices"):
        roofline.plan(odd, network, target)
    wide = dataclasses.replace(run, mesh=sharding.MeshConfig(1, 1, 8))
    for plan in (roofline.plan, roofline.plan_sampler):
        with pytest.raises(ValueError, match="heads do not divide over 8 devices"):
            plan(wide, network, target)
    packing = dataclasses.replace(run.pack, row_tokens=run.pack.row_tokens + 2)
    with pytest.raises(ValueError, match="tokens do not divide over 4 devices"):
        roofline.plan(dataclasses.replace(of_mesh((1, 2, 1, 4)), pack=packing), network, target)


def test_tokens_that_are_dropped_are_not_in_a_plan(network):
    run = resolved()
    half = dataclasses.replace(run, pack=dataclasses.replace(run.pack, drop_rate=0.5))
    whole, dropped = (packing.packed(each, network) for each in (run, half))
    # A quarter on average: a third more clips in the same rows, with fewer pairs each.
    assert dropped.clips_per_step == pytest.approx(whole.clips_per_step / 0.75, rel=0.1)
    assert dropped.pairs < 0.9 * whole.pairs


def test_unknown_topologies_are_told():
    for name in ("v9:2x2", "v5e", "v5e:twoxfour", "cpu:", "cpu:0", "v5e:0x4"):
        with pytest.raises(config.ConfigError, match="none of v4, v5e"):
            topology.target(name)
    for name in ("v5e:8", "v5e:2x4x2", "v5p:4x4"):
        with pytest.raises(config.ConfigError, match=f"joined along {3 if 'p' in name else 2} axes; say v5"):
            topology.target(name)
    with pytest.raises(config.ConfigError, match="JAX_NUM_CPU_DEVICES=4096"):
        topology.target("cpu:64x64")


REFUSALS = {  # as TPUs have been seen to say it, and GPUs; and the total beside 0.5 GiB of inputs
    "Ran out of memory on HBM, the total memory required for HLO temporaries (50.00G) exceeds available HBM (15.75G).": 50.5,
    "Ran out of memory in memory space hbm. Used 50.50G of 31.25G hbm. Exceeded hbm capacity by 19.25G.": 50.5,
    "Out of memory while trying to allocate 34359738368 bytes.": None,
}


@pytest.mark.parametrize(
    "said", ["RESOURCE_EXHAUSTED: memory space vmem. Used 20.5M of 16.0M", "INTERNAL: a bug\nmore"]
)
def test_what_a_compiler_refuses_for_another_reason_is_said(network, target, monkeypatch, said):
    """Of a kernel that wants more of a chip's small memory than there is nothing follows for the large one."""

    def refuse(_):
        raise jax.errors.JaxRuntimeError(said)

    # A copy, which was not compiled before.
    lower = roofline.lower_step
    monkeypatch.setattr(roofline, "lower_step", lambda *asked: dataclasses.replace(lower(*asked)))
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(config.ConfigError, match=f"refuses it: {re.escape(said.splitlines()[0])}$"):
        roofline.plan(resolved(), network, target)


@pytest.mark.parametrize("message", REFUSALS, ids=("temporaries", "all", "nothing"))
@pytest.mark.parametrize("what", ["step", "sampler"])
def test_what_is_too_large_is_a_verdict_with_its_memory_by_kind(network, target, monkeypatch, what, message):
    name = f"lower_{what}"
    lower, plan = getattr(roofline, name), {"step": roofline.plan, "sampler": roofline.plan_sampler}[what]
    chip = dataclasses.replace(target, chip=topology.CHIPS["v6e"])
    fits = plan(resolved(), network, chip)["memory"]

    def too_large(*asked):
        made = lower(*asked)
        sizes = made.bytes | {"batch": 2**29 - sum(made.bytes.values()) + made.bytes["batch"]}
        return dataclasses.replace(made, bytes=sizes)

    def refuse(_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(roofline, name, too_large)
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    numbers = plan(resolved(), network, chip)
    memory, total = numbers["memory"], REFUSALS[message]
    known = [kind for kind in fits if kind not in ("activations", "temporaries", "total")]
    assert {kind: memory[kind] for kind in known if kind != "batch"} == {
        kind: fits[kind] for kind in known if kind != "batch"
    }
    told, shown = text.table(numbers), page.page(numbers, f"sora-jax plan --{what}")
    assert not numbers["verdict"]["fits"] and "DOES NOT FIT" in told and "Does not fit" in shown
    assert "parameters" in told and all(f"</span> {kind}</td>" in shown for kind in known)
    if total is None:
        assert set(memory) == set(known) and "beside what the compiler did not tell" in told
        assert numbers["verdict"]["why"][0] == f"the {what} does not fit the memory of a chip"
    else:
        assert memory["total"] == pytest.approx(total * topology.GIB, abs=2**20)
        assert memory["temporaries"] == pytest.approx(50 * topology.GIB, abs=2**20)
        assert numbers["verdict"]["why"][0] == f"the {what} needs 50.5 of 31.25 GiB a chip"
        assert "Memory of a chip: 50.5 of 31 GiB" in shown


@dataclasses.dataclass(frozen=True)
class At:
    """As much of a device as a torus asks for."""

    coords: tuple[int, ...]


@pytest.mark.parametrize(
    ("torus", "sizes", "rates"),
    [
        # Two lines: along one of them one way, and along both at once.
        ((2, 4), (2, 4), {"data": 1, "fsdp": 1, "data+fsdp": 2}),
        ((2, 4), (1, 8), {"fsdp": 2}),
        ((8, 16), (8, 16), {"data": 1, "fsdp": 2}),
        # Cubes are rings all round, and what is less is not.
        ((4, 4, 8), (8, 16), {"data": 2, "fsdp": 4}),
        ((2, 2, 1), (2, 2), {"data": 1, "fsdp": 1}),
        # Of a ring of 16 a fourth is a line.
        ((8, 8, 16), (16, 64), {"data": 2, "fsdp": 4}),
        ((8, 8, 16), (256, 4), {"fsdp": 1}),
    ],
)
def test_what_a_chip_sends_goes_along_the_axes_of_its_torus(torus, sizes, rates):
    """In units of one way along one axis. Axes of the mesh go along those of the torus from the last."""
    places = sorted(np.ndindex(torus), key=lambda place: place if len(torus) == 2 else (place[2], place[0], place[1]))
    devices = np.empty(len(places), object)
    devices[:] = [At(place) for place in places]
    devices = devices.reshape(sizes)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"))
    chip = dataclasses.replace(topology.CHIPS["v5p"], link=2.0)
    where = topology.Target("any", devices.ravel().tolist(), chip, torus)
    assert {axes: where.rate(mesh, axes) for axes in rates} == rates
    assert dataclasses.replace(where, torus=()).rate(mesh, "fsdp") == 2


def test_who_sends_past_others_shares_links_with_them():
    chip = dataclasses.replace(topology.CHIPS["v5e"], link=2.0)

    def rates(torus, *rows):
        devices = np.empty((len(rows), len(rows[0])), object)
        devices[:] = [[At(place) for place in row] for row in rows]
        where = topology.Target("any", devices.ravel().tolist(), chip, torus)
        return tuple(where.rate(jax.sharding.Mesh(devices, ("data", "fsdp")), axis) for axis in ("data", "fsdp"))

    # Two squares, each a ring, and of each chip of one its opposite in the other.
    squares = [(0, 0), (1, 0), (0, 1), (1, 1)], [(1, 3), (0, 3), (1, 2), (0, 2)]
    assert rates((2, 4), *squares) == (1 / 3, 2)
    # Every fourth of a ring of eight, and four of it in a row.
    assert rates((8, 4, 4), *([(x, 0, 0), (x + 4, 0, 0)] for x in range(4))) == (1, 1 / 2)


def test_the_environment_says_how_much_of_a_gpu_is_taken(monkeypatch):
    monkeypatch.setattr(topology, "_described", lambda *a, **b: [])
    assert topology.target("h100:1x8").chip.usable == 0.75
    monkeypatch.setenv(topology.FRACTION, "0.9")
    assert topology.target("h100:1x8").chip.usable == 0.9
    monkeypatch.setenv(topology.FRACTION, "most")
    with pytest.raises(config.ConfigError, match="is 'most'; it must be a share"):
        topology.target("h100:1x8")


def test_times_follow_from_peaks(network, target):
    """On a chip twice as fast in everything a step takes half as long; MFU stays."""
    run = resolved()
    slow, fast = (
        roofline.plan(
            run,
            network,
            dataclasses.replace(target, chip=topology.Chip(16, *(times * x for x in (1e12, 1e11, 1e10, 1e9)))),
        )
        for times in (1, 2)
    )
    for one, other in zip(slow["seconds"]["whole"], fast["seconds"]["whole"], strict=True):
        assert one == pytest.approx(2 * other)
    useful, chips = slow["step"]["useful_flops"], slow["chips"]
    assert slow["mfu"][0] == pytest.approx(useful / (chips * 1e12 * slow["seconds"]["whole"][1]))
    assert slow["mfu"] == pytest.approx(fast["mfu"]) and 0 < slow["mfu"][0] <= slow["mfu"][1] <= 1
    assert slow["run"]["flops"] == pytest.approx(run.loop.steps * slow["step"]["flops"])
    told = text.table(slow)
    assert "MFU" in told and "chip-hours" in told and "unknown length" not in told
    dynamic = slow | {"unknown_loops": ["while.1", "while.2"]}
    for words in (text.table(dynamic), page.page(dynamic, "sora-jax plan")):
        assert "2 loops of unknown length are counted once" in words
    shown = page.page(slow, "sora-jax plan --topology=<x>")
    assert "&lt;x&gt;" in shown and "fsdp 4" in shown


def test_a_terminal_is_shown_kernels_and_peaks_with_their_source(network, target):
    chip = topology.CHIPS["v5p"]
    numbers = roofline.plan(resolved(), network, dataclasses.replace(target, chip=chip))
    told = text.table(numbers | {"kernels": {"splash_mha_fwd": 96}}).splitlines()
    assert "kernels: splash_mha_fwd 96 times" in told
    (line,) = [line for line in told if line.startswith("peaks of a chip: 95 GiB, 459 TFLOP/s")]
    assert topology.SOURCE in line
    assert "kernels: none" in text.table(numbers)
    assert topology.SOURCE in page.page(numbers, "") and "Kernels: none" in page.page(numbers, "")


CASES = [
    # platform, tokens and text of a row, heads, mesh.sequence; what attention goes without a kernel, and the remedy
    ("tpu", 8192, 512, 8, 4, {}),
    ("tpu", 8000, 512, 8, 1, {"among a row's tokens": "row_tokens=8064", "to captions": "row_tokens=8064"}),
    ("tpu", 8192, 500, 8, 1, {"to captions": "row_text=512"}),
    ("tpu", 8000, 500, 8, 1, {"among a row's tokens": "8064", "to captions": "row_tokens=8064 and pack.row_text=512"}),
    ("tpu", 8192, 512, 6, 4, {"among a row's tokens": "mesh.sequence=2"}),
    ("cuda", 8192, 512, 8, 1, {}),
    ("cuda", 8190, 500, 8, 4, {}),
    ("cuda", 8190, 500, 6, 4, {"among a row's tokens": "mesh.sequence=2"}),
    ("cpu", 8000, 500, 6, 4, {}),
]


@pytest.mark.parametrize(("platform", "tokens", "words", "heads", "sequence", "expected"), CASES)
def test_what_has_no_kernel_is_told_with_what_gives_it_one(platform, tokens, words, heads, sequence, expected):
    run = resolved()
    model = dataclasses.replace(run.dit, width=96 * heads, heads=heads)
    rows = dataclasses.replace(run.pack, row_tokens=tokens, row_text=words)

    def missing(model, rows, sequence):
        mesh = sharding.abstract_mesh(sharding.MeshConfig(1, sequence=sequence), sequence)
        return kernels.missing(model, rows, mesh, platform)

    found = missing(model, rows, sequence)
    assert len(found) == len(expected)
    for line, (what, remedy) in zip(found, expected.items(), strict=True):
        assert f"attention {what}: " in line and remedy in line
        # What is told to be set is what helps.
        settings = {name: int(value) for name, value in re.findall(r"(\S+)=(\d+)", line)}
        rows_then = dataclasses.replace(
            rows, **{name.split(".")[1]: value for name, value in settings.items() if name.startswith("pack.")}
        )
        then = missing(model, rows_then, settings.get("mesh.sequence", sequence))
        assert not settings or not any(what in other for other in then)


@pytest.mark.parametrize(("platform", "tokens", "words", "heads", "sequence", "expected"), CASES)
def test_a_kernel_that_is_named_is_refused_with_what_makes_it_work(platform, tokens, words, heads, sequence, expected):
    """Where it would have been chosen it is not refused; else its settings, or leaving the choice, help."""
    kernel = kernels.KERNELS.get(platform, kernels.SPLASH).name
    run = resolved()
    model = dataclasses.replace(run.dit, width=96 * heads, heads=heads, attention=kernel)
    rows = dataclasses.replace(run.pack, row_tokens=tokens, row_text=words)

    def refused(rows, sequence):
        mesh = sharding.abstract_mesh(sharding.MeshConfig(1, sequence=sequence), sequence)
        try:
            kernels.refuse("dit", model, rows, mesh, platform)
        except config.ConfigError as error:
            return str(error)

    told = refused(rows, sequence)
    # Rows that do not divide over the mesh are refused by all, and one sentence of it is enough.
    assert bool(told) == bool(expected or tokens % sequence or platform == "cpu")
    if not told:
        return
    assert told.endswith("dit.attention=auto")
    settings = {name: int(value) for name, value in re.findall(r"(\S+)=(\d+)", told)}
    rows = dataclasses.replace(
        rows, **{name.split(".")[1]: value for name, value in settings.items() if name.startswith("pack.")}
    )
    assert bool(refused(rows, settings.get("mesh.sequence", sequence))) == (platform == "cpu")


def test_the_words_of_a_captioner_need_suit_no_kernel():
    run = config.from_config_dict(captioner_experiment.get_config(""))
    model = dataclasses.replace(run.captioner, attention="splash")
    rows, mesh = dataclasses.replace(run.pack, row_tokens=1024), sharding.abstract_mesh(sharding.MeshConfig(1), 1)
    assert rows.row_text % 128
    kernels.refuse("captioner", model, rows, mesh, "tpu")
    with pytest.raises(config.ConfigError, match=r"set pack\.row_tokens=1024, or captioner\.attention=auto"):
        kernels.refuse("captioner", model, dataclasses.replace(rows, row_tokens=1000), mesh, "tpu")


def test_a_plan_whose_attention_has_no_kernel_says_so_in_its_verdict(network, target, monkeypatch):
    """Blocks of attention go in loops as long as the data wants."""
    monkeypatch.setitem(kernels.KERNELS, "cpu", kernels.SPLASH)
    where = dataclasses.replace(target, chip=topology.CHIPS["v5p"])
    numbers = roofline.plan(resolved(attention="blockwise"), network, where)
    assert numbers["unknown_loops"] and numbers["verdict"]["fits"]
    why = numbers["verdict"]["why"]
    assert why[1] == "its time is not known" and "set dit.attention=auto" in why[2]
    told = text.table(numbers)
    assert "MFU at most" in told and "run: at best" in told and "set dit.attention=auto" in told.splitlines()[-1]
    usual = roofline.plan(resolved(), network, where)
    assert "time is not known" not in text.table(usual) and "at most" not in text.table(usual)


def test_a_sampler_keeps_weights_and_its_batch_alone(network, target, numbers):
    made = roofline.plan_sampler(resolved(), network, target)
    assert set(made["memory"]) == {"parameters", "batch", "temporaries", "total"}
    assert made["memory"]["parameters"] == numbers["memory"]["parameters"]
    asked = made["sampling"]
    # Rows are split over all eight devices, each with as many tokens as one alone would take.
    assert asked["videos"] == 8 * (pipeline.BATCH_TOKENS // asked["row_tokens"])
    assert asked["row_tokens"] == 128 and asked["tokens"] == 120
    assert ("all-gather", "fsdp") in {(each["kind"], each["axes"]) for each in made["collectives"]}
    assert "256 videos of 17x48x32 (120 tokens)" in text.table(made)


def test_kernels_work_on_blocks_that_share_a_clip():
    """Of two rows, one of two clips and one of a single clip that fills half of it; words are in one block each."""
    shape = PackConfig(rows=4, row_tokens=2048, row_slots=4, row_text=512, window=8)
    model = dit_model.DiTConfig(width=256, blocks=3, heads=2, channels=8, text_width=16, remat="full")
    rows = packing.segments([[1024, 1024], [1024]], 2048), packing.segments([[200, 200], [200]], 512)
    alone = sharding.abstract_mesh(sharding.MeshConfig(), 1)
    found = kernels.work(model, shape, alone, "tpu", rows)
    # Four rows like these two; 512 x 512 tokens a block.
    self_blocks, text_blocks = 2 * (2 * 2 * 2 + 2 * 2), 2 * (4 + 2)
    assert (found.pairs, found.text_pairs) == (self_blocks * 512**2, text_blocks * 512**2)
    assert found.read_again == (self_blocks + text_blocks) * 4 * 512 * 256 * 2 * 2 * 3
    # Backward two kernels make what they need of the weights each, seven products of all pairs in place of four.
    assert found.more_flops == 3 * 2 * (found.pairs + found.text_pairs) * 256 * 3
    assert kernels.work(model, shape, alone, "tpu", rows, trains=False).more_flops == 0  # sampling
    # What is not run again reads nothing again, and where compute.py counts it again, that is less.
    for remat, products in {"none": 3, "dots": 1, "attention": 1}.items():
        less = kernels.work(dataclasses.replace(model, remat=remat), shape, alone, "tpu", rows)
        assert less[:2] == found[:2] and less.read_again == found.read_again * 3 / 4
        assert less.more_flops == products * 2 * (found.pairs + found.text_pairs) * 256 * 3
    # Of 64 x 64 on a GPU, whose cache has a row's keys; 200 words are met in four blocks, one of them by both clips.
    on_gpu = kernels.work(model, shape, alone, "cuda", rows)
    assert on_gpu[:2] == (2 * 3 * 16**2 * 64**2, 2 * (16 * 4 + 16 * 4 + 16 * 4) * 64**2) and on_gpu.read_again == 0
    # What has no kernel that leaves out blocks computes all.
    for platform, changed in (
        ("cpu", model),
        ("tpu", dataclasses.replace(model, attention="reference")),
    ):
        assert kernels.work(changed, shape, alone, platform, rows) == (None, None, 0, 0)
    # Heads of 72 are multiplied as if they had 128.
    wide = dataclasses.replace(model, width=144)
    assert kernels.work(wide, shape, alone, "cuda", rows).pairs == pytest.approx(on_gpu.pairs * 128 / 72)


def test_what_sampling_costs_follows_from_peaks_and_evaluations(network, target):
    where = dataclasses.replace(target, chip=topology.Chip(16, 1e12, 1e15, 1e15, 1e15))
    run = resolved()

    def made(**changes):
        return roofline.plan_sampler(
            dataclasses.replace(run, sampler=dataclasses.replace(run.sampler, **changes)), network, where
        )

    one, other = made(method="euler", steps=4, guidance=1.0), made(method="heun", steps=6, guidance=3.0)
    # Half as many steps again, each with two evaluations, each with and without prompt.
    for low, high in zip(one["chip_seconds_per_video"], other["chip_seconds_per_video"], strict=True):
        assert high == pytest.approx(6 * low, rel=0.02)
    assert one["videos_per_hour"][1] * one["chip_seconds_per_video"][0] == pytest.approx(3600 * 8)
    assert 0 < one["mfu"][0] <= one["mfu"][1] <= 1
    told, shown = text.table(other), page.page(other, "sora-jax plan --sampler")
    assert "chip-seconds a video" in told and "6 steps of heun, guidance 3" in told
    assert "Batch: 256 videos" in shown and "A batch of videos:" in shown


def test_candidates_cover_the_chips_and_none_is_refused_for_its_sizes(network, target):
    run = resolved()
    run = dataclasses.replace(run, pack=dataclasses.replace(run.pack, row_tokens=512))
    found = list(search.candidates(run, network, target))
    shapes = {dataclasses.astuple(each.mesh) for each in found}
    assert all(math.prod(shape) == 8 for shape in shapes)
    # Two heads do not divide over four, and eight rows leave no room for more lanes than that.
    assert {shape[2] for shape in shapes} == {1, 2} and {shape[3] for shape in shapes} == {1, 2, 4, 8}
    assert {each.pack.rows for each in found} == {4, 8, 16}
    assert {each.pack.row_tokens for each in found} == {256, 512, 1024}
    assert all(each.pack.row_slots * 512 >= run.pack.row_slots * each.pack.row_tokens for each in found)
    narrow = dataclasses.replace(run, dit=dataclasses.replace(run.dit, width=36, heads=2))
    assert {each.mesh.fsdp for each in search.candidates(narrow, network, target)} == {1, 2, 4}


def test_candidates_have_their_kernels(network, target):
    """On chips whose kernel takes tokens in blocks, the rows that it takes; elsewhere all."""
    run = resolved()
    run = dataclasses.replace(run, pack=dataclasses.replace(run.pack, row_tokens=2 * 1000, row_text=512))
    tpu = topology.Target("v5e:2x4", [TPU] * 8, topology.CHIPS["v5e"])
    assert {each.pack.row_tokens for each in search.candidates(run, network, target)} == {1000, 2000, 4000}
    found = list(search.candidates(run, network, tpu))
    assert all(
        not kernels.missing(each.dit, each.pack, sharding.abstract_mesh(each.mesh, 8), "tpu") for each in found
    ) and {each.pack.row_tokens for each in found} < {1000, 2000, 4000}
    for name, taken in (("splash", {each.pack for each in found}), ("triton", set())):
        named = dataclasses.replace(run, dit=dataclasses.replace(run.dit, attention=name))
        assert {each.pack for each in search.candidates(named, network, tpu)} == taken


def test_a_search_begins_with_the_run_as_it_is_whatever_it_is(network, target, monkeypatch, caplog):
    """Where nothing works it is told why it does not."""
    run = resolved(mesh=sharding.MeshConfig(data=3, fsdp=1))
    monkeypatch.setattr(search, "candidates", lambda *_: iter(()))
    with caplog.at_level("INFO"):
        assert search.search(run, network, target, tries=2) == []
    assert "3" in caplog.text and "8 devices" in caplog.text


def test_a_search_ranks_what_it_compiled(network, target, monkeypatch):
    tried, refused = [], []

    def fake(run, network, where):
        if run.dit.remat == "dots":
            refused.append(run)
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not on this chip")
        tried.append(run)
        fits = run.dit.remat != "none"
        return {
            "verdict": {"fits": fits, "why": []},
            "tokens_per_second": [100.0 + run.pack.rows - len(tried), 0.0],
            "mesh": dataclasses.asdict(run.mesh),
            "model": {"remat": run.dit.remat},
            "step": {"rows": run.pack.rows, "row_tokens": run.pack.row_tokens},
            "packing": {"fill": 1.0},
        } | ({"unknown_loops": ["while"]} if len(tried) % 2 else {})

    monkeypatch.setattr(roofline, "plan", fake)
    run = resolved()
    run = dataclasses.replace(run, pack=dataclasses.replace(run.pack, row_tokens=256))
    ranked = search.search(run, network, target, tries=12)
    # The run as it is comes first; what is refused is none of those that were asked for.
    assert len(tried) == 12 and tried[0] == run and refused
    assert len({(r.mesh, r.dit.remat, r.pack.rows, r.pack.row_tokens) for r in tried}) == 12
    speeds = [(each["verdict"]["fits"], "unknown_loops" not in each, each["tokens_per_second"][0]) for each in ranked]
    assert speeds == sorted(speeds, reverse=True) and len({known for _, known, _ in speeds}) == 2
    assert len(text.ranking(ranked).splitlines()) == 13


def test_padding_is_no_speed(network, target, monkeypatch):
    """Rows that clips fill badly lose to slower ones that they fill well, in what is compiled and in what is told."""
    run = resolved()
    # Clips have up to 120 tokens: most rows of 128 hold one and its padding.
    short, long = (dataclasses.replace(run.pack, row_tokens=size, row_slots=64, row_text=2048) for size in (128, 384))
    run = dataclasses.replace(run, pack=short)
    fills = {each: packing.packed(dataclasses.replace(run, pack=each), network).fill for each in (short, long)}
    assert fills[short] < 0.9 * fills[long]
    # A little faster in tokens, slower in those of clips.
    speeds, tried = {short: math.sqrt(fills[long] / fills[short]), long: 1.0}, []

    def fake(run, network, where):
        tried.append(run.pack)
        return {
            "verdict": {"fits": True, "why": []},
            "tokens_per_second": [speeds[run.pack], 0.0],
            "mesh": dataclasses.asdict(run.mesh),
            "model": {"remat": run.dit.remat},
            "step": {"rows": run.pack.rows, "row_tokens": run.pack.row_tokens},
            "packing": {"fill": fills[run.pack]},
        }

    monkeypatch.setattr(roofline, "plan", fake)
    monkeypatch.setattr(search, "rows_like", lambda _: [short, long])
    monkeypatch.setattr(search, "estimate", lambda each, _: 1 / speeds[each.pack])
    ranked = search.search(run, network, target, tries=3)
    # The run as it is comes first.
    assert tried == [short, long, long]
    assert [each["step"]["row_tokens"] for each in ranked] == [384, 384, 128]
    assert f"{fills[long]:.1%}" in text.ranking(ranked).splitlines()[1]


def test_an_estimate_prefers_what_fits():
    run = config.from_config_dict(dit_experiment.get_config("0.7b"))
    where = topology.Target("v5e:2x4", [TPU] * 8, topology.CHIPS["v5e"])
    assert search.estimate(dataclasses.replace(run, dit=dataclasses.replace(run.dit, remat="none")), where) == math.inf
    assert search.estimate(run, where) < math.inf and set(dit_model.REMAT) == set(search.KEPT)


def test_an_estimate_prefers_to_keep_what_attention_gave_where_there_is_room():
    run = config.from_config_dict(dit_experiment.get_config("7b"))
    keeping, full = (
        dataclasses.replace(run, dit=dataclasses.replace(run.dit, remat=remat)) for remat in ("attention", "full")
    )
    for chip, better in (("v5p", keeping), ("v5e", full)):
        chip = dataclasses.replace(topology.CHIPS[chip], memory=95 if chip == "v5p" else 64)
        where = topology.Target("v5p:4x4x8", [TPU] * 128, chip)
        assert min((keeping, full), key=lambda each: search.estimate(each, where)) == better


@pytest.mark.parametrize(("name", "topology_"), [("0.7b", "v5e:2x4"), ("7b", "v5p:4x4x8"), ("30b", "v5p:8x8x16")])
def test_an_estimate_of_memory_is_near_what_was_compiled(name, topology_):
    """A chip a fifth smaller than the plan's total does not hold it, one a fifth larger does."""
    run = config.from_config_dict(dit_experiment.get_config(name))
    total = json.loads((PLANS / f"{name}.json").read_text())["memory"]["total"] / topology.GIB
    chips = math.prod(map(int, topology_.split(":")[1].split("x")))
    for times in (0.8, 1.2):
        chip = dataclasses.replace(topology.CHIPS["v5p"], memory=times * total)
        estimate = search.estimate(run, topology.Target(topology_, [TPU] * chips, chip))
        assert (estimate == math.inf) == (times < 1)


def test_an_estimate_of_what_attention_trades_is_near_what_was_compiled():
    told = json.loads((PLANS / "30b.json").read_text())
    mesh = told["mesh"]
    stream = 4 * told["model"]["width"] * told["step"]["tokens"] / told["chips"]
    traded = sum(each["bytes"] for each in told["collectives"] if each["kind"] == "all-to-all")
    over = told["model"]["blocks"] * stream * (1 - 1 / mesh["sequence"])
    assert traded / over == pytest.approx(search.TRADED, rel=0.05)


def test_an_estimate_counts_the_way_to_the_host():
    run = config.from_config_dict(dit_experiment.get_config("0.7b"))
    where = topology.Target("v5e:2x4", [TPU] * 8, topology.CHIPS["v5e"])
    offload, full = (
        search.estimate(dataclasses.replace(run, dit=dataclasses.replace(run.dit, remat=remat)), where)
        for remat in ("offload", "full")
    )
    near = dataclasses.replace(where, chip=dataclasses.replace(where.chip, host=1e15))
    assert full < offload < math.inf
    assert search.estimate(dataclasses.replace(run, dit=dataclasses.replace(run.dit, remat="offload")), near) < full


def test_what_jax_does_not_take_of_a_chip_does_not_fit(network, target):
    """The same step on chips with more and with less memory than it needs, of which three quarters are taken."""
    need = roofline.plan(resolved(), network, target)["memory"]["total"] / topology.GIB
    why = {}
    for times in (1.5, 1.2, 1.03, 0.9):
        chip = topology.Chip(need * times, 1e12, 1e11, 1e10, 1e9, usable=0.75)
        verdict = roofline.plan(resolved(), network, dataclasses.replace(target, chip=chip))["verdict"]
        assert verdict["fits"] == (times == 1.5)
        why[times] = "; ".join(verdict["why"])
    assert "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.88" in why[1.2]
    assert "XLA_PYTHON" not in why[1.5] + why[1.03] + why[0.9]
    # What no setting of jax helps gets the remedies of what a compiler refuses.
    assert all("dit.remat=full" in why[times] and "mesh.fsdp" in why[times] for times in (1.03, 0.9))
    assert "jax can take 95%" in why[1.03]


def examples():
    (verbs,) = [each for each in main.make_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    lines = verbs.choices["plan"].epilog.splitlines()
    return [line.strip() for line in lines if line.strip().startswith("sora-jax plan")]


@pytest.mark.parametrize("line", examples())
def test_examples_of_plans_divide_over_their_chips(line, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    words = shlex.split(line)[2:]
    flags = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    run = configs.load_run(flags["config"], [word for word in words if word.startswith("--config.")])
    run = dit.resolve(dataclasses.replace(run, text=dataclasses.replace(run.text, encoder="scratch")))
    mesh = sharding.abstract_mesh(run.mesh, math.prod(map(int, flags["topology"].split(":")[1].split("x"))))
    sharding.check(mesh, rows=run.pack.rows, tokens=run.pack.row_tokens, heads=run.dit.heads)
    sharding.parameter_shardings(step.parameter_shapes(run), mesh)
    dit.longest_clip(run, configs.load_run(flags["vae"], []).vae)


def test_what_waits_for_the_host_is_in_the_time_and_in_the_verdict(network, target, monkeypatch):
    chip = topology.Chip(16, 1e12, 1e11, 1e10, 1e9)
    where = dataclasses.replace(target, chip=chip)
    before = roofline.plan(resolved(), network, where)
    assert before["seconds"]["host"] == 0
    monkeypatch.setattr(hlo.Program, "host_traffic", lambda _: 10**12)
    after = roofline.plan(resolved(), network, where)
    assert after["seconds"]["host"] == 1000 == after["seconds"]["whole"][0]
    assert after["seconds"]["whole"][1] == pytest.approx(before["seconds"]["whole"][1] + 1000)
    assert "bound by host" in after["verdict"]["why"] and any(
        "recompute it" in each for each in after["verdict"]["why"]
    )
