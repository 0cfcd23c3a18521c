"""Images, videos and masks of users as frames of a wanted size and rate. Files are not trusted.

What a file says of itself is held against Limits before its pixels are decoded, and what is decoded again. Every refusal is a
MediaError with one sentence that names the file and a remedy. What a file is, its bytes say, not its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

HOW = ("crop", "letterbox")

# Formats by their readers' names. Playlists and the like are not among them: they would have the reader open other files.
_IMAGES = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_VIDEOS = "mov,matroska,webm,avi,mpeg,mpegts,flv,ogg,asf,h264,hevc,ivf,m4v,mjpeg,yuv4mpegpipe"
# Browsers play frames that claim to last shorter for 100 ms.
_SHORTEST_SECONDS = 0.02
_UNTOLD_SECONDS = 0.1


class MediaError(ValueError):
    """A file that cannot be used; the message is one sentence with a remedy."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that is read of one file: bytes, pixels a frame (8K by default), frames, seconds, and pixels of all frames that
    are kept, after they were fitted."""

    file_bytes: int = 2**31
    frame_pixels: int = 2**25
    frames: int = 2**17
    seconds: float = 3600.0
    kept_pixels: int = 2**30


class Fit(NamedTuple):
    """The size in pixels that frames are brought to, and how: 'crop' fills it, 'letterbox' shows all of the frame in it.

    cell is the (height, width) of a model's token, which is given only if all of it is.
    """

    height: int
    width: int
    how: str = "crop"
    cell: tuple[int, int] = (1, 1)


class Fitted(NamedTuple):
    """Frames of the wanted size; given_HW is False where there was nothing to show; told is None if nothing had to be done."""

    frames_THWC: np.ndarray
    given_HW: np.ndarray
    told: str | None


class Video(NamedTuple):
    """What a file shows. fps is None for an image; source_size is (height, width) in the file; told is for the user."""

    frames_THWC: np.ndarray
    given_HW: np.ndarray
    fps: float | None
    source_size: tuple[int, int]
    told: tuple[str, ...]


class Mask(NamedTuple):
    """new_THW is True where the mask is white: what is to be made anew. T is 1 for an image."""

    new_THW: np.ndarray
    source_size: tuple[int, int]


class Part(NamedTuple):
    """Seconds of a video, from start to before end; None is its end."""

    start: float = 0.0
    end: float | None = None


WHOLE = Part()
LIMITS = Limits()


# Fitting ------------------------------------------------------------------------------------------------------------


def fit(frames_THWC: UInt8[np.ndarray, "T H W 3"], size: Fit) -> Fitted:
    """Frames brought to another size by Pillow's antialiased bilinear filter, which keeps their aspect.

    What was enlarged by a whole factor, as samples are written, is averaged back to what it was. 'crop' takes the largest
    centred part that has the wanted aspect. 'letterbox' scales the whole frame to within the size, its aspect right within a
    pixel, in the middle as far as it begins with a cell; what is left over is not given and repeats the nearest edge. Frames
    that have the size come back as they are. Raises ValueError for another `how` or an empty size.
    """
    height, width = frames_THWC.shape[1:3]
    box = _box(height, width, size)
    if (height, width) == (size.height, size.width):
        return Fitted(frames_THWC, np.ones((height, width), bool), None)
    fitted = np.stack([_resized(frame, box, size) for frame in frames_THWC])
    given = np.zeros((size.height, size.width), bool)
    given[box.top : box.top + box.height, box.left : box.left + box.width] = True
    return Fitted(fitted, given, _told(height, width, box, size))


def fit_mask(new_THW: Bool[np.ndarray, "T H W"], size: Fit) -> Bool[np.ndarray, "T h w"]:
    """The mask of frames that went through fit: True wherever a masked pixel has any part in the fitted one."""
    height, width = new_THW.shape[1:]
    box = _box(height, width, size)
    if (height, width) == (size.height, size.width):
        return new_THW
    # Weights of this filter are never negative: their sum is zero only where no masked pixel was seen.
    parts = [_resized(mask.astype(np.float32), box, size) > 0 for mask in new_THW]
    fitted = np.stack(parts)
    fitted[:, : box.top] = fitted[:, box.top + box.height :] = False
    fitted[:, :, : box.left] = fitted[:, :, box.left + box.width :] = False
    return fitted


class _Box(NamedTuple):
    """The part (left, upper, right, lower) of a frame that is shown, and where it goes."""

    source: tuple[float, float, float, float]
    top: int
    left: int
    height: int
    width: int


def _box(height: int, width: int, size: Fit) -> _Box:
    if size.how not in HOW:
        raise ValueError(f"fit {size.how!r} is unknown; use one of {', '.join(HOW)}")
    if min(size.height, size.width, height, width) < 1:
        raise ValueError(f"cannot fit {height}x{width} to {size.height}x{size.width}; all must be at least 1")
    if size.how == "crop":
        scale = max(size.height / height, size.width / width)
        shown_height, shown_width = min(height, size.height / scale), min(width, size.width / scale)
        upper, left = (height - shown_height) / 2, (width - shown_width) / 2
        return _Box((left, upper, left + shown_width, upper + shown_height), 0, 0, size.height, size.width)
    scale = min(size.height / height, size.width / width)
    inner_height = min(size.height, max(1, round(height * scale)))
    inner_width = min(size.width, max(1, round(width * scale)))
    top, left = (
        (outer - inner) // 2 // cell * cell
        for outer, inner, cell in zip((size.height, size.width), (inner_height, inner_width), size.cell, strict=True)
    )
    return _Box((0, 0, width, height), top, left, inner_height, inner_width)


def _resized(image: np.ndarray, box: _Box, size: Fit) -> np.ndarray:
    from PIL import Image

    left, upper, right, lower = box.source
    whole = (right - left) % box.width == (lower - upper) % box.height == 0
    filter_ = Image.Resampling.BOX if whole else Image.Resampling.BILINEAR
    shown = np.asarray(Image.fromarray(image).resize((box.width, box.height), filter_, box=box.source))
    below, beside = size.height - box.top - box.height, size.width - box.left - box.width
    edges = ((box.top, below), (box.left, beside), (0, 0))
    return np.pad(shown, edges[: image.ndim], mode="edge")


def _told(height: int, width: int, box: _Box, size: Fit) -> str:
    left, upper, right, lower = box.source
    if size.how == "letterbox":
        rest = "" if (box.height, box.width) == (size.height, size.width) else f" within {size.height}x{size.width}"
        painted = "; the model paints what is left over" if rest else ""
        return f"{height}x{width} is scaled to {box.height}x{box.width}{rest}{painted}"
    cut = round(100 * (1 - (right - left) * (lower - upper) / (height * width)))
    cropped = f", with {cut} % cut off at the edges (--fit=letterbox keeps them)" if cut else ""
    return f"{height}x{width} is scaled to {size.height}x{size.width}{cropped}"


def nearest_shape(sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> tuple[int, int]:
    """Of (height, width)s the one whose aspect is nearest to that of `size`; of several, the first."""
    return min(sizes, key=lambda each: round(abs(math.log(each[0] * size[1] / (each[1] * size[0]))), 9))


# Reading ------------------------------------------------------------------------------------------------------------


def read(
    path: Path, fps: float | None = None, size: Fit | None = None, part: Part = WHOLE, limits: Limits = LIMITS
) -> Video:
    """The frames of an image or a video, fitted one by one.

    A video is resampled to fps by its time stamps (None: to its own mean rate): frame k of the result is what a player shows
    at second part.start + k / fps. EXIF orientation and a video's rotation are applied, a video's pixels are made
    square, transparent ones are shown on white. Raises MediaError.
    """
    with _opened(path, limits, background=255) as source:
        rate = source.rate if fps is None or source.rate is None else fps
        given: list[np.ndarray] = []
        told: list[str] = []

        def place(image_HWC: np.ndarray) -> np.ndarray:
            if size is None:
                return image_HWC
            fitted = fit(image_HWC[None], size)
            if not given:
                given.append(fitted.given_HW)
                told.extend([f"{path.name}: {fitted.told}"] if fitted.told else [])
            return fitted.frames_THWC[0]

        frames, source_size = _gather(path, source, rate, part, limits, place)
        if rate is not None and source.rate is not None and not math.isclose(rate, source.rate, rel_tol=1e-3):
            told.append(f"{path.name} has {source.rate:.4g} frames a second and is taken at {rate:g}")
    return Video(frames, given[0] if given else np.ones(source_size, bool), rate, source_size, tuple(told))


def size_of(path: Path, limits: Limits = LIMITS) -> tuple[int, int]:
    """(height, width) of an image or a video as it is shown. Raises MediaError."""
    return read(path, part=Part(0.0, 0.0), limits=limits).source_size


def read_image(path: Path, size: Fit | None = None, limits: Limits = LIMITS) -> Video:
    """As read, of an image; of an animated one its first frame, and says so. Raises MediaError, also for a video."""
    with _opened(path, limits, background=255) as source:
        if source.rate is not None and not source.animated:
            raise MediaError(f"{path} is a video where an image is needed; to go on from a video use extend")
        animated = source.animated
    # Of an animation a part without length is its first frame.
    video = read(path, None, size, Part(0.0, 0.0), limits)._replace(fps=None)
    if animated:
        video = video._replace(told=(*video.told, f"of {path}, which is animated, the first frame is taken"))
    return video


def read_mask(
    path: Path, fps: float | None = None, size: Fit | None = None, part: Part = WHOLE, limits: Limits = LIMITS
) -> Mask:
    """A mask from an image or a video: white (or brighter than middle grey) is True; transparent pixels count as black.

    Fitted as fit_mask does. Raises MediaError.
    """
    with _opened(path, limits, background=0) as source:

        def place(image_HWC: np.ndarray) -> np.ndarray:
            new_HW = image_HWC @ np.array([0.299, 0.587, 0.114]) > 127.5
            return new_HW if size is None else fit_mask(new_HW[None], size)[0]

        rate = source.rate if fps is None or source.rate is None else fps
        frames, source_size = _gather(path, source, rate, part, limits, place)
    return Mask(frames, source_size)


class _Stamped(NamedTuple):
    """A frame and when it is shown, in seconds; it is converted only if it is used."""

    start: float
    end: float
    pixels: Callable[[], np.ndarray]


class _Source(NamedTuple):
    """rate is the mean number of frames a second, None for an image."""

    rate: float | None
    frames: Iterator[_Stamped]
    animated: bool


def _gather(
    path: Path,
    source: _Source,
    rate: float | None,
    part: Part,
    limits: Limits,
    place: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, tuple[int, int]]:
    """All frames that are wanted, placed, and their size in the file."""
    kept: list[np.ndarray] = []
    first: tuple[int, int] | None = None
    frames = _resampled(source, rate, part)
    while True:
        with _decoding(path):
            frame = next(frames, None)
        if frame is None:
            break
        first = first or frame.shape[:2]
        if frame.shape[:2] != first:
            raise MediaError(
                f"{path} changes its size from {first[0]}x{first[1]} to {frame.shape[0]}x{frame.shape[1]}; encode it anew"
            )
        placed = place(frame)
        kept.append(placed)
        if len(kept) * placed.shape[0] * placed.shape[1] > limits.kept_pixels or len(kept) > limits.frames:
            raise MediaError(
                f"{path} is too long: more than {len(kept) - 1} frames of {placed.shape[0]}x{placed.shape[1]}; "
                "use a part of it (start, end), a smaller size or fewer frames a second"
            )
    if first is None:
        where = "" if part == WHOLE else f" between seconds {part.start:g} and {part.end or math.inf:g}"
        raise MediaError(f"{path} holds no frame{where}; give another file or part")
    return np.stack(kept), first


def _resampled(source: _Source, rate: float | None, part: Part) -> Iterator[np.ndarray]:
    """Frames at part.start + k / rate by what is shown then; an image, or the one frame at a part without length, once."""
    if rate is None or source.rate is None:
        yield next(source.frames).pixels()
        return
    # Time stamps are rounded, so a frame is looked for a little after it should begin.
    usual = 0.25 * min(1 / rate, 1 / source.rate)
    number = 0
    for stamped in source.frames:
        ahead = min(usual, (stamped.end - stamped.start) / 2)  # of frames that last differently none is passed over
        pixels: np.ndarray | None = None
        while part.start + number / rate + ahead < stamped.end:
            if part.end is not None and number and number / rate + part.start + ahead >= part.end:
                return
            pixels = stamped.pixels() if pixels is None else pixels
            yield pixels
            number += 1


@contextlib.contextmanager
def _opened(path: Path, limits: Limits, background: int) -> Iterator[_Source]:
    """The file as a source of frames, its header held against the limits."""
    try:
        # A pipe or a device would be waited for, or never end.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{path} is not a file; name an image or a video")
        file = path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}; name a file that can be read"
        ) from error
    with file, contextlib.ExitStack() as stack:
        if status.st_size > limits.file_bytes:
            raise MediaError(
                f"{path} has {status.st_size:,} bytes, more than {limits.file_bytes:,}; make it shorter or smaller"
            )
        with _decoding(path):
            source = _open_image(path, file, limits, background) or _open_video(path, file, limits, stack)
        yield source


@contextlib.contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Whatever damaged bytes lead a decoder to raise is a MediaError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} has too many pixels; make it smaller") from error
    except Exception as error:
        why = " ".join(str(error).replace(str(path), "").split())[:200] or type(error).__name__
        raise MediaError(f"{path} is damaged, or no image or video that can be read ({why}); encode it anew") from error


def _check_size(path: Path, height: int, width: int, limits: Limits) -> None:
    if min(height, width) < 1:
        raise MediaError(f"{path} says its frames are {height}x{width}; encode it anew")
    if height * width > limits.frame_pixels:
        raise MediaError(
            f"{path} has {height}x{width} pixels a frame, more than {limits.frame_pixels:,}; make it smaller"
        )


def _open_image(path: Path, file: IO[bytes], limits: Limits, background: int) -> _Source | None:
    """None if the file is none of the image formats."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=_IMAGES)
    except UnidentifiedImageError:
        file.seek(0)
        return None
    _check_size(path, image.height, image.width, limits)
    if image.mode == "F":
        raise MediaError(f"{path} holds floating point values, whose white is not known; convert it to 8 bits")
    count = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
    if count > limits.frames:
        raise MediaError(f"{path} has {count:,} frames, more than {limits.frames:,}; make it shorter")
    flat = functools.partial(_flat, background=background)
    if count == 1:
        return _Source(None, iter([_Stamped(0.0, math.inf, functools.partial(flat, image))]), animated=False)
    lasting = _durations(path, image, count, limits)
    return _Source(count / sum(lasting), _animation(image, lasting, flat), animated=True)


def _durations(path: Path, image: Any, count: int, limits: Limits) -> list[float]:
    """Seconds of each frame of an animation. Each tells its own, so all are gone through."""
    lasting: list[float] = []
    for number in range(count):
        image.seek(number)
        lasting.append(_seconds(image))
        if sum(lasting) > limits.seconds:
            raise MediaError(f"{path} lasts longer than {limits.seconds:g} seconds; make it shorter")
    return lasting


def _animation(image: Any, lasting: list[float], flat: Callable[[Any], np.ndarray]) -> Iterator[_Stamped]:
    start = 0.0
    for number, seconds in enumerate(lasting):
        image.seek(number)
        yield _Stamped(start, start + seconds, functools.partial(np.asarray, flat(image)))
        start += seconds


def _seconds(image: Any) -> float:
    """How long the current frame of an animation is shown."""
    image.load()  # some formats tell it only now
    seconds = float(image.info.get("duration") or 0) / 1000
    return seconds if seconds >= _SHORTEST_SECONDS else _UNTOLD_SECONDS


def _flat(image: Any, background: int) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image of any mode, upright and without transparency."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would clip to 8.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.stack([grey] * 3, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (background,) * 3 + (255,)), image)
    return np.asarray(image.convert("RGB"))


def _open_video(path: Path, file: IO[bytes], limits: Limits, stack: contextlib.ExitStack) -> _Source:
    import av

    # A file object, and no formats but these: no name in the file is ever opened.
    opened = av.open(
        file,
        container_options={"format_whitelist": _VIDEOS},
        options={"max_pixels": str(limits.frame_pixels)},
    )
    container: Any = stack.enter_context(opened)
    if not container.streams.video:
        raise MediaError(f"{path} holds no video; give one with pictures")
    stream = container.streams.video[0]
    _check_size(path, stream.codec_context.height, stream.codec_context.width, limits)
    seconds = (container.duration or 0) / av.time_base
    if seconds > limits.seconds or stream.frames > limits.frames:
        raise MediaError(
            f"{path} says it has {stream.frames:,} frames in {seconds:.4g} seconds, more than {limits.frames:,} in "
            f"{limits.seconds:g}; cut it shorter"
        )
    stream.codec_context.options = {"max_pixels": str(limits.frame_pixels)}
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not 0 < rate < 10_000:
        raise MediaError(f"{path} tells no frame rate; encode it anew")
    shape = float(stream.sample_aspect_ratio or 1)
    if not 0.01 < shape < 100:
        raise MediaError(f"{path} has pixels {shape:.3g} times as wide as high; encode it anew")
    return _Source(rate, _video(path, container, rate, shape, limits), animated=False)


def _video(path: Path, container: Any, rate: float, shape: float, limits: Limits) -> Iterator[_Stamped]:
    """Frames in order of time; one is known to end when the next begins."""
    held: tuple[float, Any] | None = None
    zero = 0.0
    for number, frame in enumerate(container.decode(video=0)):
        time = frame.time if frame.time is not None else zero + number / rate
        zero = time if held is None else zero
        start = max(time - zero, held[0] if held else 0.0)
        _check_size(path, round(frame.height * max(1.0, 1 / shape)), round(frame.width * max(1.0, shape)), limits)
        if start > limits.seconds or number >= limits.frames:
            raise MediaError(
                f"{path} has more than {limits.frames:,} frames or {limits.seconds:g} seconds; cut it shorter"
            )
        if held is not None:
            yield _Stamped(held[0], start, functools.partial(_upright, held[1], shape))
        held = start, frame
    if held is not None:
        frame = held[1]
        seconds = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 1 / rate
        yield _Stamped(
            held[0], held[0] + min(max(seconds, 0.5 / rate), limits.seconds), functools.partial(_upright, frame, shape)
        )


def _upright(frame: Any, shape: float) -> np.ndarray:
    """RGB as it is shown. shape is the width of a pixel over its height: where they are not square, the wider side is drawn out."""
    width, height = (frame.width * max(1.0, shape), frame.height * max(1.0, 1 / shape))
    pixels = frame.reformat(width=round(width), height=round(height), format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
