"""The damage matrix: what becomes of a video that is damaged in the source or in the shard, counted over seeds, as a table.

    python -m tests.soak_damage --seeds 20 --out docs/damage.md

A source goes through the limited child process of the build and is compared, frame by frame, with what becomes of it undamaged. A shard
is read by the loader, and each clip is compared, byte by byte, with the clip of the undamaged shard. An outcome is one of

    refused     named, with a reason               right       every frame is as it was
    fewer       frames are missing, unnoticed      altered     a frame is another by more than ALTERED levels, unnoticed

The child that reads videos must survive all of it, since one child reads them all.
"""

import argparse
import io
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from jobs import validate
from pipeline.index import Dataset
from pipeline.loader import Loader
from pipeline.media_worker import MediaWorker
from pipeline.options import AugmentOptions, ClipOptions, EncodeOptions, LimitOptions, LoaderOptions
from pipeline.quarantine import RejectedError
from pipeline.requests import eval_requests
from tests.pipeline.numbered import H264, MJPEG, Stream, Video, encode, number_image, write_dataset

LIMITS = LimitOptions(max_pixels=1 << 22, max_frames=2000, memory_mib=1024, cpu_s=60, wall_s=120)
ENCODE = EncodeOptions(preset="ultrafast", crf=10)
ALTERED = 2.0  # levels, mean absolute difference of the worst frame
NUM = 40  # frames of a source
X264 = {"preset": "ultrafast", "crf": "18", "threads": "1", "g": "12", "bf": "2"}
SOURCES = {
    "H.264 in MP4": Stream(options=X264),
    "H.264 in Matroska": Stream(options=X264, container="matroska"),
    "H.264 in MPEG-TS": Stream(options=X264, container="mpegts"),
    "MPEG-4 in AVI": Stream(codec="mpeg4", container="avi", options={"qscale": "3", "g": "12"}),
}
Damage = Callable[[bytearray, np.random.Generator], None]
Planes = npt.NDArray[np.uint8]


def _cut(share: float) -> Damage:
    return lambda data, rng: data.__delitem__(slice(int(share * len(data)), None))


def _flip(num: int) -> Damage:
    def damage(data: bytearray, rng: np.random.Generator) -> None:
        for place in rng.integers(0, len(data), num).tolist():
            data[place] ^= 1 << int(rng.integers(0, 8))

    return damage


def _head(data: bytearray, rng: np.random.Generator) -> None:
    del data[: int(rng.integers(1, 256))]


def _zero(data: bytearray, rng: np.random.Generator) -> None:
    size = len(data) // 8
    begin = int(rng.integers(0, len(data) - size))
    data[begin : begin + size] = bytes(size)


DAMAGES: dict[str, Damage] = {
    "header cut off": _head,
    "cut at 10 %": _cut(0.1),
    "cut at 50 %": _cut(0.5),
    "cut at 95 %": _cut(0.95),
    "1 bit flipped": _flip(1),
    "30 bits flipped": _flip(30),
    "1000 bits flipped": _flip(1000),
    "an eighth zeroed": _zero,
}


def decoded(data: bytes) -> list[Planes]:
    with av.open(io.BytesIO(data)) as container:
        return [np.asarray(frame.to_ndarray(format="gray"), np.uint8) for frame in container.decode(video=0)]


def transcoded(worker: MediaWorker, data: bytes, folder: Path) -> list[Planes]:
    """The frames that the build would store. Raises RejectedError."""
    source, out = folder / "in.bin", folder / "out.mp4"
    source.write_bytes(data)
    worker.transcode(source, out)
    return decoded(out.read_bytes())


def outcome(worker: MediaWorker, data: bytes, clean: list[Planes], folder: Path) -> str:
    try:
        frames = transcoded(worker, data, folder)
    except RejectedError as rejected:
        return f"refused ({rejected.reason})"
    if len(frames) != len(clean) or frames[0].shape != clean[0].shape:
        return "fewer"
    worst = max(float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(frames, clean, strict=True))
    return "right" if worst <= ALTERED else "altered"


def source_matrix(seeds: range, folder: Path) -> dict[tuple[str, str], Counter[str]]:
    """(source, damage) -> how often which outcome. Raises PipelineError when the child does not survive."""
    found: dict[tuple[str, str], Counter[str]] = {}
    with MediaWorker(ENCODE, LIMITS) as worker:
        for name, stream in SOURCES.items():
            whole = encode(NUM, stream)
            clean = transcoded(worker, whole, folder)
            for damage, do in DAMAGES.items():
                counts = found[name, damage] = Counter()
                for seed in seeds:
                    data = bytearray(whole)
                    do(data, np.random.default_rng([seed, len(found)]))
                    counts[outcome(worker, bytes(data), clean, folder)] += 1
            assert outcome(worker, whole, clean, folder) == "right", "the same child still reads what is not damaged"
    return found


def forms() -> Iterator[tuple[str, bytes, str]]:
    """(what is odd about a video, its bytes, what must become of it)."""
    yield "10 bit", encode(12, Stream(pixel_format="yuv420p10le", options=X264)), "12 frames"
    yield "4:4:4", encode(12, Stream(pixel_format="yuv444p", options=X264)), "12 frames"
    yield "variable frame rate", encode(12, Stream(options=X264, times=[i * i for i in range(12)])), "12 frames"
    yield "one frame", encode(1), "1 frames"
    yield "no frame", _without_frames(), "refused"
    yield "a codec without a decoder", _unknown_codec(), "refused (unsupported_codec)"
    yield "rotated by a quarter", _rotated(), "12 frames of 64x96"
    yield "pictures of 65500 x 65500 pixels", _bomb(), "refused"


def _rewritten(change: Callable[[av.container.OutputContainer, av.video.stream.VideoStream], None]) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, options=X264)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        change(out, stream)
    return file.getvalue()


def _rotated() -> bytes:
    def change(out: av.container.OutputContainer, stream: av.video.stream.VideoStream) -> None:
        stream.set_display_matrix([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30])
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(number_image(number), format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))

    return _rewritten(change)


def _without_frames() -> bytes:
    return _rewritten(lambda out, stream: out.start_encoding())


def _unknown_codec() -> bytes:
    data = encode(12)
    return data.replace(b"avc1", b"xyz1")


def _bomb() -> bytes:
    """Some kilobytes whose pictures say that they are 65500 x 65500 pixels, while the container says 96 x 64."""
    data = encode(3, MJPEG)
    head = b"\xff\xc0\x00\x11\x08"  # a JPEG's frame header, before its height and width
    assert data.count(head + b"\x00\x40\x00\x60") == 3
    return data.replace(head + b"\x00\x40\x00\x60", head + b"\xff\xdc\xff\xdc")


def form_matrix(folder: Path) -> dict[str, tuple[str, str]]:
    """What is odd -> (what became of it, what must)."""
    found = {}
    with MediaWorker(ENCODE, LIMITS) as worker:
        for name, data, expected in forms():
            try:
                frames = transcoded(worker, data, folder)
                height, width = frames[0].shape
                found[name] = (f"{len(frames)} frames of {width}x{height}", expected)
            except RejectedError as rejected:
                found[name] = (f"refused ({rejected.reason})", expected)
    return found


def clips(dataset: Dataset) -> dict[str, bytes | None]:
    """Key -> the bytes of an evaluation clip, None where the loader reports damage."""
    clip, augment = ClipOptions(num_frames=4, stride=2), AugmentOptions(size=32)
    rows = np.arange(len(dataset), dtype=np.uint32)
    requests = eval_requests(dataset, rows, micro_batch=2, rank=0, world_size=1, clip=clip, augment=augment)
    found: dict[str, bytes | None] = {}
    with Loader(
        dataset, requests, micro_batch=2, clip=clip, augment=augment, options=LoaderOptions(), threads=1, on_damage="report"
    ) as loader:
        for batch in loader:
            failed = {damage.position for damage in batch.damaged}
            for slot, key in enumerate(batch.keys):
                if batch.valid[slot]:
                    found[key] = None if int(batch.positions[slot]) in failed else batch.clips[slot].numpy().tobytes()
    return found


def shard_matrix(seeds: range, folder: Path) -> dict[str, Counter[str]]:
    """Damage in a shard -> over all items: how many clips were refused, right or altered; and whether `data validate` saw it."""
    videos = [Video(data=encode(NUM, H264, first=100 * row), num_frames=NUM) for row in range(4)]
    whole = write_dataset(folder / "whole", videos, per_shard=2)
    clean = clips(whole)
    found: dict[str, Counter[str]] = {}
    for damage, do in {**DAMAGES, "members of two shards swapped": None, "the index of another build": None}.items():
        counts = found[damage] = Counter()
        for seed in seeds:
            root = folder / "damaged"
            shutil.copytree(whole.root, root)
            _harm(root, do, damage, np.random.default_rng([seed, len(found)]), videos, folder)
            counts["seen by validate" if validate.run(root) else "not seen by validate"] += 1
            for key, clip in clips(Dataset.open(root)).items():
                counts["refused" if clip is None else "right" if clip == clean[key] else "altered"] += 1
            shutil.rmtree(root)
    return found


def _harm(root: Path, do: Damage | None, name: str, rng: np.random.Generator, videos: list[Video], folder: Path) -> None:
    first, second = sorted((root / "shards").glob("*.tar"))
    if do is not None:
        data = bytearray(first.read_bytes())
        do(data, rng)
        first.write_bytes(bytes(data))
    elif name.startswith("members"):
        ours, theirs = first.read_bytes(), second.read_bytes()
        first.write_bytes(theirs)
        second.write_bytes(ours)
    else:
        other = folder / "other"
        if not other.exists():
            write_dataset(other, [*videos[2:], *videos[:2]], per_shard=2)
        shutil.copy(other / "index.arrow", root / "index.arrow")


def page(seeds: range) -> str:
    """The tables, in Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, odd, shards = source_matrix(seeds, folder), form_matrix(folder), shard_matrix(seeds, folder)
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    lines = [HEAD.format(num=len(seeds), child=child, altered=ALTERED)]
    lines += ["## In the source", "", "| video | damage | outcomes |", "|---|---|---|"]
    lines += [f"| {video} | {damage} | {_counted(counts)} |" for (video, damage), counts in sources.items()]
    lines += ["", "## What is only odd", "", "| video | outcome |", "|---|---|"]
    lines += [f"| {video} | {got} |" for video, (got, _) in odd.items()]
    lines += ["", "## In the shard", "", "| damage | outcomes, of clips and of datasets |", "|---|---|"]
    lines += [f"| {damage} | {_counted(counts)} |" for damage, counts in shards.items()]
    return "\n".join(lines) + "\n"


HEAD = """# Damage

Written by `python -m tests.soak_damage`: {num} seeds of each. *Refused*: named with a reason; in training it is replaced and written
down. *Right*: every frame as it was (of a shard, to the byte; of a source, within {altered:g} levels). *Fewer*, *altered*: frames are
missing, or another by more than that, and nobody noticed. The process that reads videos survived all of it; the most memory that it or
a child of it ever had was {child} MiB.

In a shard nothing goes unnoticed: every byte of a video is under a checksum. A source has none. What its decoder does not report nobody
can know: one flipped bit of a picture may be another picture that is just as valid, and one of a header another header. FFmpeg's stricter
detection (`err_detect=explode`) refused no more of the MP4 and AVI files than it does without, and was not taken.

Files that are cut off between two frames are noticed where the container lists its frames (MP4). Matroska and MPEG-TS do not: what is
cut off there is a shorter video, unnoticed.
"""


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{num} {name}" for name, num in sorted(counts.items(), key=lambda each: (-each[1], each[0])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/damage.md"))
    options = parser.parse_args()
    options.out.write_text(page(range(options.seeds)), encoding="utf-8")
