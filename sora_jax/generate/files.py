"""Samples as files: mp4, gif, png, contact sheets, and bytes for pages that carry their own media.

Frames are uint8. A file is written beside its place and then renamed, so a reader sees all of it or nothing.
"""

from __future__ import annotations

import base64
import io
import math
import mimetypes
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from einops import repeat
from jaxtyping import Shaped, UInt8

from sora_jax import disk

_CRF = 12  # x264's quality, 0 is lossless and 23 its default: a sample must show the model's faults, not the codec's
_SHEET_FRAMES = 8  # frames of a video in a .png
_BACKGROUND = 255
_LABEL_SIZE = 12  # pixels
_LABEL_LINES = 3


def write_video(
    path: str | os.PathLike[str], frames_THWC: Shaped[np.ndarray, "T H W C"], fps: float, scale: int = 1
) -> None:
    """Writes frames as the suffix of `path` says: .mp4, .gif, or .png (one image, or up to 8 frames side by side).

    C is 1 or 3. scale enlarges every pixel to a square of scale x scale, for videos too small to see. Makes missing
    parent directories; replaces an existing file. Raises ValueError for an unknown suffix or frames that are not uint8
    (T, H, W, C).
    """
    path = Path(path)
    write_atomically(path, encode_video(frames_THWC, fps, path.suffix.lstrip("."), scale))


def encode_video(frames_THWC: Shaped[np.ndarray, "T H W C"], fps: float, format: str, scale: int = 1) -> bytes:
    """The bytes of an mp4, gif or png file; see write_video.

    An mp4 is h264 with 4:2:0 chroma, which every player and browser shows; odd sizes are padded by repeating the last
    row or column, because 4:2:0 halves both. A gif's frames last whole hundredths of a second, at least two: the mean
    rate is right up to 50 frames a second.
    """
    if format not in _ENCODERS:
        raise ValueError(f"cannot write {format!r}; use one of {', '.join(f'.{name}' for name in _ENCODERS)}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}; frames a second must be positive")
    return _ENCODERS[format](_as_rgb(frames_THWC, "the video"), fps, _whole(scale))


def contact_sheet(
    videos: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    *,
    columns: int = 1,
    frames_per_video: int = 4,
    scale: int = 1,
    gap: int = 4,
) -> UInt8[np.ndarray, "H W 3"]:
    """One image of many videos, each a strip of evenly spaced frames (first and last among them) in its native size.

    videos are uint8 (T, H, W, C) of any sizes, placed row by row in `columns` columns; a label stands above its strip,
    broken into lines. gap is in pixels. Raises ValueError if there is no video or the numbers of labels and videos
    differ.
    """
    if not videos:
        raise ValueError("a contact sheet needs at least one video")
    if labels is not None and len(labels) != len(videos):
        raise ValueError(f"{len(labels)} labels for {len(videos)} videos; give each its own, or None")
    if columns < 1 or frames_per_video < 1:
        raise ValueError(f"columns is {columns}, frames_per_video {frames_per_video}; both must be at least 1")
    scale = _whole(scale)
    strips = [
        _strip(_as_rgb(video, f"video {index}"), frames_per_video, gap, scale) for index, video in enumerate(videos)
    ]
    if labels is not None:
        strips = [_labelled(strip, label) for strip, label in zip(strips, labels, strict=True)]
    rows = [strips[start : start + columns] for start in range(0, len(strips), columns)]
    widths = [max(row[column].shape[1] for row in rows if column < len(row)) for column in range(len(rows[0]))]
    heights = [max(strip.shape[0] for strip in row) for row in rows]
    sheet = _blank(sum(heights) + gap * (len(heights) + 1), sum(widths) + gap * (len(widths) + 1))
    top = gap
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for strip, width in zip(row, widths, strict=False):  # the last row may be short
            sheet[top : top + strip.shape[0], left : left + strip.shape[1]] = strip
            left += width + gap
        top += height + gap
    return sheet


def write_image(path: str | os.PathLike[str], image_HWC: Shaped[np.ndarray, "H W C"]) -> None:
    """Writes one uint8 image as .png, atomically. Raises ValueError for another suffix."""
    if Path(path).suffix != ".png":
        raise ValueError(f"cannot write the image {path}; use .png")
    write_video(path, image_HWC[None], 1.0)


def data_uri(source: str | os.PathLike[str] | bytes, mime: str | None = None) -> str:
    """A file, or its bytes, as a data: URI, so that a page needs nothing beside it.

    mime is guessed from a path's suffix if None. Raises ValueError if it cannot be.
    """
    if mime is None and not isinstance(source, bytes):
        mime = mimetypes.guess_type(Path(source).name)[0]
    if mime is None:
        raise ValueError("the type of these bytes is unknown; pass mime, such as video/mp4")
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _encode_mp4(frames_THWC: np.ndarray, fps: float, scale: int) -> bytes:
    # PyAV itself, which imageio's plugin wraps: the plugin has no way to set the quality or to name the colour matrix.
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

    height, width = (scale * size for size in frames_THWC.shape[1:3])
    rate = Fraction(fps).limit_denominator(65535)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate, options={"crf": str(_CRF)})
        stream.height, stream.width = height + height % 2, width + width % 2
        # The same bytes on any number of cores.
        stream.codec_context.thread_count = 1
        stream.pix_fmt = "yuv420p"
        # Untagged colours are guessed by size, differently in each player.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        reformatter = VideoReformatter()  # a frame's own is made anew for each
        for index, frame_HWC in enumerate(frames_THWC):
            even_HWC = np.pad(_enlarge(frame_HWC, scale), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(even_HWC), format="rgb24")
            frame = reformatter.reformat(
                rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _encode_gif(frames_THWC: np.ndarray, fps: float, scale: int) -> bytes:
    from PIL import Image

    images = [Image.fromarray(_enlarge(frame, scale)).quantize(256, dither=Image.Dither.NONE) for frame in frames_THWC]
    ends = np.round(np.arange(len(images) + 1) * 100 / fps)
    # Browsers play a frame of less than 20 ms for 100 ms.
    milliseconds = (np.maximum(np.diff(ends), 2) * 10).astype(int).tolist()
    file = io.BytesIO()
    images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return file.getvalue()


def _encode_png(frames_THWC: np.ndarray, fps: float, scale: int) -> bytes:
    from PIL import Image

    image_HWC = _strip(frames_THWC, _SHEET_FRAMES, gap=2, scale=scale)
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, format="PNG")
    return file.getvalue()


_ENCODERS: dict[str, Callable[[np.ndarray, float, int], bytes]] = {
    "mp4": _encode_mp4,
    "gif": _encode_gif,
    "png": _encode_png,
}


def _as_rgb(frames_THWC: Any, name: str) -> np.ndarray:
    frames = np.asarray(frames_THWC)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"{name} is {frames.dtype}{list(frames.shape)}; uint8 (T, H, W, 3) is needed: map [-1, 1] to [0, 255] first"
        )
    return np.broadcast_to(frames, (*frames.shape[:3], 3))


def _whole(scale: int) -> int:
    if scale < 1 or scale != int(scale):
        raise ValueError(f"scale is {scale}; a whole number of at least 1 is needed")
    return int(scale)


def _enlarge(frame_HWC: np.ndarray, scale: int) -> np.ndarray:
    # Frame by frame: all of a long video would be many times what was made.
    return repeat(frame_HWC, "h w c -> (h sh) (w sw) c", sh=scale, sw=scale)


def _strip(frames_THWC: np.ndarray, max_frames: int, gap: int, scale: int) -> np.ndarray:
    """Evenly spaced frames side by side, enlarged."""
    count = min(max_frames, len(frames_THWC))
    places = np.round(np.linspace(0, len(frames_THWC) - 1, count)).astype(int)
    chosen = [_enlarge(frames_THWC[place], scale) for place in places]
    height, width = chosen[0].shape[:2]
    strip = _blank(height, count * width + (count - 1) * gap)
    for index, frame in enumerate(chosen):
        left = index * (width + gap)
        strip[:, left : left + width] = frame
    return strip


def _labelled(strip_HWC: np.ndarray, label: str) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_LABEL_SIZE)
    width = strip_HWC.shape[1]
    lines = _break_lines(label, lambda text: font.getlength(text) <= width)
    canvas = Image.new("RGB", (width, (_LABEL_SIZE + 4) * len(lines)), (_BACKGROUND,) * 3)
    ImageDraw.Draw(canvas).multiline_text((0, 0), "\n".join(lines), fill=(0, 0, 0), font=font, spacing=4)
    return np.concatenate([np.asarray(canvas), strip_HWC])


def _break_lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Words filled into at most three lines; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:_LABEL_LINES]
    if len(lines) > _LABEL_LINES:
        shown[-1] += " ..."
    return [_clipped(line, fits) for line in shown]


def _clipped(line: str, fits: Callable[[str], bool]) -> str:
    if fits(line):
        return line
    kept = line.removesuffix(" ...")
    while kept and not fits(f"{kept}..."):
        kept = kept[:-1]
    return f"{kept}..." if kept else ""


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _BACKGROUND, np.uint8)


write_atomically = disk.write_atomically
