"""Laws of reading: frames come upright, whole, at the wanted size and time, or a sentence says why not."""

import functools
import io
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sora_jax.generate import files, media
from sora_jax.generate.media import Fit, Limits, Part


def picture(height=24, width=36):
    """Smooth and without any symmetry."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    return np.round(np.stack([255 * x / width, 255 * y / height, 127 + 0 * x], -1)).astype(np.uint8)


def counting(num_frames, height=16, width=16):
    """Frame k is of the grey 10 + 10 k."""
    return np.broadcast_to(
        (10 + 10 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, height, width, 3)
    )


def numbers(frames):
    """Which frames of counting() these are."""
    return np.round((frames.mean((1, 2, 3)) - 10) / 10).astype(int).tolist()


def save(path, image, **settings):
    Image.fromarray(image).save(path, **settings)
    return path


# Fitting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", media.HOW)
def test_fit_to_its_own_size_changes_nothing(how, rng):
    frames = rng.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    fitted = media.fit(frames, Fit(20, 30, how))
    assert fitted.frames_THWC is frames and fitted.given_HW.all() and fitted.told is None
    mask = rng.random((2, 20, 30)) < 0.3
    np.testing.assert_array_equal(media.fit_mask(mask, Fit(20, 30, how)), mask)


@pytest.mark.parametrize("size", [(64, 64), (8, 64), (64, 8), (16, 24), (240, 7)])
@pytest.mark.parametrize("source", [(20, 30), (300, 17), (1, 50), (480, 640)])
def test_letterbox_shows_everything_at_its_aspect_within_a_pixel(source, size):
    (height, width), (H, W) = source, size
    fitted = media.fit(np.full((1, height, width, 3), 200, np.uint8), Fit(H, W, "letterbox"))
    assert fitted.frames_THWC.shape == (1, H, W, 3)
    assert (fitted.frames_THWC == 200).all()  # what is left over repeats the edge
    rows, columns = np.flatnonzero(fitted.given_HW.any(1)), np.flatnonzero(fitted.given_HW.any(0))
    assert fitted.given_HW.sum() == len(rows) * len(columns)
    scale = min(H / height, W / width)
    assert abs(len(rows) - height * scale) <= 1 and abs(len(columns) - width * scale) <= 1
    assert len(rows) == H or len(columns) == W
    assert abs(rows[0] - (H - 1 - rows[-1])) <= 1 and abs(columns[0] - (W - 1 - columns[-1])) <= 1


@pytest.mark.parametrize("size", [(64, 64), (8, 64), (64, 8), (16, 24)])
@pytest.mark.parametrize("source", [(40, 60), (300, 34), (480, 640)])
def test_crop_fills_the_size_and_keeps_aspect_and_centre(source, size):
    """The gradient of a ramp tells the scale along each axis, its mean the centre."""
    (height, width), (H, W) = source, size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    ramp = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, 0 * x], -1)
    fitted = media.fit(np.round(ramp).astype(np.uint8)[None], Fit(H, W, "crop"))
    assert fitted.given_HW.all() and fitted.frames_THWC.shape == (1, H, W, 3)
    scale = max(H / height, W / width)
    across, down = fitted.frames_THWC[0, :, :, 0].mean(0), fitted.frames_THWC[0, :, :, 1].mean(1)
    for line, length, shown in ((across, width, W), (down, height, H)):
        assert line.mean() == pytest.approx(127.5, abs=1.5)
        seen = (line[-2] - line[1]) / 255 * length / (shown - 3)  # source pixels a pixel
        assert seen == pytest.approx(1 / scale, rel=0.1, abs=2 * length / 255 / (shown - 3))


@pytest.mark.parametrize(("height", "width", "scale"), [(16, 16, 8), (24, 40, 3), (7, 9, 2)])
def test_what_was_enlarged_for_the_eye_comes_back_as_it_was(height, width, scale, rng):
    small = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    large = small.repeat(scale, 1).repeat(scale, 2)
    for how in media.HOW:
        np.testing.assert_array_equal(media.fit(large, Fit(height, width, how)).frames_THWC, small)


@given(st.integers(8, 4096), st.integers(8, 4096), st.integers(1, 8))
def test_the_nearest_shape_loses_least_to_a_crop(height, width, scale):
    sizes = ((32, 32), (48, 32), (32, 48), (64, 64))

    def kept(size):
        return min(height * size[1], width * size[0]) / max(height * size[1], width * size[0])

    nearest = media.nearest_shape(sizes, (height, width))
    assert kept(nearest) >= max(map(kept, sizes)) * (1 - 1e-6)
    assert media.nearest_shape(sizes, (48 * scale, 32 * scale)) == (48, 32)
    assert media.nearest_shape(sizes, (scale, scale)) == (32, 32)


def test_a_letterbox_begins_with_a_cell():
    for source, first in (((16, 48), 16), ((16, 32), 8), ((48, 48), 0)):
        given = media.fit(np.zeros((1, *source, 3), np.uint8), Fit(48, 48, "letterbox", (8, 8))).given_HW
        assert np.flatnonzero(given.all(1))[0] == first


def test_scaling_down_averages():
    """A checkerboard becomes grey; without antialiasing it stays black and white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = media.fit(np.repeat(board[None, :, :, None], 3, -1), Fit(8, 8))
    assert np.abs(fitted.frames_THWC.astype(int) - 127).max() < 16


@pytest.mark.parametrize("how", media.HOW)
@pytest.mark.parametrize("size", [(24, 16), (7, 50), (80, 90), (33, 31)])
def test_no_masked_pixel_has_part_in_what_is_kept(how, size, rng):
    """Whatever is under the mask, the rest of the fitted frame is the same: nothing leaks."""
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 11:25, 30:47] = True
    frames = rng.integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    other = np.where(mask[..., None], 255 - frames, frames)
    fitted = media.fit_mask(mask, Fit(*size, how))
    a, b = (media.fit(x, Fit(*size, how)) for x in (frames, other))
    kept = ~fitted[0] & a.given_HW
    np.testing.assert_array_equal(a.frames_THWC[0][kept], b.frames_THWC[0][kept])
    assert 0 < fitted.sum() < fitted.size / 2


def test_fit_says_what_was_done():
    frames = np.zeros((1, 40, 60, 3), np.uint8)
    assert media.fit(frames, Fit(20, 20)).told == (
        "40x60 is scaled to 20x20, with 33 % cut off at the edges (--fit=letterbox keeps them)"
    )
    assert media.fit(frames, Fit(20, 30)).told == "40x60 is scaled to 20x30"
    told = media.fit(frames, Fit(30, 30, "letterbox")).told
    assert told == "40x60 is scaled to 20x30 within 30x30; the model paints what is left over"
    with pytest.raises(ValueError, match="'stretch' is unknown; use one of crop, letterbox"):
        media.fit(frames, Fit(30, 30, "stretch"))
    with pytest.raises(ValueError, match="cannot fit 40x60 to 0x30"):
        media.fit(frames, Fit(0, 30))


# Images -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "jpg", "webp", "avif"])
def test_images_come_as_they_are(tmp_path, suffix):
    lossless = suffix in ("png", "bmp", "tiff", "ppm")
    path = save(tmp_path / f"a.{suffix}", picture(), **({} if lossless else {"quality": 100}))
    video = media.read(path)
    assert video.fps is None and video.source_size == (24, 36) and video.given_HW.all()
    assert np.abs(video.frames_THWC[0].astype(int) - picture()).max() <= (0 if lossless else 12)


def test_what_a_file_is_its_bytes_say(tmp_path):
    save(tmp_path / "a.png", picture())
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    np.testing.assert_array_equal(media.read(tmp_path / "a.mp4").frames_THWC[0], picture())
    (tmp_path / "b.png").write_bytes(files.encode_video(counting(5), 8, "mp4"))
    assert numbers(media.read(tmp_path / "b.png").frames_THWC) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """Orientation n says how what is stored became of what is seen; the inverse of each is written out here."""
    seen = picture()
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen),
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(media.read(path).frames_THWC[0], seen)


def test_modes_become_rgb(tmp_path):
    grey = picture()[..., 0]
    half = np.full((24, 36), 128, np.uint8)
    clear = np.zeros((24, 36), np.uint8)
    cases = {
        "grey": (Image.fromarray(grey), grey),
        "deep": (Image.fromarray(grey.astype(np.uint16) << 8), grey),
        "clear": (Image.fromarray(np.dstack([picture(), clear])), 255),
        "half": (Image.fromarray(np.dstack([0 * picture(), half])), 127),
        "palette": (Image.fromarray(picture() * 0 + 40).quantize(4), 40),
        "bits": (Image.fromarray(np.full((24, 36), True)), 255),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        frames = media.read(tmp_path / f"{name}.png").frames_THWC
        assert frames.shape == (1, 24, 36, 3) and frames.dtype == np.uint8
        shown = expected[..., None] if isinstance(expected, np.ndarray) else expected
        assert np.abs(frames[0].astype(int) - shown).max() <= 1, name


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(media.MediaError, match=r"a\.tiff holds floating point values.*convert it to 8 bits"):
        media.read(tmp_path / "a.tiff")


def test_read_image_takes_the_first_frame_and_no_video(tmp_path):
    files.write_video(tmp_path / "a.gif", counting(4), 10)
    video = media.read_image(tmp_path / "a.gif")
    assert numbers(video.frames_THWC) == [0] and video.fps is None
    assert video.told[-1].endswith("a.gif, which is animated, the first frame is taken")
    files.write_video(tmp_path / "a.mp4", counting(4), 10)
    with pytest.raises(media.MediaError, match=r"a\.mp4 is a video where an image is needed.*extend"):
        media.read_image(tmp_path / "a.mp4")


# Videos -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mp4", "gif"])
@pytest.mark.parametrize("fps", [8, 10, 24, 30000 / 1001])
def test_every_frame_of_a_written_video_is_read(tmp_path, format, fps):
    files.write_video(tmp_path / f"a.{format}", counting(21), fps)
    for rate in (None, fps):
        video = media.read(tmp_path / f"a.{format}", rate)
        assert numbers(video.frames_THWC) == list(range(21))
    assert format == "gif" or video.fps == pytest.approx(fps)


@pytest.mark.parametrize("format", ["mp4", "gif"])
@pytest.mark.parametrize(
    ("source", "rate", "expected"),
    [
        (20, 10, [0, 2, 4, 6, 8, 10]),
        (20, 5, [0, 4, 8]),
        (10, 20, [k // 2 for k in range(22)]),
        (10, 25, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
    ],
)
def test_another_rate_shows_what_a_player_shows_then(tmp_path, format, source, rate, expected):
    files.write_video(tmp_path / f"a.{format}", counting(11), source)
    video = media.read(tmp_path / f"a.{format}", rate)
    found = numbers(video.frames_THWC)
    assert found[: len(expected)] == expected
    assert len(found) == pytest.approx(11 * rate / source, abs=0.51)
    assert any(f"{source} frames a second and is taken at {rate}" in line for line in video.told)


def variable(stamps, end, rate=10):
    """A Matroska file whose frame k is shown from stamps[k] (milliseconds)."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate, options={"crf": "10"})
        stream.height = stream.width = 16
        stream.codec_context.time_base = Fraction(1, 1000)
        stamped = [*stamps, end]
        for number, image in enumerate(counting(len(stamps))):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = stamped[number], Fraction(1, 1000)
            frame.duration = stamped[number + 1] - stamped[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def test_variable_rates_go_by_time_stamps(tmp_path):
    (tmp_path / "a.mkv").write_bytes(variable([0, 100, 600, 700], 1000))
    found = numbers(media.read(tmp_path / "a.mkv", 10).frames_THWC)
    assert found[:7] == [0, 1, 1, 1, 1, 1, 2] and set(found[7:]) == {3}


def test_stamps_may_start_anywhere(tmp_path):
    (tmp_path / "a.mkv").write_bytes(variable([5000, 5100, 5200], 5300))
    assert numbers(media.read(tmp_path / "a.mkv", 10).frames_THWC) == [0, 1, 2]


def test_gif_frames_last_as_long_as_they_say(tmp_path):
    images = [Image.fromarray(frame) for frame in counting(3)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 300, 200])
    assert numbers(media.read(tmp_path / "a.gif", 10).frames_THWC) == [0, 1, 1, 1, 2, 2]


def test_short_frames_before_a_long_one_are_not_passed_over(tmp_path):
    """The usual frame lasts half a second here, the first twentieths."""
    images = [Image.fromarray(frame) for frame in counting(6)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[50] * 5 + [3000])
    assert numbers(media.read_image(tmp_path / "a.gif").frames_THWC) == [0]
    assert numbers(media.read(tmp_path / "a.gif", 20).frames_THWC)[:6] == [0, 1, 2, 3, 4, 5]
    assert numbers(media.read(tmp_path / "a.gif", None).frames_THWC)[0] == 0


def test_animated_webp(tmp_path):
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in counting(3)]
    images[0].save(
        tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=[100, 200, 100], lossless=True
    )
    assert numbers(media.read(tmp_path / "a.webp", 10).frames_THWC) == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Part(0.5), [5, 6, 7, 8, 9]),
        (Part(0.2, 0.5), [2, 3, 4]),
        (Part(0, 0.3), [0, 1, 2]),
        (Part(0.4, 99), [4, 5, 6, 7, 8, 9]),
    ],
)
def test_parts(tmp_path, part, expected):
    files.write_video(tmp_path / "a.mp4", counting(10), 10)
    assert numbers(media.read(tmp_path / "a.mp4", part=part).frames_THWC) == expected
    with pytest.raises(media.MediaError, match="no frame between seconds 3 and inf"):
        media.read(tmp_path / "a.mp4", part=Part(3.0))


@pytest.mark.parametrize(("turn", "matrix"), [(1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (3, (0, -1, 1, 0))])
def test_rotation_of_phones_is_applied(tmp_path, turn, matrix):
    """The matrix of the track header in place of the identity: 90, 180 and 270 degrees clockwise."""
    content = files.encode_video(np.repeat(picture(16, 32)[None], 2, 0), 8, "mp4")
    a, b, c, d = (value << 16 for value in matrix)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content[:at] + turned + content[at + len(turned) :])
    upright = np.rot90(picture(16, 32), -turn)
    found = media.read(tmp_path / "a.mp4").frames_THWC[0]
    assert found.shape == upright.shape and media.size_of(tmp_path / "a.mp4") == upright.shape[:2]
    assert np.abs(found.astype(int) - upright).mean() < 6


@pytest.mark.parametrize(
    ("shape", "shown"), [((1, 1), (16, 32)), ((2, 1), (16, 64)), ((1, 2), (32, 32)), ((4, 3), (16, 43))]
)
def test_pixels_that_are_not_square_are_drawn_out(tmp_path, shape, shown):
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*shape)
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(16, 32), format="rgb24")))
        container.mux(stream.encode())
    assert media.read(tmp_path / "a.mp4").frames_THWC.shape == (2, *shown, 3)


def test_reading_fits_frame_by_frame(tmp_path, rng):
    frames = np.repeat(picture()[None], 3, 0)
    files.write_video(tmp_path / "a.mp4", frames, 8)
    plain = media.read(tmp_path / "a.mp4")
    for how in media.HOW:
        video = media.read(tmp_path / "a.mp4", size=Fit(16, 16, how))
        fitted = media.fit(plain.frames_THWC, Fit(16, 16, how))
        np.testing.assert_array_equal(video.frames_THWC, fitted.frames_THWC)
        np.testing.assert_array_equal(video.given_HW, fitted.given_HW)
        assert video.told == (f"a.mp4: {fitted.told}",)
        assert video.source_size == (24, 36)


def test_masks_are_white_where_things_are_made_anew(tmp_path):
    expected = np.zeros((16, 24), bool)
    expected[3:9, 5:20] = True
    grey = np.where(expected, 200, 60).astype(np.uint8)
    save(tmp_path / "a.png", grey)
    mask = media.read_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(mask.new_THW[0], expected)
    assert mask.source_size == (16, 24)
    white = np.full((16, 24, 3), 255, np.uint8)
    save(tmp_path / "b.png", np.dstack([white, 255 * expected.astype(np.uint8)]))
    np.testing.assert_array_equal(media.read_mask(tmp_path / "b.png").new_THW[0], expected)
    moving = np.stack([np.roll(expected, k, 1) for k in range(3)])
    files.write_video(tmp_path / "a.mp4", 255 * np.repeat(moving[..., None], 3, -1).astype(np.uint8), 8)
    found = media.read_mask(tmp_path / "a.mp4", 8).new_THW
    assert found.shape == moving.shape and (found != moving).mean() < 0.02


# Hostile files ------------------------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that says it is so large, and holds nothing."""
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "damaged, or no image or video"),
        (b"hello " * 1000, "damaged, or no image or video"),
        (PLAYLIST, "damaged, or no image or video"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "damaged, or no image or video"),
        (png_header(60_000, 60_000), "too many pixels; make it smaller"),
        (png_header(9_000, 9_000), "9000x9000 pixels a frame, more than 33,554,432; make it smaller"),
        (png_header(2**31 - 1, 2**31 - 1), "too many pixels|damaged"),
        (png_header(100, 100), "damaged"),
        (png_header(0, 10), "damaged|says its frames are"),
    ],
)
def test_hostile_files_are_refused_in_a_sentence(tmp_path, content, match):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    files.write_video(tmp_path / "other.mp4", counting(2), 8)
    begin = time.monotonic()
    with pytest.raises(media.MediaError, match=match) as caught:
        media.read(path)
    assert "a.mp4" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - begin < 5


def test_what_is_no_file_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path, match in [
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        (tmp_path / "none.png", "cannot read .*none.png: No such file"),
    ]:
        with pytest.raises(media.MediaError, match=match):
            media.read(path)
    with pytest.raises(media.MediaError, match="cannot read"):
        media.read(tmp_path / "a\0b")


@pytest.mark.parametrize("format", ["mp4", "gif"])
@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(file_bytes=50), "bytes, more than 50"),
        (Limits(frame_pixels=100), "16x16 pixels a frame, more than 100|damaged"),
        (Limits(frames=5), "frames"),
        (Limits(seconds=0.5), "seconds"),
        (Limits(kept_pixels=16 * 16 * 4), "more than 4 frames of 16x16; use a part of it"),
    ],
)
def test_limits(tmp_path, format, limits, match):
    files.write_video(tmp_path / f"a.{format}", counting(20), 20)
    with pytest.raises(media.MediaError, match=match):
        media.read(tmp_path / f"a.{format}", limits=limits)


def test_a_gap_in_time_is_no_bomb(tmp_path):
    """Two frames, the second a month later, would be 20 million at 8 frames a second."""
    (tmp_path / "a.mkv").write_bytes(variable([0, 30 * 86_400_000], 30 * 86_400_000 + 100))
    with pytest.raises(media.MediaError, match="seconds"):
        media.read(tmp_path / "a.mkv", 8)
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in counting(2)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[650_000, 100])
    with pytest.raises(media.MediaError, match="too long: more than 100 frames of 16x16"):
        media.read(tmp_path / "a.gif", 8, limits=Limits(frames=100))


@functools.cache
def originals():
    def image(format, **settings):
        file = io.BytesIO()
        Image.fromarray(picture()).save(file, format=format, **settings)
        return file.getvalue()

    return {
        "png": image("PNG"),
        "jpg": image("JPEG"),
        "webp": image("WEBP"),
        "avif": image("AVIF"),
        "tiff": image("TIFF"),
        "bmp": image("BMP"),
        "gif": files.encode_video(counting(4), 10, "gif"),
        "mp4": files.encode_video(counting(6), 8, "mp4"),
        "mkv": variable([0, 100, 200], 300),
    }


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "avif", "tiff", "bmp", "gif", "mp4", "mkv"])
def test_mutated_files_are_read_or_refused(tmp_path, format):
    """Cut, flipped, doubled and overwritten bytes: frames or a MediaError, and nothing else."""
    rng = np.random.default_rng(list(format.encode()))
    good = originals()[format]
    path = tmp_path / f"a.{format}"
    limits = Limits(frame_pixels=2**16, frames=64, seconds=60, kept_pixels=2**20)
    refused = 0
    for _ in range(60):
        content = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(0, max(1, len(content))))
            match rng.integers(0, 4):
                case 0:
                    del content[at:]
                case 1:
                    content[at : at + 1] = bytes([int(rng.integers(0, 256))])
                case 2:
                    content[at:at] = content[at : at + int(rng.integers(1, 64))]
                case 3:
                    content[at : at + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1])))
        path.write_bytes(content)
        try:
            video = media.read(path, 8, Fit(16, 16), limits=limits)
        except media.MediaError as error:
            refused += 1
            assert path.name in str(error) and "\n" not in str(error)
        else:
            assert video.frames_THWC.shape[1:] == (16, 16, 3) and len(video.frames_THWC) <= 64
    assert refused > 5
