"""Text drawn into the frames of a canonical video, in the VGA font that FFmpeg's decoder of ANSI art brings along: no font files.

Its characters are those of code page 437 (Latin letters with most accents, some Greek); others become question marks.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange, VideoReformatter

from pipeline.media import write_video
from pipeline.options import EncodeOptions

CELL_WIDTH, CELL_HEIGHT = 8, 16  # pixels of a character
ROWS_PER_FRAME = 15  # about so many lines of text would fill a frame
SHARE = 3  # text covers at most a third of a frame's height
DIM = 4  # what the picture behind the text is divided by


def caption(source: Path, destination: Path, lines_at: Callable[[float], Sequence[str]], encode: EncodeOptions) -> int:
    """Writes a copy of `source`, a video that we wrote ourselves, with lines of text at its upper left; returns its number of frames.

    lines_at: the lines to show at a time in seconds; what does not fit the width and a third of the height is cut. Raises OSError where
    it cannot be written.
    """
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.base_rate or 25)
        reformatter = VideoReformatter()

        def captioned() -> Iterator[npt.NDArray[np.uint8]]:
            for number, image in enumerate(container.decode(stream)):
                rgb = reformatter.reformat(image, format="rgb24", dst_color_range=ColorRange.JPEG, threads=1)
                frame = np.array(rgb.to_ndarray(), dtype=np.uint8)
                _draw(frame, lines_at(number / rate))
                yield frame

        return write_video(destination, captioned(), rate, encode)


def _draw(frame: npt.NDArray[np.uint8], lines: Sequence[str]) -> None:
    """White text on a darkened box into a frame (H, W, 3)."""
    height, width = frame.shape[:2]
    scale = max(1, height // (ROWS_PER_FRAME * CELL_HEIGHT))
    columns, rows = width // (CELL_WIDTH * scale), max(1, height // SHARE // (CELL_HEIGHT * scale))
    ink = text_mask(tuple(line[:columns] for line in lines[:rows])).repeat(scale, axis=0).repeat(scale, axis=1)
    box = frame[: ink.shape[0], : ink.shape[1]]
    box //= DIM
    box[ink] = 255


@lru_cache(maxsize=64)
def text_mask(lines: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Where the ink of some lines of text is: (16 * lines, 8 * longest line) booleans."""
    mask = np.zeros((CELL_HEIGHT * len(lines), CELL_WIDTH * max(map(len, lines), default=0)), dtype=np.bool_)
    for row, line in enumerate(lines):
        ink = _line_mask(line)
        mask[row * CELL_HEIGHT : (row + 1) * CELL_HEIGHT, : ink.shape[1]] = ink
    return mask


def _line_mask(line: str) -> npt.NDArray[np.bool_]:
    text = "".join(character if character.isprintable() else "?" for character in line).encode("cp437", errors="replace")
    if not text:
        return np.zeros((CELL_HEIGHT, 0), dtype=np.bool_)
    context = av.CodecContext.create("ansi", "r")
    assert isinstance(context, VideoCodecContext)
    context.width, context.height = CELL_WIDTH * (len(text) + 1), CELL_HEIGHT  # a full line would scroll out of the picture
    plane = context.decode(Packet(text))[0].planes[0]
    pixels = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
    return np.asarray(pixels[:CELL_HEIGHT, : CELL_WIDTH * len(text)] > 0)
