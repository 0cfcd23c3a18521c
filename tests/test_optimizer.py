"""Laws of the optimizers: which leaves Muon takes, how rates run, and how far a step goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from sora_jax import sharding
from sora_jax.config import OptimizerConfig
from sora_jax.models import dit
from sora_jax.structs import Layout
from sora_jax.train import optimizer

MUON = OptimizerConfig("muon", 0.02, 1e-3, warmup_steps=4, decay="linear", weight_decay=0.0, clip_norm=1.0)
PARAMS = {
    "patch_in": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)},
    "blocks": {"mlp": {"up": {"kernel": jnp.ones((3, 8, 16)), "bias": jnp.ones((3, 16))}}},
    "stages": {"convolution": {"kernel": jnp.ones((3, 3, 8, 8))}},
    "text": {"token": {"embedding": jnp.ones((5, 8))}, "blocks": {"up": {"kernel": jnp.ones((2, 8, 8))}}},
}


def first_update(config, params, rng):
    tx = optimizer.make(dataclasses.replace(config, warmup_steps=0, decay="constant"), steps=10)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_rates_rise_and_fall_with_the_run(decay, half):
    rate = optimizer.rates(0.02, dataclasses.replace(MUON, decay=decay), steps=104)
    values = np.array([rate(step) for step in range(105)])
    assert values[0] > 0 and np.all(np.diff(values[:5]) > 0) and values[4] == pytest.approx(0.02)
    assert values[54] == pytest.approx(0.02 * half, rel=1e-3)
    assert values[104] == pytest.approx(0.02 if decay == "constant" else 0.0, abs=1e-8)


def test_a_run_shorter_than_its_warm_up_still_decays():
    values = [optimizer.rates(0.02, dataclasses.replace(MUON, warmup_steps=50), steps=3)(step) for step in range(4)]
    assert max(values) == pytest.approx(0.02) and values[-1] == 0


def test_muon_takes_hidden_matrices_alone():
    taken = optimizer.matrix_axes(PARAMS)
    assert taken["patch_in"]["kernel"] is None and taken["text"]["token"]["embedding"] is None
    assert taken["blocks"]["mlp"]["up"]["bias"] is None
    for kernel in (taken["blocks"]["mlp"]["up"]["kernel"], taken["text"]["blocks"]["up"]["kernel"]):
        assert (kernel.reduction_axis, kernel.output_axis) == ((1,), (2,))
    convolution = taken["stages"]["convolution"]["kernel"]
    assert (convolution.reduction_axis, convolution.output_axis) == ((0, 1, 2), (3,))


def test_flops_of_an_update_are_as_xla_counts_them():
    """Of matrices wide enough that what goes element by element is little beside the products."""
    shapes = {
        "blocks": {"mlp": {"up": {"kernel": (2, 192, 768)}, "down": {"kernel": (2, 768, 192)}}},
        "text_in": {"kernel": (384, 192)},
        "stages": {"kernel": (3, 3, 32, 192)},
        "patch_in": {"kernel": (24, 192)},
    }
    params = jax.tree.map(lambda shape: jnp.zeros(shape), shapes, is_leaf=lambda each: isinstance(each, tuple))
    tx = optimizer.make(MUON, 10)
    update = jax.jit(lambda grads: tx.update(grads, tx.init(params), params)[0])
    counted = update.lower(params).compile().cost_analysis()["flops"]
    assert optimizer.flops(MUON, params) == pytest.approx(counted, rel=0.02)
    assert optimizer.flops(dataclasses.replace(MUON, name="adamw"), params) == 0


def test_every_layer_of_a_stack_moves_by_the_rate_in_every_direction(rng):
    update = first_update(MUON, PARAMS, rng)["blocks"]["mlp"]["up"]["kernel"]
    singular = np.linalg.svd(np.asarray(update), compute_uv=False)
    # sqrt(outputs / inputs) more, as optax scales; Newton-Schulz leaves singular values within a third of one.
    assert singular.shape == (3, 8) and np.all(np.abs(singular / (0.02 * 2**0.5) - 1) < 0.35)


def of_optax(config):
    """optimizer.make's, with Muon as optax has it, which iterates on the matrices themselves."""
    muon = contrib.muon(
        optimizer.rates(config.rate, config, 10),
        adam_learning_rate=optimizer.rates(config.adam_rate, config, 10),
        adam_b2=0.99,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=optimizer.matrix_axes,
    )

    def slower(updates, _):
        return jax.tree.map(jnp.multiply, updates, optimizer.rate_factors(updates, config.name))

    return optax.chain(optax.clip_by_global_norm(config.clip_norm), muon, optax.stateless(slower))


def test_muon_and_its_state_are_those_of_optax(rng):
    """Of all kinds of leaves, with weight decay: checkpoints of one are those of the other."""
    config = dataclasses.replace(MUON, weight_decay=0.1)
    pair = [tx(config) for tx in (lambda config: optimizer.make(config, 10), of_optax)]
    states = [tx.init(PARAMS) for tx in pair]
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), PARAMS)
        found = [tx.update(grads, state, PARAMS) for tx, state in zip(pair, states, strict=True)]
        states = [state for _, state in found]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        for one, other in zip(*map(jax.tree.leaves, found), strict=True):
            assert np.allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 24, 36), (3, 24, 48), (3, 96, 24), (3, 24, 144)])
def test_matrices_are_made_orthogonal_as_by_optax(rng, shape, condition):
    """Of gradients whose singular values lie that far apart."""
    layers, short, long = shape[0], *sorted(shape[1:])
    left, right = (np.linalg.qr(rng.standard_normal((layers, size, short)))[0] for size in (short, long))
    grad = np.einsum("lik,k,ljk->lij", left, np.logspace(0, -np.log10(condition), short), right)
    params = {"blocks": {"map": {"kernel": jnp.zeros(shape)}}}
    grads = {"blocks": {"map": {"kernel": jnp.asarray(grad if shape[1] == short else grad.swapaxes(1, 2))}}}
    one, other = (
        tx.update(grads, tx.init(params), params)[0]["blocks"]["map"]["kernel"]
        for tx in (optimizer.make(MUON, 10), of_optax(MUON))
    )
    assert np.abs(one - other).max() < 1e-4 * np.abs(other).max()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_text_encoder_moves_slower(rng, name):
    twice = {place: {"blocks": PARAMS["blocks"]} for place in ("other", "text")}
    tx = optimizer.make(dataclasses.replace(MUON, name=name, warmup_steps=0), steps=10)
    grad = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), PARAMS["blocks"])
    update, _ = tx.update({place: {"blocks": grad} for place in twice}, tx.init(twice), twice)
    for other, text in zip(jax.tree.leaves(update["other"]), jax.tree.leaves(update["text"]), strict=True):
        assert np.allclose(text, optimizer.TEXT_ENCODER_RATE * other, rtol=1e-5)


def model(width, blocks=2):
    return dit.DiT(dit.DiTConfig(width, blocks=blocks, heads=width // 16, channels=8, text_width=24), nnx.Rngs(1))


def change_of_output(width, settings, steps=4, blocks=2):
    """How much training steps move the output of a DiT of this width and depth (root mean square)."""
    rng = np.random.default_rng(0)
    B, N, S, L = 2, 24, 2, 6
    segment = np.repeat([[1, 2]], N // 2, axis=1).repeat(B, axis=0)
    layout = Layout(
        segment, segment - 1, rng.uniform(0, 32, (B, N, 3)).astype(np.float32), np.array([[1, 2]] * B),
        np.ones((B, S, 3), np.float32), np.repeat([[1, 2]], L // 2, axis=1).repeat(B, axis=0),
        rng.standard_normal((B, L, 24)).astype(np.float32),
    )  # fmt: skip
    layout = jax.tree.map(jnp.asarray, layout)
    noisy, target = (jnp.asarray(rng.standard_normal((B, N, 8)), jnp.float32) for _ in range(2))
    time = jnp.asarray(rng.uniform(0, 1, (B, S)), jnp.float32)
    graphdef, params = nnx.split(model(width, blocks), nnx.Param)
    params = nnx.to_pure_dict(params)
    tx = optimizer.make(dataclasses.replace(settings, warmup_steps=0, decay="constant"), steps=10)

    def out(p):
        return nnx.merge(graphdef, p)(noisy, time, layout)

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(lambda p: jnp.mean(jnp.square(out(p) - target)))(p), state, p)
        return jax.tree.map(jnp.add, p, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return float(jnp.sqrt(jnp.mean(jnp.square(jax.jit(out)(params)))))


def slope_of_change(settings):
    """Of log(change of the output) over log(width)."""
    widths = [32, 96, 288]
    return np.polyfit(np.log(widths), np.log([change_of_output(width, settings) for width in widths]), 1)[0]


ADAMW = dataclasses.replace(MUON, name="adamw", rate=3e-3)


@pytest.mark.parametrize("settings", [MUON, ADAMW], ids=["muon", "adamw"])
def test_a_step_moves_wide_and_narrow_models_alike(settings, monkeypatch):
    # The coordinate check of muP: at one rate the output, which starts at zero, moves as far at every width.
    assert abs(slope_of_change(settings)) < 0.15
    # And it sees what it is for: without the rule wide models move farther, nearly in proportion.
    monkeypatch.setattr(optimizer, "rate_factors", lambda params, name: jax.tree.map(lambda _: 1.0, params))
    assert slope_of_change(settings) > 0.6


@pytest.mark.parametrize("settings", [MUON, ADAMW], ids=["muon", "adamw"])
def test_a_step_moves_deep_and_shallow_models_alike(settings):
    # Blocks start as nothing and their gates open with the output, so no factor of depth is needed.
    shallow, deep = (change_of_output(48, settings, blocks=blocks) for blocks in (2, 16))
    assert abs(np.log(deep / shallow) / np.log(16 / 2)) < 0.15


def test_every_wide_map_moves_less_in_a_wider_model():
    """Of each leaf of a DiT: what Adam moves and has the width as its fan-in goes with 1 / width, all else does not."""
    trees = [
        nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda width=width: model(width)), nnx.Param)) for width in (96, 192)
    ]
    for name in ("adamw", "muon"):
        narrow, wide = (optimizer.rate_factors(tree, name) for tree in trees)
        halved = {
            sharding.path_name(path)
            for (path, one), other in zip(
                jax.tree_util.tree_leaves_with_path(narrow), jax.tree.leaves(wide), strict=True
            )
            if other == one / 2
        }
        blocks = {
            f"blocks/{part}/kernel"
            for part in ("attention/qkv", "attention/out", "cross/q", "cross/kv", "cross/out", "mlp/up", "mlp/down")
        } | {"blocks/modulation/kernel"}
        assert halved == set(optimizer.WIDE_INPUTS) | (blocks if name == "adamw" else set())
