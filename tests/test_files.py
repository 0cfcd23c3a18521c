"""Laws of sample files: what is decoded is what was written, and a file is there whole or not at all."""

import base64
import io

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax.generate import files


def make_video(num_frames=9, height=48, width=64):
    """A bright blob goes round to the right, over a colour ramp; smooth, as 4:2:0 halves the chroma."""
    t, y, x = np.mgrid[0:num_frames, 0:height, 0:width].astype(np.float64)
    disc = np.exp(-((x - (width / 4 + 3 * t) % width) ** 2 + (y - height / 2) ** 2) / 80)
    ramp = np.stack([x / width, y / height, 0.5 + 0 * t], axis=-1)
    return np.round(255 * (0.6 * ramp + 0.4 * disc[..., None])).astype(np.uint8)


def decode(content):
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        # Read while the container is open: a stream of a closed one has no memory of its own.
        info = {
            "fps": float(stream.average_rate),
            "seconds": float(stream.duration * stream.time_base),
            "codec": (stream.codec_context.name, stream.codec_context.pix_fmt),
        }
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), info


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9))


@pytest.mark.parametrize("fps", [8.0, 12.5, 30000 / 1001])
def test_mp4_round_trip(tmp_path, fps):
    video = make_video()
    files.write_video(tmp_path / "a.mp4", video, fps)
    frames, info = decode((tmp_path / "a.mp4").read_bytes())
    assert frames.shape == video.shape
    assert psnr(frames, video) > 40
    assert psnr(frames[1:], video[:-1]) < 35  # the frames are in order: one frame off is worse
    assert info["fps"] == pytest.approx(fps, rel=1e-6)
    assert info["seconds"] == pytest.approx(len(video) / fps, rel=1e-3)
    assert info["codec"] == ("h264", "yuv420p")


@pytest.mark.parametrize("colour", [(200, 30, 40), (20, 200, 40), (20, 30, 240), (255, 255, 255), (0, 0, 0)])
def test_mp4_keeps_colours(colour):
    """A wrong colour matrix or range shifts these by 10 and more."""
    video = np.full((3, 32, 32, 3), colour, np.uint8)
    frames, _ = decode(files.encode_video(video, 8, "mp4"))
    assert np.abs(frames.astype(int) - video).max() <= 3


def test_mp4_of_odd_size_is_padded_by_its_edge():
    video = make_video(height=47, width=63)
    frames, _ = decode(files.encode_video(video, 8, "mp4"))
    assert frames.shape == (9, 48, 64, 3)
    assert psnr(frames[:, :47, :63], video) > 40
    assert psnr(frames[:, 47, :63], video[:, 46]) > 35


@pytest.mark.parametrize("format", ["mp4", "gif", "png"])
def test_single_frames_and_grey(format):
    grey = make_video(num_frames=1)[..., :1]
    content = files.encode_video(grey, 8, format)
    frames = decode(content)[0] if format == "mp4" else np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[None]
    assert frames.shape == (1, 48, 64, 3)
    assert psnr(frames, np.broadcast_to(grey, frames.shape)) > 38


def test_scale_repeats_pixels():
    video = make_video(num_frames=1, height=5, width=7)
    image = np.asarray(Image.open(io.BytesIO(files.encode_video(video, 8, "png", scale=3))))
    assert image.shape == (15, 21, 3)
    for i in range(3):
        for j in range(3):
            np.testing.assert_array_equal(image[i::3, j::3], video[0])


@pytest.mark.parametrize(("fps", "num_frames"), [(24, 48), (8, 9), (30, 30)])
def test_gif_plays_at_the_right_rate(tmp_path, fps, num_frames):
    video = make_video(num_frames=num_frames)
    files.write_video(tmp_path / "a.gif", video, fps)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == num_frames
        assert image.info["loop"] == 0
        milliseconds = 0
        for index in range(num_frames):
            image.seek(index)
            milliseconds += image.info["duration"]
            assert psnr(np.asarray(image.convert("RGB")), video[index]) > 30
    assert milliseconds / 1000 == pytest.approx(num_frames / fps, abs=0.005)


def test_png_of_a_video_shows_first_and_last_frame():
    video = make_video(num_frames=20)
    image = np.asarray(Image.open(io.BytesIO(files.encode_video(video, 8, "png"))))
    assert image.shape == (48, 8 * 64 + 7 * 2, 3)
    np.testing.assert_array_equal(image[:, :64], video[0])
    np.testing.assert_array_equal(image[:, -64:], video[-1])


def test_contact_sheet_places_native_sizes():
    wide, tall = make_video(9, 20, 30), make_video(3, 40, 10)
    single = make_video(1, 10, 10)
    sheet = files.contact_sheet([wide, tall, single], columns=2, frames_per_video=4, gap=5)
    width_left, width_right = 4 * 30 + 3 * 5, 3 * 10 + 2 * 5
    assert sheet.shape == (40 + 10 + 3 * 5, width_left + width_right + 3 * 5, 3)
    for column, frame in enumerate([0, 3, 5, 8]):
        np.testing.assert_array_equal(sheet[5:25, 5 + 35 * column :][:, :30], wide[frame])
    for column in range(3):
        np.testing.assert_array_equal(sheet[5:45, 10 + width_left + 15 * column :][:, :10], tall[column])
    np.testing.assert_array_equal(sheet[50:60, 5:15], single[0])
    assert (sheet[50:60, 15:] == 255).all()


def test_contact_sheet_labels_stand_above_and_fit():
    video = make_video(4, 20, 30)
    plain = files.contact_sheet([video, video])
    labelled = files.contact_sheet([video, video], ["a red disc moves over a ramp", "extraordinarily " * 40])
    assert labelled.shape[1] == plain.shape[1]
    assert plain.shape[0] < labelled.shape[0] <= plain.shape[0] + 2 * 3 * 16
    label = labelled[4 : labelled.shape[0] - plain.shape[0], 4:-4]
    assert (label < 128).any()
    with pytest.raises(ValueError, match="1 labels for 2 videos"):
        files.contact_sheet([video, video], ["one"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.mp4"
    files.write_video(path, make_video(), 8)
    before = path.read_bytes()
    written = []

    def fail(self, target):
        written.append(self.read_bytes())
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_video(path, make_video(num_frames=3), 8)
    assert len(decode(written[0])[0]) == 3  # what would have been renamed was whole
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_errors_say_what_is_needed(tmp_path):
    video = make_video()
    with pytest.raises(ValueError, match=r"cannot write 'avi'; use one of \.mp4, \.gif, \.png"):
        files.write_video(tmp_path / "a.avi", video, 8)
    with pytest.raises(ValueError, match=r"float32\[9, 48, 64, 3\]; uint8 .* map \[-1, 1\]"):
        files.write_video(tmp_path / "a.mp4", video.astype(np.float32), 8)
    with pytest.raises(ValueError, match="fps is 0"):
        files.write_video(tmp_path / "a.mp4", video, 0)
    with pytest.raises(ValueError, match="scale is 0"):
        files.write_video(tmp_path / "a.mp4", video, 8, scale=0)
    assert list(tmp_path.iterdir()) == []


def test_data_uri_carries_the_bytes(tmp_path):
    content = files.encode_video(make_video(), 8, "mp4")
    (tmp_path / "a.mp4").write_bytes(content)
    head, body = files.data_uri(tmp_path / "a.mp4").split(",")
    assert head == "data:video/mp4;base64"
    assert base64.b64decode(body) == content
    assert files.data_uri(content, "video/mp4") == f"{head},{body}"
    with pytest.raises(ValueError, match="pass mime"):
        files.data_uri(content)
