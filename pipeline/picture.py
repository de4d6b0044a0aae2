"""Decoded pictures into canonical ones: scaled, upright, yuv420p in BT.709 limited range, from whatever a source has.

What a frame says of its matrix and range is believed; what it does not say follows from its size, as players have it.
"""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from pipeline.canonical import canonical_size, orientation

HD_WIDTH, HD_HEIGHT = 1280, 720  # untagged video from this size on is taken for BT.709, below for BT.601
SWS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_MATRICES = {  # AVColorSpace of a frame -> swscale's matrix; others are treated as untagged
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.SMPTE170M,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


class CanonicalPicture:
    """Brings decoded frames to the size, orientation and colours that the first of them decides.

    aspect: of a source pixel, width to height. width, height: of the result. source_size: (width, height) of the source, turned upright.
    changes_nothing: whether the picture keeps its size and stays as it lies.
    """

    def __init__(self, first: VideoFrame, aspect: Fraction, short_side: int) -> None:
        self._size = canonical_size(first.width, first.height, aspect, short_side)
        matrix = first.side_data.get("DISPLAYMATRIX")
        assert matrix is None or isinstance(matrix, SideData)
        self._transpose, self._flip_rows, self._flip_columns = orientation(b"" if matrix is None else bytes(matrix))
        self.width, self.height = self._size[::-1] if self._transpose else self._size
        self.source_size = (first.height, first.width) if self._transpose else (first.width, first.height)
        turned = self._transpose or self._flip_rows or self._flip_columns
        self.changes_nothing = not turned and aspect == 1 and self._size == (first.width, first.height)
        self._recolour = Recolour()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        """A new yuv420p frame that carries pixels only: no timestamps, picture types or side data of the source."""
        width, height = self._size
        scaled = self._recolour(frame, width, height)
        if not (self._transpose or self._flip_rows or self._flip_columns):
            fresh = VideoFrame(width, height, "yuv420p")
            pairs = list(zip(fresh.planes, scaled.planes, strict=True))
            if all(plane.line_size == pixels.line_size for plane, pixels in pairs):  # not where a decoder padded its lines
                for plane, pixels in pairs:
                    plane.update(pixels)  # type: ignore[arg-type]  # any buffer will do, not only the bytes that the stub asks for
                return fresh
        flat = np.asarray(scaled.to_ndarray(), np.uint8)  # (3 H / 2, W): Y, then U, then V
        area = width * height
        planes = np.split(flat.reshape(-1), [area, area + area // 4])
        shapes = [(height, width), (height // 2, width // 2), (height // 2, width // 2)]
        turned = [self._turn(plane.reshape(shape)).reshape(-1) for plane, shape in zip(planes, shapes, strict=True)]
        return VideoFrame.from_ndarray(np.concatenate(turned).reshape(self.height * 3 // 2, self.width), format="yuv420p")

    def _turn(self, plane: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        plane = plane.T if self._transpose else plane
        return plane[:: -1 if self._flip_rows else 1, :: -1 if self._flip_columns else 1]


class Recolour:
    """Scales, and converts to yuv420p in BT.709 limited range from whatever matrix and range a frame says, or its size suggests.

    From another matrix it goes through planar RGB: swscale's direct way from BT.601 makes white (235) 233, this way is true to 1.
    """

    def __init__(self) -> None:
        self._scale, self._convert = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        untagged = Colorspace.ITU709 if frame.width >= HD_WIDTH or frame.height >= HD_HEIGHT else Colorspace.ITU601
        matrix = None if frame.format.is_rgb else _MATRICES.get(frame.colorspace, untagged)
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        direct = matrix == Colorspace.ITU709
        scaled = self._scale.reformat(
            frame,
            width=width,
            height=height,
            format="yuv420p" if direct else "gbrp",
            src_colorspace=matrix,
            dst_colorspace=Colorspace.ITU709 if direct else None,
            interpolation=SWS,
            src_color_range=None if matrix is None else ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG if direct else ColorRange.JPEG,
            threads=1,
        )
        if direct:
            return scaled
        return self._convert.reformat(
            scaled,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            interpolation=SWS,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
