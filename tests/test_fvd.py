"""Laws of FVD: the published protocol and nothing near it, on a stub of I3D where the network does not matter."""

import hashlib

import numpy as np
import pytest
import scipy.linalg

from sora_jax.evaluate import fvd, i3d


def random_i3d() -> dict[str, np.ndarray]:
    """A state dict that is whole, and not untrained by its looks."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in i3d.tensor_shapes().items():
        spread = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
        centre = 1 if name.endswith(("bn.weight", "running_var")) else 0
        tensors[name] = (centre + random.normal(0, spread, shape)).astype(np.float32)
    return tensors


def make_videos(seed: int, count: int, num_frames: int = 16, height: int = 6, width: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, num_frames, height, width, 3), np.uint8))


def tiny_videos(count: int) -> list[np.ndarray]:
    """Videos of one pixel that tell their number."""
    return [np.full((16, 1, 1, 3), [number // 256, number % 256, 0], np.uint8) for number in range(count)]


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """(weights, clips seen): logits that are a clip's mean colour under a fixed matrix, and a file to name."""
    path, seen = tmp_path / "i3d.npz", []
    path.write_bytes(b"weights")
    matrix = np.random.default_rng(7).normal(size=(3, 400)).astype(np.float32)

    def logits(params, clips):
        seen.append(clips)
        return clips.mean((1, 2, 3)) @ matrix

    monkeypatch.setattr(fvd, "_logits", logits)
    monkeypatch.setattr(i3d, "load_weights", lambda path: {})
    return path, seen, matrix


def test_end_to_end_is_the_frechet_distance_of_logits(monkeypatch, tmp_path):
    """Two videos a side through the whole of I3D; the distance by scipy from what I3D gave."""
    np.savez(tmp_path / "i3d.npz", **random_i3d())
    real, made = make_videos(0, 2, 16, 224, 224), [video // 2 for video in make_videos(1, 2, 18, 224, 224)]
    logits, calls = fvd._logits, []

    def remember(params, clips):
        calls.append((clips, logits(params, clips)))
        return calls[-1][1]

    monkeypatch.setattr(fvd, "_logits", remember)
    result = fvd.fvd(real, made, tmp_path / "i3d.npz", num_videos=2)
    for (clips, _), videos in zip(calls, (real, made), strict=True):
        np.testing.assert_allclose(clips, np.stack([video[:16] for video in videos]) / 127.5 - 1, atol=1e-6)
    features = [np.asarray(given, np.float64) for _, given in calls]
    means, covariances = zip(*((each.mean(0), np.cov(each, rowvar=False)) for each in features), strict=True)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    wanted = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert wanted > 1
    assert result.value == pytest.approx(wanted, rel=1e-3)
    assert str(result) == f"FVD (N=2) {result.value:.1f}"
    assert result.weights_sha256 == hashlib.sha256((tmp_path / "i3d.npz").read_bytes()).hexdigest()


def test_i3d_gets_16_frames_of_224_by_224_in_minus_one_to_one(stub):
    path, seen, _ = stub
    videos = make_videos(0, 3, num_frames=20, height=9, width=300)
    fvd.fvd(videos, videos, path, num_videos=3)
    assert all(clips.shape == (3, 16, 224, 224, 3) and clips.dtype == np.float32 for clips in seen)
    for value, wanted in ((0, -1), (255, 1)):
        video = np.full((16, 8, 8, 3), value, np.uint8)
        np.testing.assert_allclose(fvd.preprocess(video, "video"), wanted, atol=1e-6)


def test_a_shift_of_all_logits_is_its_square(stub):
    path, _, matrix = stub
    colours = np.random.default_rng(0).integers(0, 200, (8, 3))
    real = [np.full((16, 4, 4, 3), colour, np.uint8) for colour in colours]
    made = [video + np.uint8(51) for video in real]
    wanted = np.square(np.full(3, 51 / 127.5) @ matrix).sum()
    assert fvd.fvd(real, made, path, num_videos=8).value == pytest.approx(wanted, rel=1e-3)
    assert fvd.fvd(real, real[::-1], path, num_videos=8).value == pytest.approx(0, abs=1e-3 * wanted)


def test_only_the_first_frames_and_videos_count(stub, monkeypatch):
    path, _, _ = stub
    monkeypatch.setattr(fvd, "BATCH_VIDEOS", 2)
    real, made = make_videos(0, 3, 17), make_videos(1, 4, 19)
    changed = [np.concatenate([video[:16], 255 - video[16:]]) for video in made[:3]] + made[:1]
    one, other = (fvd.fvd(real, videos, path, num_videos=3) for videos in (made, changed))
    assert one.value == other.value > 0
    changed[2] = 255 - changed[2]  # in the last batch, which is not full
    assert fvd.fvd(real, changed, path, num_videos=3).value != one.value


@pytest.mark.parametrize("count", [2, 3, 7])
def test_batches_do_not_matter_and_have_one_shape(stub, monkeypatch, count):
    _, seen, matrix = stub
    monkeypatch.setattr(fvd, "BATCH_VIDEOS", 3)
    videos = make_videos(0, count)
    found = fvd.embed({}, videos, count, "real")
    assert len({clips.shape for clips in seen}) == 1
    alone = [fvd.preprocess(video, "video").mean((0, 1, 2)) @ matrix for video in videos]
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_fewer_than_2048_videos_are_refused_before_any_work():
    few, enough = tiny_videos(2047), tiny_videos(2048)
    with pytest.raises(ValueError, match=r"2047 made videos; FVD is defined on 2048: .* pass num_videos=2047"):
        fvd.fvd(enough, few, "none.pt")
    with pytest.raises(ValueError, match="2047 real videos"):
        fvd.fvd(few, enough, "none.pt")
    with pytest.raises(ValueError, match="2047 real videos, but num_videos is 2048"):
        fvd.fvd(few, enough, "none.pt", num_videos=2048)
    for number in (1, 0, -5):
        with pytest.raises(ValueError, match=f"num_videos is {number}; a covariance needs at least 2"):
            fvd.fvd(enough, enough, "none.pt", num_videos=number)


def test_only_2048_videos_a_side_are_called_fvd(stub, monkeypatch):
    path, _, _ = stub
    read = {"real": [], "made": []}

    def preprocess(frames, name):
        # 224 x 224 would take a minute here.
        read[name.split()[0]].append(256 * int(frames[0, 0, 0, 0]) + int(frames[0, 0, 0, 1]))
        return frames.astype(np.float32)

    monkeypatch.setattr(fvd, "preprocess", preprocess)
    videos = tiny_videos(2100)
    result = fvd.fvd(videos, videos[:2048], path)
    assert (result.name, result.num_videos) == ("FVD", 2048)
    assert read == {"real": list(range(2048)), "made": list(range(2048))}
    for number, name in {2048: "FVD", 2047: "FVD (N=2047)", 2100: "FVD (N=2100)"}.items():
        assert fvd.fvd(videos, videos, path, num_videos=number).name == name


def test_short_videos_and_other_values_are_refused(stub):
    path, _, _ = stub
    good = make_videos(0, 2)
    with pytest.raises(ValueError, match=r"made video 1 has 15 frames; FVD needs 16"):
        fvd.fvd(good, [good[0], good[1][:15]], path, num_videos=2)
    for bad in (good[1] / np.float32(255), good[1][..., :1], good[1][0], good[1][:, :0]):
        with pytest.raises(ValueError, match=r"real video 1 is .*; FVD needs uint8 \(T, H, W, 3\)"):
            fvd.fvd([good[0], bad], good, path, num_videos=2)


def test_there_is_no_fvd_without_weights_of_i3d(tmp_path):
    videos = make_videos(0, 2)
    with pytest.raises(FileNotFoundError, match="FVD needs the weights of I3D"):
        fvd.fvd(videos, videos, tmp_path / "none.pt", num_videos=2)
    np.savez(tmp_path / "other.npz", **{"features.0.weight": np.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"other\.npz is not an I3D"):
        fvd.fvd(videos, videos, tmp_path / "other.npz", num_videos=2)


# Resizing ------------------------------------------------------------------------------------------------------------


def resized_by_hand(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """Bilinear resizing with corners on corners, pixel by pixel, as TensorFlow 1 has it by default."""
    height, width, channels = image_HWC.shape
    result = np.zeros((side, side, channels))
    for y in range(side):
        for x in range(side):
            top, left = int(y * height / side), int(x * width / side)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, along = y * height / side - top, x * width / side - left
            result[y, x] = (1 - down) * ((1 - along) * image_HWC[top, left] + along * image_HWC[top, right])
            result[y, x] += down * ((1 - along) * image_HWC[bottom, left] + along * image_HWC[bottom, right])
    return result


@pytest.mark.parametrize("size", [(5, 7), (64, 96), (300, 225), (1, 448)])
def test_resizing_is_its_definition(size):
    (video,) = make_videos(3, 1, 16, *size)
    found = fvd.preprocess(video, "video")
    for frame in (0, 15):
        np.testing.assert_allclose(found[frame], resized_by_hand(video[frame], 224) / 127.5 - 1, atol=1e-5)


def test_doubling_keeps_every_pixel_and_puts_the_mean_after_it():
    (video,) = make_videos(4, 1, 16, 112, 112)
    found = (fvd.preprocess(video, "video") + 1) * 127.5
    np.testing.assert_allclose(found[:, ::2, ::2], video, atol=1e-3)
    np.testing.assert_allclose(found[:, ::2, 1:-1:2], (video[:, :, :-1] / 2 + video[:, :, 1:] / 2), atol=1e-3)
    np.testing.assert_allclose(found[:, ::2, -1], video[:, :, -1], atol=1e-3)


def test_video_of_224_is_untouched():
    (video,) = make_videos(5, 1, 16, 224, 224)
    np.testing.assert_allclose(fvd.preprocess(video, "video"), video / 127.5 - 1, atol=1e-6)
