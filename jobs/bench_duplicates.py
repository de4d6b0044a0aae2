"""posmlp bench duplicates: what the digests that find duplicates cost, how many copies they miss, how many they see that are none.

Of a folder of videos, all taken for different: CPU time of transcoding with and without digests, in turn; copies that are encoded
again, and how many of them are found; pairs that are taken for the same. Of synthetic digests: time to find the groups.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

from jobs.errors import JobError
from pipeline import duplicates, likeness
from pipeline.label_file import VIDEO_SUFFIXES
from pipeline.likeness import CONTENT_BYTES, STILL_BYTES, Likeness
from pipeline.media import verify_and_transcode
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.source_video import decode, opened, video_stream

EVERY = 5  # of the videos are encoded again
RECODINGS = (("libx264", {"crf": "32"}, 1.0, "mp4"), ("libx264", {"crf": "28"}, 0.5, "mkv"), ("mpeg4", {"b": "300k"}, 1.0, "avi"))
SYNTHETIC = 300_000


def run(videos: Path) -> dict[str, object]:
    """The figures, by name. Raises JobError for a folder without videos, RejectedError for a video that is damaged."""
    files = sorted(path for path in videos.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise JobError(f"{videos} holds no video. Give a folder of videos that are all different.")
    with tempfile.TemporaryDirectory() as folder:
        contents = np.stack([_content(path, Path(folder)) for path in files])
        chosen = range(0, len(files), EVERY)
        copies = [(place, _content(copy, Path(folder))) for place in chosen for copy in _recoded(files[place], Path(folder))]
        cost = _share(files[::EVERY], Path(folder))
    pairs = [(i, j) for i, j in itertools.combinations(range(len(files)), 2) if _alike(contents[i], contents[j])]
    found = sum(_alike(contents[place], copy) for place, copy in copies)
    began = time.process_time()
    duplicates.alike(_synthetic(SYNTHETIC))
    return {
        "videos": len(files),
        "copies encoded again": len(copies),
        "of them found": found,
        "pairs of different videos": len(files) * (len(files) - 1) // 2,
        "of them taken for the same": [f"{files[i].name} = {files[j].name}" for i, j in pairs],
        "CPU time of a digest as a share of transcoding": round(cost, 4),
        f"CPU-seconds to find the groups of {SYNTHETIC} items": round(time.process_time() - began, 1),
    }


def _alike(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    return int(duplicates.alike(np.stack([a, b]))[1]) == 0


def _content(path: Path, folder: Path) -> npt.NDArray[np.uint8]:
    report = verify_and_transcode(path, folder / "canonical.mp4", EncodeOptions(preset="ultrafast"), LimitOptions())
    return np.frombuffer(bytes.fromhex(report.content), np.uint8)


def _recoded(path: Path, folder: Path) -> Iterator[Path]:
    for codec, options, scale, suffix in RECODINGS:
        target = folder / f"copy.{suffix}"
        with opened(path, LimitOptions()) as source, av.open(str(target), "w") as out:
            stream = video_stream(source, LimitOptions())
            context = stream.codec_context
            copy = out.add_stream(codec, rate=25, options=options)
            assert isinstance(copy, VideoStream)
            copy.width, copy.height = (int(side * scale) // 2 * 2 for side in (context.width, context.height))
            copy.pix_fmt = "yuv420p"
            for number, frame in enumerate(decode(source, stream, LimitOptions())):
                picture = frame.reformat(copy.width, copy.height, "yuv420p")
                picture.pts, picture.time_base = number, Fraction(1, 25)
                out.mux(copy.encode(picture))
            out.mux(copy.encode(None))
        yield target


def _share(files: list[Path], folder: Path) -> float:
    """CPU time of the digests of what `files` become, as a share of the time to transcode them."""
    whole = digests = 0.0
    for path in files:
        began = time.process_time()
        report = verify_and_transcode(path, folder / "canonical.mp4", EncodeOptions(), LimitOptions())
        whole += time.process_time() - began
        lumas = np.zeros((report.num_frames, report.height, report.width), dtype=np.uint8)
        began = time.process_time()
        seen = Likeness()
        for luma in lumas:
            seen.add(luma)
        seen.digest()
        with path.open("rb") as file:
            likeness.source_digest(file, None, None)
        digests += time.process_time() - began
    return digests / (whole - digests)


def _synthetic(num: int) -> npt.NDArray[np.uint8]:
    """Digests that lie about as densely as those of real videos: smooth stills, small motion."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(110, 30, (num, 4, 4)).repeat(2, axis=1).repeat(2, axis=2).reshape(num, STILL_BYTES)
    motion = rng.integers(-9, 10, (num, CONTENT_BYTES - STILL_BYTES), dtype=np.int8)
    return np.concatenate([np.clip(coarse, 0, 255).astype(np.uint8), motion.view(np.uint8)], axis=1)
