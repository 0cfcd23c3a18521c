"""The table of shardings is total, refuses what cannot be, and changes nothing about results."""

import dataclasses
import functools

import decoding
import dit as dit_experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import vae as vae_experiment
from flax import nnx
from jax.sharding import PartitionSpec as P

from sora_jax import config, sharding
from sora_jax.data import pack
from sora_jax.generate import codec, pipeline
from sora_jax.generate.known import Known
from sora_jax.models import captioner, dit, text_encoder, vae
from sora_jax.structs import Layout, TrainState
from sora_jax.text.captions import CaptionText
from sora_jax.train import captioner as train_captioner
from sora_jax.train import dit as train_dit
from sora_jax.train import guard, loop, optimizer
from sora_jax.train import vae as train_vae

TEXT = text_encoder.TextEncoderConfig(
    vocab_size=32, width=16, layers=2, heads=2, mlp_width=32, max_tokens=8, dtype="float32"
)
MODELS = {
    "vae": lambda: vae.VAE(vae.VAEConfig(widths=(16,), channels=4), nnx.Rngs(0)),
    "video vae": lambda: vae.VAE(config.from_config_dict(vae_experiment.get_config("video")).vae, nnx.Rngs(0)),
    "captioner": lambda: captioner.Captioner(tiny.captioner_run("none").captioner, nnx.Rngs(0)),
    "dit": lambda: dit.DiT(dit.DiTConfig(width=32, blocks=2, heads=2, channels=8, text_width=16), nnx.Rngs(0)),
    "dit with text": lambda: dit.DiT(
        dit.DiTConfig(width=32, blocks=2, heads=2, channels=8, text_width=16, text=TEXT), nnx.Rngs(0)
    ),
}


def parameters(make):
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))


def mesh(data=1, fsdp=1, tensor=1, sequence=1):
    return sharding.make_mesh(sharding.MeshConfig(data, fsdp, tensor, sequence))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_row(name):
    shardings = sharding.parameter_shardings(parameters(MODELS[name]), mesh(fsdp=8))
    split = [leaf for leaf in jax.tree.leaves(shardings) if leaf.spec and any(leaf.spec)]
    assert split, "nothing is sharded"


@pytest.mark.parametrize(("name", "fsdp"), [("0.7b", 128), ("7b", 512), ("30b", 1024)])
def test_weights_of_large_models_are_spread_over_many_chips(name, fsdp):
    """What has few inputs or outputs of its own, such as 48 features of a place, does not keep the rest from it."""
    run = config.from_config_dict(dit_experiment.get_config(name))
    shape = dataclasses.replace(run.dit, text_width=4096)  # of the text encoder that such a model would have
    shapes = parameters(lambda: dit.DiT(shape, nnx.Rngs(0)))
    over = sharding.abstract_mesh(sharding.MeshConfig(fsdp=fsdp), fsdp)
    shardings = jax.tree.leaves(sharding.parameter_shardings(shapes, over))
    sizes = [x.size for x in jax.tree.leaves(shapes)]
    spread = sum(size for size, each in zip(sizes, shardings, strict=True) if any(each.spec))
    assert spread > 0.99 * sum(sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As jax tells of one of a TPU that need not be there."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def chips(*shape):
    return [Chip(number, place[::-1]) for number, place in enumerate(np.ndindex(*shape[::-1]))]


@pytest.mark.parametrize(("shape", "sizes"), [((8, 8, 16), (16, 16, 1, 4)), ((4, 4, 8), (4, 16, 1, 2))])
def test_an_axis_of_a_mesh_may_be_a_part_of_one_of_the_network(shape, sizes):
    found = sharding.make_mesh(sharding.MeshConfig(*sizes), chips(*shape))
    assert found.devices.shape == sizes and len(set(found.devices.ravel())) == np.prod(shape)


@pytest.mark.parametrize("axis", sharding.AXES)
def test_an_axis_of_none_takes_what_the_others_leave(axis):
    other = "tensor" if axis == "data" else "data"
    config = sharding.MeshConfig(**{"data": 1, axis: 0, other: 2})
    assert sharding.mesh_shape(config, 8)[sharding.AXES.index(axis)] == 4
    with pytest.raises(sharding.MeshError, match="does not cover 7 devices"):
        sharding.mesh_shape(config, 7)
    with pytest.raises(ValueError, match="one of them may be 0"):
        dataclasses.replace(config, **{other: 0})


def test_every_mesh_of_so_many_devices_is_found_once():
    found = list(sharding.mesh_shapes(8))
    assert len(set(found)) == len(found) == 20  # 2^3 in four boxes
    assert all(sharding.mesh_shape(each, 8) == dataclasses.astuple(each) for each in found)


def test_an_unknown_parameter_is_told_with_its_shape_and_a_remedy():
    params = {"blocks": {"new": {"thing": jax.ShapeDtypeStruct((4, 8), jnp.float32)}}}
    with pytest.raises(
        ValueError, match=r"blocks/new/thing \(4, 8\) matches no row of sharding.PARAMETERS; add one .* 2 logical"
    ):
        sharding.parameter_shardings(params, mesh(fsdp=8))


def test_axes_used_twice_and_unknown_axes_are_told(monkeypatch):
    monkeypatch.setattr(sharding, "PARAMETERS", ((r"kernel$", ("embed", "rows")),))
    params = {"mlp": {"kernel": jax.ShapeDtypeStruct((8, 32), jnp.float32)}}
    with pytest.raises(
        ValueError, match=r"mlp/kernel \(8, 32\): axes embed, rows use mesh axis fsdp twice; .* sharding.PARAMETERS"
    ):
        sharding.parameter_shardings(params, mesh(fsdp=8))
    with pytest.raises(ValueError, match="no logical axis 'wdith'"):
        sharding.spec(("wdith",), "x")


def test_dimensions_that_do_not_divide_are_told():
    params = {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((12, 32), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"mlp/up/kernel .* 12 does not divide over 8"):
        sharding.parameter_shardings(params, mesh(fsdp=8))


def test_activations_that_do_not_divide_are_told():
    with pytest.raises(sharding.MeshError, match="2 heads do not divide over 8 devices"):
        sharding.check(mesh(tensor=8), rows=1, heads=2)
    sharding.check(mesh(tensor=8), rows=1, heads=8)


def test_a_mesh_must_cover_the_devices():
    with pytest.raises(ValueError, match="choose sizes whose product is 8"):
        mesh(data=3)
    assert sharding.make_mesh(sharding.MeshConfig(tensor=2)).shape["data"] == 4


def test_moments_lie_as_their_parameters():
    params = parameters(MODELS["dit"])
    here = mesh(fsdp=4, tensor=2)
    shardings = sharding.parameter_shardings(params, here)
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    laid = sharding.like_parameters(state, params, shardings, here)
    assert jax.tree.leaves(laid[0].mu) == jax.tree.leaves(shardings) == jax.tree.leaves(laid[0].nu)
    assert laid[0].count.spec == P()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_all_that_our_optimizers_keep_is_like_a_parameter(name):
    params, here = parameters(MODELS["dit with text"]), mesh(fsdp=4, tensor=2)
    tx = optimizer.make(dataclasses.replace(tiny.dit_run("none").optimizer, name=name), 10)
    state = jax.eval_shape(tx.init, params)
    laid = sharding.like_parameters(state, params, sharding.parameter_shardings(params, here), here)
    # Vectors and counts are whole everywhere, and little beside the matrices.
    whole = [
        x.size for x, lies in zip(jax.tree.leaves(state), jax.tree.leaves(laid), strict=True) if not any(lies.spec)
    ]
    assert sum(whole) < 0.1 * sum(x.size for x in jax.tree.leaves(state))


def test_a_moment_that_is_like_no_parameter_is_told():
    """Of a row and a column of a matrix nothing says how they lie on a mesh."""
    params, here = parameters(MODELS["dit"]), mesh(fsdp=8)
    state = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=8).init, params)
    with pytest.raises(ValueError, match=r"v_row/.* of the optimizer is like no parameter .* sharding.OF_NO_PARAMETER"):
        sharding.like_parameters(state, params, sharding.parameter_shardings(params, here), here)


def forward(model, here, noisy, time, layout):
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)

    def loss(params):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(noisy, time, layout) - noisy))

    if here is None:
        return jax.jit(jax.value_and_grad(loss))(params)
    with jax.set_mesh(here):
        placed = jax.device_put(params, sharding.parameter_shardings(params, here))
        return jax.jit(jax.value_and_grad(loss))(placed)


MESHES = [
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 4, 2, 1),
    (1, 2, 1, 4),
    (1, 1, 2, 4),
    (2, 2, 2, 1),
    (2, 1, 2, 2),
    (2, 2, 1, 2),
]


@pytest.fixture(scope="module")
def unsharded():
    """A model with its inputs, and loss and gradients without a mesh."""
    rng = np.random.default_rng(0)
    config = dit.DiTConfig(width=32, blocks=2, heads=2, channels=8, text_width=16)
    model = dit.DiT(config, nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf[...] = leaf[...] + 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    B, N, S, L = 8, 8, 2, 4
    layout = Layout(
        segment_BN=jnp.asarray([[1] * 5 + [2] * 3] * B, jnp.int32),
        slot_BN=jnp.asarray([[0] * 5 + [1] * 3] * B, jnp.int32),
        position_BN3=jnp.asarray(rng.uniform(0, 30, (B, N, 3)), jnp.float32),
        slot_segment_BS=jnp.asarray([[1, 2]] * B, jnp.int32),
        extent_BS3=jnp.ones((B, S, 3)),
        text_segment_BL=jnp.asarray([[1, 1, 2, 0]] * B, jnp.int32),
        text_BLM=jnp.asarray(rng.standard_normal((B, L, 16)), jnp.float32),
    )
    noisy = jnp.asarray(rng.standard_normal((B, N, 8)), jnp.float32)
    time = jnp.full((B, S), 0.4)
    given = model, noisy, time, layout
    return given, jax.device_get(forward(model, None, noisy, time, layout))


@pytest.mark.parametrize("sizes", MESHES)
def test_sharded_equals_unsharded(unsharded, sizes):
    (model, *inputs), (loss, grads) = unsharded
    sharded_loss, sharded_grads = forward(model, mesh(*sizes), *inputs)
    assert sharded_loss == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(sharded_grads), strict=True):
        assert np.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 1, 4), (2, 1, 2, 2)])
def test_sharded_equals_unsharded_where_attention_goes_by_blocks_and_rings(unsharded, sizes):
    (model, *inputs), (loss, grads) = unsharded
    in_blocks = dit.DiT(dataclasses.replace(model.config, attention="blockwise"), nnx.Rngs(1))
    nnx.update(in_blocks, nnx.state(model, nnx.Param))
    sharded_loss, sharded_grads = forward(in_blocks, mesh(*sizes), *inputs)
    assert sharded_loss == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(sharded_grads), strict=True):
        assert np.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)])
def test_a_captioner_is_the_same_on_every_mesh(rng, sizes):
    """Loss and gradients; a text row of 80 does not divide into the devices of its patches, and need not."""
    settings = tiny.captioner_run("none")
    objective = train_captioner.Objective(settings)
    model = captioner.Captioner(settings.captioner, nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf[...] = leaf[...] + 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    params = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    B, N, L = settings.pack.rows, settings.pack.row_tokens, settings.pack.row_text
    row = pack.empty_row(settings.pack, settings.captioner.patch_dim, None)
    batch = jax.tree.map(lambda leaf: np.stack([leaf] * B), row)
    text_segment_BL = np.array([[1] * 30 + [2] * 20 + [0] * (L - 50)] * B, np.int32)
    layout = batch.layout._replace(
        segment_BN=np.array([[1] * 25 + [2] * (N - 25)] * B, np.int32),
        position_BN3=rng.uniform(0, 30, (B, N, 3)).astype(np.float32),
        text_segment_BL=text_segment_BL,
        text_token_BL=rng.integers(1, 100, (B, L)).astype(np.int32) * (text_segment_BL > 0),
    )
    batch = batch._replace(mean_BNP=rng.standard_normal(batch.mean_BNP.shape).astype(np.float32), layout=layout)

    def graded(*sizes):
        here = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(here):
            placed = jax.device_put(params, sharding.parameter_shardings(params, here))
            step = jax.jit(jax.value_and_grad(objective, has_aux=True))
            return jax.device_get(step(placed, None, sharding.place_rows(batch, here, B), jax.random.key(0)))

    ((loss, words), grads), ((other_loss, other_words), other_grads) = graded(1, 1, 1, 1), graded(*sizes)
    assert words == other_words and other_loss == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        assert np.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny DiT with an untrained VAE, a batch of its loader's shape, and weights that are not zero anywhere."""
    vae_run = tiny.vae_run()
    vae_params, vae_rest = train_vae.VAETask(vae_run).init(jax.random.key(0))
    run = train_dit.resolve(tiny.dit_run("none"))
    model = dit.DiT(run.dit, nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf[...] = leaf[...] + 0.05 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    params = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return run, params, vae_run.vae, jax.device_get((vae_params, vae_rest))


def batch_of(run, rng):
    """Rows of two clips and padding."""
    rows = []
    for number in range(run.pack.rows):
        clips = []
        for clip in (2 * number, 2 * number + 1):
            tokens = 16
            clips.append(
                pack.Tokens(
                    mean_NP=rng.standard_normal((tokens, run.dit.patch_dim)).astype(np.float32),
                    std_NP=np.ones((tokens, run.dit.patch_dim), np.float32),
                    position_N3=rng.uniform(0, 30, (tokens, 3)).astype(np.float32),
                    index_N=np.arange(tokens, dtype=np.int32),
                    known_N=np.arange(tokens) < 4 * (clip % 2),
                    ceiling=1.0,
                    extent_3=np.ones(3, np.float32),
                    clip=clip,
                    draw=0,
                    text_LM=None,
                    text_token_L=rng.integers(1, 200, 5).astype(np.int32),
                )
            )
        rows.append(pack.fill_row(clips, run.pack, run.dit.patch_dim, None))
    return pack.stack(rows)


def first_state(params, tx):
    """On the host, as every array that is made on a mesh is a program of its own for each mesh."""
    return jax.device_get(TrainState(jnp.int32(0), params, params, {}, jax.jit(tx.init)(params), guard.fresh()))


RATE = 1e-3


@pytest.fixture(scope="module")
def updated(run):
    """Parameters and loss after one update on a mesh over the first devices."""
    settings, params, _, _ = run
    # AdamW: Muon's directions of tiny gradients are those of rounding.
    tx = optimizer.make(dataclasses.replace(settings.optimizer, name="adamw", rate=RATE, warmup_steps=0), 10)
    batch, first = batch_of(settings, np.random.default_rng(0)), first_state(params, tx)

    @functools.cache
    def on(*sizes):
        here = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(here):
            state = jax.device_put(first, loop.state_shardings(jax.eval_shape(lambda: first), here))
            step = jax.jit(loop.make_step(train_dit.Objective(settings), tx, 0.9, 0, 10.0))
            state, metrics = step(state, sharding.place_rows(batch, here, settings.pack.rows))
            return jax.device_get((state.params, metrics["loss"]))

    return on


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4), (2, 1, 2, 2)])
def test_one_update_is_the_same_on_every_mesh(run, updated, sizes):
    (one, loss), (other, other_loss) = updated(1, 1, 1, 1), updated(*sizes)
    assert other_loss == pytest.approx(float(loss), abs=1e-5)
    # Adam's first step is the sign of the gradient; where that is rounding's, it may turn.
    moved = [np.abs(a - b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(run[1]), strict=True)]
    apart = [np.abs(a - b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    assert max(x.max() for x in moved) > 1e-4
    assert np.mean(np.concatenate([x.ravel() for x in apart]) > 1e-5) < 0.002
    # And a turn of the sign is all that it may be.
    factors = jax.tree.leaves(optimizer.rate_factors(run[1], "adamw"))
    assert all(x.max() <= 2.001 * RATE * factor for x, factor in zip(apart, factors, strict=True))


@pytest.fixture(scope="module")
def curve(run):
    """Losses of 20 steps of the run's own optimizer on a mesh over the first devices."""
    settings, params, _, _ = run
    tx = optimizer.make(dataclasses.replace(settings.optimizer, warmup_steps=4), 20)
    batches = [batch_of(settings, np.random.default_rng(number)) for number in range(20)]
    first = first_state(params, tx)

    def losses(*sizes):
        here = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(here):
            state = jax.device_put(first, loop.state_shardings(jax.eval_shape(lambda: first), here))
            step = jax.jit(loop.make_step(train_dit.Objective(settings), tx, 0.9, 0, 10.0))
            found = []
            for batch in batches:
                state, metrics = step(state, sharding.place_rows(batch, here, settings.pack.rows))
                found.append(float(metrics["loss"]))
        return found

    return losses


def test_twenty_steps_have_the_same_losses_on_1_2_4_and_8_devices(curve):
    one = curve(1, 1, 1, 1)
    assert one[-1] < one[0] - 0.01
    for sizes in [(1, 2, 1, 1), (2, 1, 2, 1), (1, 2, 2, 2)]:
        other = curve(*sizes)
        assert other == pytest.approx(one, abs=1e-5), sizes


@pytest.fixture(scope="module")
def autoencoded():
    """Gradients and loss of a VAE on a mesh over the first devices."""
    settings = tiny.vae_run()
    task = train_vae.VAETask(settings)
    params, rest = jax.device_get(task.init(jax.random.key(0)))
    frames = np.random.default_rng(0).integers(0, 256, (8, *settings.vae_train.crop, 3), np.uint8)

    @functools.cache
    def on(*sizes):
        here = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(here):
            placed = jax.device_put(params, sharding.parameter_shardings(params, here))
            step = jax.jit(jax.value_and_grad(lambda p, x: task.loss(p, rest, x, jax.random.key(1))[0]))
            loss, grads = step(placed, sharding.place_rows(frames, here, 8))
            return float(loss), jax.device_get(grads)

    return on


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 2, 1, 4)])
def test_a_vae_is_the_same_on_every_mesh(autoencoded, sizes):
    (one, grads), (other, sharded) = autoencoded(1, 1, 1, 1), autoencoded(*sizes)
    assert other == pytest.approx(one, abs=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(sharded), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(a).max(), 1e-2)


@pytest.fixture(scope="module")
def sampled(run):
    """Samples on a mesh."""
    settings, params, vae_config, vae_weights = run
    text = CaptionText(settings.text, "scratch")
    requests = [pipeline.Request(f"a red circle {n}", 32, 32, 5, 8.0, seed=n) for n in range(8)]
    first = np.zeros((5, 32, 32), bool)
    first[0] = True
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    requests += [dataclasses.replace(request, known=Known(frames, first)) for request in requests[:4]]
    steps = dataclasses.replace(settings.sampler, steps=2, guidance=3.0, known_guidance=2.0, restart=0.5)

    @functools.cache
    def on(*sizes):
        here = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(here):
            placed = jax.device_put(params, sharding.parameter_shardings(params, here))
            made = pipeline.Pipeline(settings, vae_config, placed, vae_weights, text)
            latents = made.sample_latents(requests, steps)
        return latents, decoding.pixels(made.codec, latents)

    return on


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4), (2, 1, 2, 2)])
def test_one_sample_is_the_same_on_every_mesh(sampled, sizes):
    (one, shown), (other, other_shown) = sampled(1, 1, 1, 1), sampled(*sizes)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))
    assert max(np.abs(a - b).max() for a, b in zip(shown, other_shown, strict=True)) <= 1e-4
    assert np.abs(one[0] - one[1]).max() > 0.1 and np.abs(one[0] - one[8]).max() > 0.1


def test_clips_are_encoded_and_decoded_by_all_devices(run, rng):
    _, _, vae_config, vae_weights = run
    network = codec.Codec(vae_config, *vae_weights)
    videos = [rng.integers(0, 256, (frames, 32, 32, 3), np.uint8) for frames in (5, 5, 5, 1, 5, 5, 5, 5, 5, 5)]
    alone = network.encode(videos)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with jax.set_mesh(mesh):
        spread = network.encode(videos)
        decoded = network.decode([mean for mean, _ in spread])
        costs = [
            [
                part.lower(network._weights, np.zeros((size, *shape), dtype), None).compile().cost_analysis()["flops"]
                for size in (1, 8)
            ]
            for part, shape, dtype in (
                (network._encode_chunk, (5, 32, 32, 3), np.uint8),
                (network._decode_chunk, alone[0][0].shape, np.float32),
            )
        ]
    for one, other in zip(alone, spread, strict=True):
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))
    for one, other in zip(network.decode([mean for mean, _ in alone]), decoded, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    # Eight clips on eight devices are on each the work of one.
    assert [parted for _, parted in costs] == pytest.approx([whole for whole, _ in costs], rel=0.1)


def test_what_is_little_or_large_is_not_shared_out(run, monkeypatch):
    """What goes in and comes out lies on every device: copies for all of one clip, or a large one for each, would not fit."""
    _, _, vae_config, vae_weights = run
    network, sizes = codec.Codec(vae_config, *vae_weights), []
    decode = network._decode_chunk
    monkeypatch.setattr(
        network, "_decode_chunk", lambda weights, x, pasts: (sizes.append(len(x)), decode(weights, x, pasts))[1]
    )
    latents = [np.zeros(vae_config.latent_shape(5, 32, 32), np.float32)] * 12
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
        network.decode(latents[:3])
        network.decode(latents)
        monkeypatch.setattr(codec, "MOST_PIXELS", 8 * 8 * 32 * 32)
        network.decode(latents)
        monkeypatch.setattr(codec, "MOST_PIXELS", 8 * 8 * 32 * 32 - 1)
        network.decode(latents)
    assert sizes == [4, 16, 8, 8, 4, 4, 4]
