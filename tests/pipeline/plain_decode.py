"""What a video shows, worked out a second way: FFmpeg's decoder and scaler, the standards' formulas in NumPy for colour and turning.

Nothing here comes from `pipeline`, so that a mistake there is not repeated.
"""

from collections.abc import Container, Iterator
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

Planes = npt.NDArray[np.float32]
SWS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
BT709, BT601, BT2020 = (0.2126, 0.0722), (0.299, 0.114), (0.2627, 0.0593)  # Kr, Kb of ITU-R BT.709, BT.601, BT.2020
MATRICES = {1: BT709, 5: BT601, 6: BT601, 9: BT2020}  # by ITU-T H.273's number; 2 is "unspecified"


def count(path: Path) -> int:
    """How many frames of a video decode."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def shown(path: Path, size: tuple[int, int], wanted: Container[int]) -> Iterator[Planes]:
    """Those frames of any video whose numbers are in `wanted`, at `size` (width, height as shown), as `as_stored` gives them."""
    with av.open(str(path)) as container:
        scaler = VideoReformatter()
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                turns = round(frame.rotation / 90) % 4  # anticlockwise
                yield as_stored(np.rot90(_rgb(frame, size if turns % 2 == 0 else size[::-1], scaler), turns))


def stored(path: Path, wanted: Container[int]) -> Iterator[Planes]:
    """Those frames of a canonical video, as `as_stored` gives them."""
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                assert frame.format.name == "yuv420p"
                flat = np.asarray(frame.to_ndarray(), np.float32)
                high, wide = frame.height, frame.width
                chroma = flat[high:].reshape(2, high // 2, wide // 2).repeat(2, 1).repeat(2, 2)
                yield as_stored(_mixed((flat[:high] - 16) / 219, *((chroma - 128) / 224), BT709))


def as_stored(rgb: npt.NDArray[np.float32]) -> Planes:
    """RGB (H, W, 3), cut to what a screen shows (0 to 1), as BT.709 limited 4:2:0: Y, below it Cb, then Cr, (3 H / 2, W)."""
    rgb = np.clip(rgb, 0, 1)
    kr, kb = BT709
    luma = rgb @ np.array([kr, 1 - kr - kb, kb], np.float32)
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * kb), (rgb[..., 0] - luma) / (2 - 2 * kr)]
    high, wide = luma.shape
    halves = [plane.reshape(high // 2, 2, wide // 2, 2).mean((1, 3)).reshape(high // 4, wide) * 224 + 128 for plane in chroma]
    return np.concatenate([luma * 219 + 16, *halves])


def _mixed(y: Planes, cb: Planes, cr: Planes, matrix: tuple[float, float]) -> npt.NDArray[np.float32]:
    """RGB (H, W, 3) of luma in 0 to 1 and chroma in -1/2 to 1/2."""
    kr, kb = matrix
    r, b = y + (2 - 2 * kr) * cr, y + (2 - 2 * kb) * cb
    return np.stack([r, (y - kr * r - kb * b) / (1 - kr - kb), b], axis=-1)


def _rgb(frame: VideoFrame, size: tuple[int, int], scaler: VideoReformatter) -> npt.NDArray[np.float32]:
    """(H, W, 3), black 0 and white 1, not turned; colours that no screen shows lie outside."""
    if frame.format.is_rgb:
        scaled = scaler.reformat(frame, *size, "rgb24", interpolation=SWS)
        return np.asarray(scaled.to_ndarray(), np.float32) / 255
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    same = ColorRange.JPEG if full else ColorRange.MPEG
    scaled = scaler.reformat(frame, *size, "yuv444p", interpolation=SWS, src_color_range=same, dst_color_range=same)
    luma, blue, red = np.asarray(scaled.to_ndarray(), np.float32)
    matrix = MATRICES.get(frame.colorspace) or (BT709 if frame.width >= 1280 or frame.height >= 720 else BT601)
    return _mixed(luma / 255 if full else (luma - 16) / 219, *((np.stack([blue, red]) - 128) / (255 if full else 224)), matrix)
