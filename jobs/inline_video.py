"""Videos inside a page: H.264 in MP4 straight from the shards as data: URIs, within limits on bytes.

A small video goes in as it lies in its shard. A large one, one of another codec and a time window of one are cut: some of their frames,
smaller, encoded again. What cannot be read is left out: a page about a run must not fail on a video of it.
"""

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import PipelineError
from pipeline.index import Dataset, Item
from pipeline.options import EncodeOptions
from pipeline.reader import open_reader

MAX_VIDEO_BYTES = 160 << 10
MAX_PAGE_BYTES = 2 << 20  # of all videos of a page, before base64 makes 4 of 3
MAX_FRAMES = 96  # of a video that is cut
MAX_DECODED_BYTES = 512 << 20  # of the same
MIN_FPS = 8.0  # so that a long video, of which few frames are taken, plays fast rather than as slides
SHORT_SIDE = 128  # pixels at least, of the same
MULTIPLE = 2  # chroma is stored at half the size


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineVideo:
    """uri: the whole file, "data:video/mp4;base64,...". width, height: in pixels."""

    uri: str
    width: int
    height: int


def inline_videos(dataset: Dataset, rows: Sequence[int], *, num: int) -> dict[int, InlineVideo]:
    """Row -> video, of the first `num` of `rows` that can be read and fit."""
    found: dict[int, InlineVideo] = {}
    left = MAX_PAGE_BYTES
    with open_reader(dataset) as reader:
        for row in rows:
            if len(found) == num or left < MAX_VIDEO_BYTES // 4:
                break
            item = dataset.item(row)
            try:
                data, width, height = _video(dataset, item, reader.read(item))
            except (PipelineError, OSError):
                continue
            if len(data) <= min(left, MAX_VIDEO_BYTES):
                left -= len(data)
                found[row] = InlineVideo(uri=f"data:video/mp4;base64,{base64.b64encode(data).decode()}", width=width, height=height)
    return found


def _video(dataset: Dataset, item: Item, data: bytes) -> tuple[bytes, int, int]:
    """A file with its width and height."""
    if item.codec == "h264" and len(data) <= MAX_VIDEO_BYTES and not _is_window(dataset, item):
        return data, item.width, item.height
    return _cut(item, data)


def _is_window(dataset: Dataset, item: Item) -> bool:
    """Whether other items lie in the same stored video, or this one does not begin with it."""
    same = (dataset.column("shard") == dataset.column("shard")[item.row]) & (dataset.column("offset") == item.offset)
    return item.begin > 0 or int(same.sum()) > 1


def _cut(item: Item, data: bytes) -> tuple[bytes, int, int]:
    from pipeline.media import write_video  # PyAV, only where something is cut
    from pipeline.software_decode import decode

    num = max(1, min(MAX_FRAMES, MAX_DECODED_BYTES // (3 * item.width * item.height)))
    stride = -(-item.num_frames // num)
    numbers = np.arange(item.begin, item.end, stride, dtype=np.int32)
    frames = np.empty((len(numbers), item.height, item.width, 3), dtype=np.uint8)
    decode(data, numbers, frames, key=item.key, shard=item.shard_file)
    small = _shrunk(frames, max(1, min(item.height, item.width) // SHORT_SIDE))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.mp4"
        write_video(path, iter(small), max(item.fps / stride, MIN_FPS), EncodeOptions(crf=30, tune="film", preset="medium"))
        return path.read_bytes(), small.shape[2], small.shape[1]


def _shrunk(frames: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """(T, H, W, 3) to means over factor x factor pixels, both sides even; what does not divide is cut off below and at the right."""
    height, width = (side // (factor * MULTIPLE) * MULTIPLE for side in frames.shape[1:3])
    blocks = frames[:, : height * factor, : width * factor].reshape(len(frames), height, factor, width, factor, 3)
    return np.stack([block.mean(axis=(1, 3)).round().astype(np.uint8) for block in blocks])
