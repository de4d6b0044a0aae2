"""posmlp bench decode: clips per CPU-second of streams x decoders, decoding only, one thread, interleaved.

A clip is CLIP_FRAMES frames at stride STRIDE from a fully random start; in the layered form also from a random base frame. In every
repeat all decoders get the same clips of all streams, in turn.
"""

import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from jobs.bench_footage import Footage, footage, write_x264
from jobs.bench_peers import LOOP, Decode, decoders
from jobs.errors import JobError
from pipeline.media import write_video
from pipeline.options import BASE_STEP, EncodeOptions

Shape: TypeAlias = tuple[int, int, int]  # frames, height, width

CLIP_FRAMES, STRIDE = 16, 4
LEAST_FRAMES = (CLIP_FRAMES - 1) * STRIDE + 1
STOCK, GOP32, PLAIN, LAYERED = "x264 defaults (GOP 250)", "GOP 32, 2 B-frames", "ours, plain", "ours, layered"
BASE = "ours, layered, base starts"
REFERENCE = (STOCK, "torchcodec")
LEAST_LOOP = 0.65  # of torchcodec on stock files: a slower loop would be a straw man
X264: dict[str, dict[str, str]] = {STOCK: {}, GOP32: {"x264-params": "keyint=32:min-keyint=32:scenecut=0:open-gop=0:bframes=2"}}
OURS = {PLAIN: EncodeOptions(), LAYERED: EncodeOptions(form="layered")}


def run(folder: Path | None, *, num_videos: int = 3, repeats: int = 7, clips: int = 4) -> dict[str, object]:
    """{"rows": one dict per stream and decoder, "missing": peer -> why}. folder: of videos; None: synthetic scenes.

    Rows: stream, decoder, rate (clips per CPU-second, median of the repeats), low, high (over the repeats), mbit_s, and times (rate over
    torchcodec's on the stock files, None without it). clips: of each video in a repeat. Raises JobError for a folder without a video
    that is long enough.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="posmlp-bench-") as work:
            files, shapes, mbit_s = _encoded(Path(work), footage(folder, num_videos, LEAST_FRAMES))
            works, missing = decoders()
            rates = _measure(files, shapes, works, repeats, clips)
    finally:
        torch.set_num_threads(before)
    reference = median(rates[REFERENCE]) if REFERENCE in rates else None
    rows: list[dict[str, object]] = []
    for (stream, decoder), measured in rates.items():
        rate = median(measured)
        times = None if reference is None else round(rate / reference, 2)
        facts = {
            "stream": stream,
            "decoder": decoder,
            "rate": round(rate, 1),
            "low": round(min(measured), 1),
            "high": round(max(measured), 1),
        }
        rows.append({**facts, "mbit_s": round(mbit_s[stream.removesuffix(", base starts")], 2), "times": times})
    return {"rows": rows, "missing": missing}


def table(result: Mapping[str, object]) -> str:
    """The figures as a Markdown table; a PyAV loop that is too slow to be a fair peer is named instead of quoted."""
    rows, missing = result["rows"], result["missing"]
    assert isinstance(rows, list)
    assert isinstance(missing, dict)
    lines = ["| stream | Mbit/s | decoder | clips per CPU-s | lowest to highest | x torchcodec on stock |", "|---|---|---|---|---|---|"]
    slow = [
        row for row in rows if row["decoder"] == LOOP and row["stream"] == STOCK and row["times"] is not None and row["times"] < LEAST_LOOP
    ]
    for row in rows:
        if slow and row["decoder"] == LOOP:
            continue
        times = "" if row["times"] is None else f"{row['times']:.2f}"
        lines.append(f"| {row['stream']} | {row['mbit_s']} | {row['decoder']} | {row['rate']} | {row['low']} to {row['high']} | {times} |")
    lines += [f"| | | {name} | not measured: {why} | | |" for name, why in missing.items()]
    lines += [f"| | | {LOOP} | not quoted: {row['times']:.2f} of torchcodec on stock files, below {LEAST_LOOP} | | |" for row in slow]
    return "\n".join(lines)


def starts_of(num_frames: int, step: int = 1) -> range:
    """Frames at which a clip can start in a video of LEAST_FRAMES or more, multiples of `step`."""
    return range(0, num_frames - LEAST_FRAMES + 1, step)


def clip_at(start: int) -> npt.NDArray[np.int32]:
    return np.arange(start, start + CLIP_FRAMES * STRIDE, STRIDE, dtype=np.int32)


def _encoded(work: Path, shown: Iterable[Footage]) -> tuple[dict[str, list[bytes]], list[Shape], dict[str, float]]:
    """Stream -> files of all videos; the videos' shapes; stream -> megabits per second."""
    files: dict[str, list[bytes]] = {name: [] for name in (*X264, *OURS)}
    shapes: list[Shape] = []
    seconds, path = 0.0, work / "video.mp4"
    for one in shown:
        for name, options in X264.items():
            write_x264(path, one, options)
            files[name].append(path.read_bytes())
        for name, encode in OURS.items():
            write_video(path, one.frames, one.fps, encode)
            files[name].append(path.read_bytes())
        shapes.append((len(one.frames), one.frames.shape[1], one.frames.shape[2]))
        seconds += len(one.frames) / one.fps
    return files, shapes, {name: 8e-6 * sum(map(len, data)) / seconds for name, data in files.items()}


def _measure(
    files: Mapping[str, list[bytes]], shapes: list[Shape], works: Mapping[str, Decode], repeats: int, clips: int
) -> dict[tuple[str, str], list[float]]:
    """(stream, decoder) -> clips per CPU-second in each repeat; in the first, which is not counted, all decoders must agree."""
    rng = np.random.default_rng(0)
    streams = {**{name: (name, 1) for name in files}, BASE: (LAYERED, BASE_STEP)}
    rates: dict[tuple[str, str], list[float]] = {(stream, name): [] for stream in streams for name in works}
    for repeat in range(repeats + 1):
        places = [(video, rng.random()) for video in range(len(shapes)) for _ in range(clips)]
        spent = dict.fromkeys(rates, 0.0)
        for video, share in places:
            for stream, (name, step) in streams.items():
                starts = starts_of(shapes[video][0], step)
                frames = clip_at(starts[int(share * len(starts))])
                expected = None
                for decoder, decode in works.items():
                    began = time.process_time()
                    found = decode(files[name][video], frames, shapes[video][1:])
                    spent[stream, decoder] += time.process_time() - began
                    if repeat == 0:
                        expected = found.copy() if expected is None else expected
                        _agree(stream, decoder, expected, found)
        if repeat:
            for case, seconds in spent.items():
                rates[case].append(len(places) / seconds)
    return rates


def _agree(stream: str, decoder: str, expected: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8]) -> None:
    difference = np.abs(expected.astype(np.int16) - found).mean()
    if difference > 3:  # levels; other frames differ by ten and more
        raise JobError(f"{decoder} delivers other pictures of '{stream}' than posmlp does ({difference:.1f} levels apart).")
