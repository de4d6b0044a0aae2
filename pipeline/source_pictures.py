"""Pictures as a user has them: a folder of numbered ones is a video, a single one is a video of one frame. Like `source_video`.

Pictures are untrusted input as well: JPEG and PNG alone, told by their first bytes, opened within the same limits, one at a time.
"""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

from av.video.frame import VideoFrame

from pipeline.canonical import Timed
from pipeline.frame_folder import IMAGE_SUFFIXES, series_of
from pipeline.options import LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.source_video import DEFAULT_RATE, Reading, SourceFacts, decode, facts_of, opened, video_stream

HEAD_BYTES = 1 << 18  # in which a picture states its size, behind colour profiles and previews
_BEGINNINGS = {b"\xff\xd8\xff": "jpeg_pipe", b"\x89PN": "png_pipe"}


def are_pictures(path: Path) -> bool:
    """Whether `read_pictures` is who reads it: a folder, or a file that is called like a picture."""
    return path.suffix.lower() in IMAGE_SUFFIXES or path.is_dir()


@contextmanager
def read_pictures(path: Path, limits: LimitOptions, fps: float | None, num_frames: int | None) -> Iterator[Reading]:
    """The frames of a folder at `fps`, or one picture. num_frames: how many the folder must have, None for any number.

    Raises RejectedError, also while frames are taken: for gaps, a picture that is damaged or of another size, and past a limit.
    """
    if path.is_dir():
        if fps is None:
            raise RejectedError(Reason.UNREADABLE, "a folder; encode.frames_fps states the rate of folders of frames")
        files = _listed(path, limits, num_frames)
    else:
        files = [path]
    size = sum(_size(file, may_be_link=not path.is_dir()) for file in files)
    if size > limits.max_bytes:
        raise RejectedError(Reason.TOO_MANY_BYTES, f"{size} bytes in {len(files)} pictures, limits.max_bytes is {limits.max_bytes}")
    rate = Fraction(fps or DEFAULT_RATE).limit_denominator(1001)
    first, facts = _decoded(files[0], limits)
    frames = chain([first], (_like(first, file, limits) for file in files[1:]))
    yield Reading(
        files=files,
        facts=SourceFacts(
            container="frames" if path.is_dir() else "image",
            codec=facts.codec,
            pixel_format=facts.pixel_format,
            width=first.width,
            height=first.height,
            fps=float(rate),
            header_frames=len(files),
            duration_s=float(len(files) / rate),
            size=size,
        ),
        aspect=Fraction(1),
        frames=(Timed(frame, number / rate, 1 / rate) for number, frame in enumerate(frames)),
    )


def _listed(folder: Path, limits: LimitOptions, num_frames: int | None) -> list[Path]:
    try:
        series = series_of(os.listdir(folder))
    except PermissionError as error:
        raise RejectedError(Reason.UNREADABLE, str(error.strerror)) from None
    except OSError as error:
        raise RejectedError(Reason.READ_FAILED, str(error.strerror)) from None
    if series.problem:
        raise RejectedError(Reason.FRAMES_MISSING, series.problem)
    if not series.names:
        raise RejectedError(Reason.NO_FRAMES, "a folder without numbered pictures")
    if num_frames is not None and num_frames != len(series.names):
        raise RejectedError(Reason.FRAMES_MISSING, f"the folder has {len(series.names)} frames, {num_frames} were listed")
    if len(series.names) > limits.max_frames:
        raise RejectedError(Reason.TOO_MANY_FRAMES, f"{len(series.names)} frames, limits.max_frames is {limits.max_frames}")
    return [folder / name for name in series.names]


def _size(file: Path, *, may_be_link: bool) -> int:
    """Of a regular file, in bytes. Whoever listed a single picture looked where its link leads; of those in a folder nobody did."""
    try:
        status = file.stat() if may_be_link else file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise RejectedError(Reason.MISSING) from None
    except PermissionError as error:
        raise RejectedError(Reason.UNREADABLE, str(error.strerror)) from None
    except OSError as error:
        raise RejectedError(Reason.READ_FAILED, f"{file.name}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise RejectedError(Reason.UNREADABLE, f"{file.name} is not a regular file")
    return status.st_size


def _decoded(file: Path, limits: LimitOptions) -> tuple[VideoFrame, SourceFacts]:
    try:
        with opened(file, limits, _kind(file, limits)) as container:
            stream = video_stream(container, limits)
            facts = facts_of(container, stream, file)
            frame = next(decode(container, stream, limits), None)
    except RejectedError as rejected:
        raise RejectedError(rejected.reason, f"{file.name}: {rejected.detail or rejected.reason.text}") from None
    if frame is None:
        raise RejectedError(Reason.DAMAGED, f"{file.name} holds no picture")
    return frame, facts


def _kind(file: Path, limits: LimitOptions) -> str:
    """FFmpeg's name of the picture's format, from its beginning; its stated size is within the limits."""
    try:
        with file.open("rb") as opened_file:
            head = opened_file.read(HEAD_BYTES)
    except PermissionError as error:
        raise RejectedError(Reason.UNREADABLE, str(error.strerror)) from None
    except OSError as error:
        raise RejectedError(Reason.READ_FAILED, str(error.strerror)) from None
    if head[:3] not in _BEGINNINGS:
        raise RejectedError(Reason.NOT_A_VIDEO, "neither JPEG nor PNG")
    kind = _BEGINNINGS[head[:3]]
    width, height = _stated_size(kind, head)
    if width * height > limits.max_pixels:  # the decoder refuses them too, without a reason
        raise RejectedError(Reason.TOO_MANY_PIXELS, f"{width}x{height}, limits.max_pixels is {limits.max_pixels}")
    return kind


def _stated_size(kind: str, head: bytes) -> tuple[int, int]:
    """Width and height by PNG's IHDR or JPEG's frame header (ITU T.81, B.2.2); (0, 0) where the head does not reach so far."""
    if kind == "png_pipe":
        return struct.unpack(">II", head[16:24]) if len(head) >= 24 else (0, 0)
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        if 0xC0 <= head[at + 1] <= 0xCF and head[at + 1] not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            return width, height
        at += 2 + int.from_bytes(head[at + 2 : at + 4])
    return 0, 0


def _like(first: VideoFrame, file: Path, limits: LimitOptions) -> VideoFrame:
    frame, _ = _decoded(file, limits)
    if (frame.width, frame.height) != (first.width, first.height):
        sizes = f"{frame.width}x{frame.height} pixels, the first frame has {first.width}x{first.height}"
        raise RejectedError(Reason.FRAMES_DIFFER, f"{file.name}: {sizes}")
    return frame
