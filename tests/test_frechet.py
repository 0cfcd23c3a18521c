"""The Frechet distance is one, and FD-MobileNetV2 tells worse videos from real ones."""

import dataclasses

import numpy as np
import pytest
from weights import needs_mobilenet

from sora_jax.data.worlds import clips, world
from sora_jax.evaluate import frechet


def gaussian(rng, width, rank):
    """The statistics of correlated features; singular if rank < width."""
    spread = rng.normal(0, 1, (rank, width)) * np.geomspace(10, 0.01, width)
    return frechet.Statistics(rng.normal(0, 1, width), spread / np.sqrt(rank))


def covariance(of):
    return of.root.T @ of.root


# Distance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 20, 200])
def test_to_itself_it_is_0_and_it_is_symmetric(rank, rng):
    one, other = gaussian(rng, 20, rank), gaussian(rng, 20, rank)
    scale = np.trace(covariance(one))
    assert frechet.distance(one, one) < 1e-12 * scale
    assert frechet.distance(one, other) > 0.01 * scale
    assert frechet.distance(one, other) == pytest.approx(frechet.distance(other, one), rel=1e-12)


def test_of_independent_features_it_is_the_closed_form(rng):
    means, deviations = rng.normal(0, 1, (2, 30)), rng.uniform(0, 3, (2, 30))
    deviations[0, :7] = 0
    pair = [frechet.Statistics(m, np.diag(d)) for m, d in zip(means, deviations, strict=True)]
    wanted = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet.distance(*pair) == pytest.approx(wanted, rel=1e-12)


def test_it_is_the_formula_with_the_root_of_the_product(rng):
    """As Heusel et al. write it: the eigenvalues of C1 C2 are those of no symmetric matrix, but real and positive."""
    one, other = gaussian(rng, 12, 50), gaussian(rng, 12, 50)
    values = np.linalg.eigvals(covariance(one) @ covariance(other))
    trace_of_root = np.sqrt(values.astype(complex)).real.sum()
    wanted = np.square(one.mean - other.mean).sum() - 2 * trace_of_root
    wanted += np.trace(covariance(one)) + np.trace(covariance(other))
    assert frechet.distance(one, other) == pytest.approx(wanted, rel=1e-7)


def test_it_does_not_depend_on_the_axes(rng):
    one, other = gaussian(rng, 20, 7), gaussian(rng, 20, 40)
    turn, _ = np.linalg.qr(rng.normal(0, 1, (20, 20)))
    turned = [frechet.Statistics(each.mean @ turn, each.root @ turn) for each in (one, other)]
    assert frechet.distance(*turned) == pytest.approx(frechet.distance(one, other), rel=1e-9)


def test_it_grows_with_the_shift_as_its_square(rng):
    one = gaussian(rng, 20, 50)
    direction = rng.normal(0, 1, 20)
    shifted = [frechet.distance(one, one._replace(mean=one.mean + step * direction)) for step in range(6)]
    np.testing.assert_allclose(shifted, np.arange(6) ** 2 * np.square(direction).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("videos", "size"), [(50, 6), (4, 50)])
def test_statistics_are_those_of_numpy(rng, videos, size):
    """The root of a covariance has no more rows than there are videos."""
    features = rng.normal(1e4, 1, (videos, size)).astype(np.float32)
    found = frechet.statistics(features)
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(0))
    np.testing.assert_allclose(covariance(found), np.cov(features.astype(np.float64), rowvar=False), atol=1e-12)
    assert found.mean.dtype == found.root.dtype == np.float64 and len(found.root) == min(videos, size)


def test_what_has_no_distance_is_refused(rng):
    features = rng.normal(0, 1, (4, 3))
    with pytest.raises(ValueError, match="at least 2 videos, not 1"):
        frechet.statistics(features[:1])
    with pytest.raises(ValueError, match="not finite"):
        frechet.statistics(np.where(features == features.max(), np.nan, features))
    with pytest.raises(ValueError, match="widths 3 and 2"):
        frechet.distance(frechet.statistics(features), frechet.statistics(features[:, :2]))


# With its floor ------------------------------------------------------------------------------------------------------


def test_distance_and_floor_are_of_as_many_videos(rng):
    real, generated = rng.normal(0, 1, (100, 8)), rng.normal(0, 1, (30, 8))
    comparison = frechet.compare(real, generated)
    assert comparison.num_videos == 30
    assert comparison.floor == frechet.compare(real, real[:30]).floor != frechet.compare(real, real[:50]).floor
    assert frechet.compare(real[:40], generated).num_videos == 20
    assert frechet.compare(real, real[50:]).num_videos == 50
    assert str(comparison).startswith("FD-MobileNetV2 ") and "30 videos each" in str(comparison)


def test_videos_like_the_real_ones_are_at_the_floor_and_others_above(rng):
    """Averaged over draws; at few videos both are far from 0, which is why the floor is told."""
    same, other = [], []
    for _ in range(40):
        real, generated = rng.normal(0, 1, (80, 8)), rng.normal(0, 1, (40, 8))
        same.append(frechet.compare(real, generated))
        other.append(frechet.compare(real, generated + 0.3))
    floor = np.mean([each.floor for each in same])
    assert floor > 0.5
    assert np.mean([each.distance for each in same]) == pytest.approx(floor, rel=0.1)
    assert np.mean([each.distance for each in other]) == pytest.approx(floor + 8 * 0.3**2, rel=0.1)


def test_the_floor_is_of_two_sets_that_share_no_video():
    """Features in the order of a set: halves that were cut there would be far apart."""
    features = np.stack([np.arange(64.0), np.ones(64)], 1)
    one, other = frechet._halves(features, 32)
    assert sorted([*one[:, 0], *other[:, 0]]) == list(range(64))
    assert abs(one[:, 0].mean() - other[:, 0].mean()) < 16
    with pytest.raises(ValueError, match="give more real ones"):
        frechet.compare(features[:3], features)


# Features ------------------------------------------------------------------------------------------------------------


def test_projections_are_the_same_for_ever_and_keep_lengths(rng):
    average, change = frechet._projections()
    assert average.shape == change.shape == (1280, 128)
    assert not np.array_equal(average, change)
    signs = "".join("-+"[int(sign > 0)] for sign in (*average[0, :16], *change[-1, -16:]))
    assert signs == "-+-++++++-----+-++-+-++-++-+++-+"
    some = rng.normal(0, 1, (200, 1280))
    ratio = np.square(some @ average).sum(1) / np.square(some).sum(1)
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ratio.std() < 0.2


@pytest.fixture(scope="module")
def videos():
    """Moving things of few kinds, so that few videos are enough for a low floor."""
    few = {"colours": ("red", "orange"), "shapes": ("circle", "square"), "motions": ("left", "right", "up", "down")}
    few |= {"backgrounds": ("white",), "frame_sizes": ((32, 32),), "frame_counts": (9,), "frame_count_weights": ()}
    config = dataclasses.replace(world.COMPACT, **few, holdout_fraction=0.0)
    return [clip.frames_THWC for clip in clips.clips(config, "train", range(72))]


@pytest.fixture(scope="module")
def real_features(videos):
    return frechet.features(videos)


@needs_mobilenet
def test_worse_videos_are_farther_than_the_floor(videos, real_features, rng):
    real, more = real_features[:48], videos[48:]
    good = frechet.compare(real, real_features[48:])
    frozen = [np.repeat(video[:1], len(video), 0) for video in more]
    shuffled = [rng.permutation(video) for video in more]
    noise = [np.clip(video + rng.normal(0, 8, video.shape), 0, 255).astype(np.uint8) for video in more]
    far = {
        name: frechet.compare(real, frechet.features(worse)).distance
        for name, worse in {"frozen": frozen, "shuffled": shuffled, "noise": noise}.items()
    }
    assert good.num_videos == 24
    assert good.distance < 1.15 * good.floor
    assert far["frozen"] > 1.5 * good.floor
    assert far["shuffled"] > 1.3 * good.floor
    assert far["noise"] > 5 * good.floor


@needs_mobilenet
def test_features_are_of_each_video_alone(videos, real_features, rng):
    mixed = [rng.integers(0, 256, (3, 40, 24, 3), np.uint8), videos[5], videos[6][:1], videos[7][::-1]]
    rows = frechet.features(mixed)
    assert rows.shape == (4, 256) and rows.dtype == np.float32
    np.testing.assert_allclose(rows[1], real_features[5], atol=1e-3)
    np.testing.assert_allclose(rows[3], real_features[7], atol=1e-3)  # the same forwards and backwards
    assert np.all(rows[2, 128:] == 0) and np.abs(rows[[0, 1, 3], 128:]).max(1).min() > 0.1
    assert frechet.features([]).shape == (0, 256)


@needs_mobilenet
def test_videos_of_floats_are_refused(videos):
    with pytest.raises(ValueError, match="give uint8"):
        frechet.features([videos[0], videos[1] / 127.5 - 1])
