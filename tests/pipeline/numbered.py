"""Videos whose pixels carry the frame number, and small datasets made of them by hand: real tars, real indexes, no build."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.index import Dataset, DatasetInfo, ShardInfo, index_schema

BITS, CELL = 12, 16  # a number is 12 cells of black or white and, below them, their complement
WIDTH, HEIGHT = 96, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """How a test video is encoded. times: of its frames, in units of 1/fps; None: one after the other."""

    codec: str = "libx264"
    container: str = "mp4"
    pixel_format: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    times: Sequence[int] | None = None


H264 = Stream(options={"preset": "ultrafast", "g": "32", "bf": "2", "crf": "18", "flags": "+cgop", "threads": "1"})
VP9 = Stream(codec="libvpx-vp9", container="webm", options={"deadline": "realtime", "cpu-used": "8", "g": "12", "crf": "20"})
MJPEG = Stream(codec="mjpeg", container="matroska", pixel_format="yuvj420p", options={"q:v": "2"})


def number_image(number: int, width: int = WIDTH, height: int = HEIGHT) -> npt.NDArray[np.uint8]:
    """(height, width, 3), the number in the upper left 96 x 64 pixels."""
    bits = np.array([number >> i & 1 for i in range(BITS)], dtype=np.uint8)
    cells = np.concatenate([bits, 1 - bits]).reshape(4, 6)
    image = np.full((height, width, 3), 90, dtype=np.uint8)
    image[:HEIGHT, :WIDTH] = (cells * 200 + 30).repeat(CELL, 0).repeat(CELL, 1)[..., None]
    return image


def read_number(image: npt.NDArray[np.uint8]) -> int:
    """The number that `number_image` drew, after any decent codec; -1 when there is none."""
    grey = image[:HEIGHT, :WIDTH].astype(np.float64).mean(axis=2)
    cells = grey.reshape(4, CELL, 6, CELL)[:, 4:12, :, 4:12].mean(axis=(1, 3)).reshape(-1) > 130
    if np.any(cells[:BITS] == cells[BITS:]):
        return -1
    return int(sum(1 << i for i in range(BITS) if cells[i]))


def encode(num_frames: int, stream: Stream = H264, *, first: int = 0, fps: int = 25, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A video whose frame i shows the number first + i."""
    file = io.BytesIO()
    with av.open(file, "w", format=stream.container) as container:
        video = container.add_stream(stream.codec, rate=fps, options=stream.options)
        video.width, video.height, video.pix_fmt = width, height, stream.pixel_format
        video.codec_context.time_base = Fraction(1, fps)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(number_image(first + i, width, height), format="rgb24")
            frame.pts, frame.time_base = (stream.times[i] if stream.times else i), Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
    return file.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    data: bytes
    num_frames: int
    begin: int = 0
    width: int = WIDTH
    height: int = HEIGHT
    codec: str = "h264"
    fps: float = 25.0


def write_dataset(root: Path, videos: Sequence[Video], *, per_shard: int = 4) -> Dataset:
    """A dataset with key "video-<row>", label row modulo 3, and the split "split:split" = "train" for all rows."""
    (root / "shards").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    shards = []
    for number, start in enumerate(range(0, len(videos), per_shard)):
        path = root / "shards" / f"{number:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for row, video in enumerate(videos[start : start + per_shard], start):
                member = tarfile.TarInfo(f"video-{row}.mp4")
                member.size = len(video.data)
                offset = tar.offset + 512
                tar.addfile(member, io.BytesIO(video.data))
                rows.append(_row(row, number, offset, video))
        data = path.read_bytes()
        shards.append(ShardInfo(file=f"shards/{path.name}", size=len(data), sha256=hashlib.sha256(data).hexdigest(), num_items=per_shard))
    index = root / "index.arrow"
    schema = index_schema(["split"])
    with pa.OSFile(str(index), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    data = index.read_bytes()
    info = DatasetInfo(
        classes=["a", "b", "c"],
        splits={"split": ["train"]},
        num_items=len(rows),
        num_quarantined=0,
        num_frames=sum(video.num_frames for video in videos),
        index_sha256=hashlib.sha256(data).hexdigest(),
        index_size=len(data),
        shards=shards,
    )
    (root / "dataset.json").write_text(info.with_fingerprint().to_json(), encoding="utf-8")
    return Dataset.open(root)


def _row(row: int, shard: int, offset: int, video: Video) -> dict[str, object]:
    return {
        "key": f"video-{row}",
        "source": f"video-{row}.mp4",
        "group": "",
        "label": row % 3,
        "shard": shard,
        "offset": offset,
        "size": len(video.data),
        "crc32": zlib.crc32(video.data),
        "begin": video.begin,
        "end": video.begin + video.num_frames,
        "fps": video.fps,
        "width": video.width,
        "height": video.height,
        "codec": video.codec,
        "split:split": 0,
    }


def flip_byte(dataset: Dataset, row: int) -> None:
    """One bit of the row's stored video changes."""
    item = dataset.item(row)
    path = dataset.root / item.shard_file
    data = bytearray(path.read_bytes())
    data[item.offset + item.size // 2] ^= 4
    path.write_bytes(data)


def break_video(dataset: Dataset, row: int) -> bytes:
    """The row's stored video cannot be decoded, but its bytes are what the index says. Returns what it was."""
    item = dataset.item(row)
    path = dataset.root / item.shard_file
    data = bytearray(path.read_bytes())
    before = bytes(data[item.offset : item.offset + item.size])
    data[item.offset : item.offset + item.size] = b"\0" * item.size
    path.write_bytes(data)
    return before
