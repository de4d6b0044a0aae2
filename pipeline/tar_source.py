"""WebDataset tars as a source: which videos they hold, what is said of each, and the bytes of one. Nothing is extracted by its name.

A sample is the members whose names are equal up to the first dot of their last part: a video (or a picture) and its label in `.json`
(`class` or `label`; also `split`, `group`), `.cls` or `.txt`. Tars are untrusted: headers are read by our own few lines, because
Python's tarfile reads an extended header of any stated size into memory; names become text for people and keys, never paths.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ManifestError
from pipeline.frame_folder import IMAGE_SUFFIXES
from pipeline.label_file import VIDEO_SUFFIXES
from pipeline.options import LimitOptions
from pipeline.quarantine import Reason, RejectedError

BLOCK = 512
MAX_NAME_BYTES = 1 << 16  # of an extended header
MAX_LABEL_BYTES = 1 << 16  # of a .json, .cls or .txt member; what others hold is not looked at
MAX_LABEL_LETTERS = 200
COPY_BYTES = 1 << 20
_REGULAR, _PAX, _LONG_NAME = b"0\07", b"x", b"L"
_LABELS = ("json", "cls", "txt")


@dataclass(frozen=True, slots=True)
class TarVideo:
    """A video in a tar: its name there, where its bytes are, and what is said of it ("" for nothing)."""

    name: str
    offset: int
    size: int
    label: str
    split: str
    group: str


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    size: int


def videos_of(tar: Path) -> Iterator[TarVideo]:
    """The videos of a tar, in its order. Raises ManifestError naming the tar and the member for what is no tar or has no label."""
    if not tar.is_file():  # a pipe called so would be waited for
        raise ManifestError(f"{tar} is not a regular file. Remove it.")
    with tar.open("rb") as file:
        sample: dict[str, _Member] = {}
        current = None
        for member in _members(tar, file):
            folder, slash, last = member.name.rpartition("/")
            stem, dot, extension = last.partition(".")
            if not dot:
                continue
            if folder + slash + stem != current:
                yield from _video(tar, file, sample)
                sample, current = {}, folder + slash + stem
            if sample.setdefault(extension.lower(), member) is not member:
                raise ManifestError(f"{tar} holds {member.name!r} twice. Keep one of them.")
        yield from _video(tar, file, sample)


def copy_video(tar: Path, offset: int, size: int, destination: Path, limits: LimitOptions) -> None:
    """Writes the video at `offset` to `destination`, a name of ours. Raises RejectedError, and OSError where it cannot be written."""
    if size > limits.max_bytes:
        raise RejectedError(Reason.TOO_MANY_BYTES, f"{size} bytes, limits.max_bytes is {limits.max_bytes}")
    with destination.open("wb") as out:
        for block in _blocks(tar, offset, size):
            out.write(block)
            size -= len(block)
    if size:
        raise RejectedError(Reason.TRUNCATED, f"the tar ends {size} bytes before the video does")


def _blocks(tar: Path, offset: int, size: int) -> Iterator[bytes]:
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            while size and (block := file.read(min(size, COPY_BYTES))):
                yield block
                size -= len(block)
    except FileNotFoundError:
        raise RejectedError(Reason.MISSING) from None
    except PermissionError as error:
        raise RejectedError(Reason.UNREADABLE, str(error.strerror)) from None
    except OSError as error:
        raise RejectedError(Reason.READ_FAILED, str(error.strerror)) from None


def _video(tar: Path, file: BinaryIO, sample: dict[str, _Member]) -> Iterator[TarVideo]:
    """The video of one sample and what its other members say; nothing where there is none."""
    found = [f".{extension}" for extension in sample]
    videos = [suffix for suffix in found if suffix in VIDEO_SUFFIXES] or [suffix for suffix in found if suffix in IMAGE_SUFFIXES]
    if not videos:
        return
    member = sample[videos[0][1:]]
    if len(videos) > 1:
        raise ManifestError(f"{tar}: {member.name!r} has other videos of the same name beside it ({', '.join(videos)}). Keep one.")
    label, more = "", dict[str, str]()
    for extension in _LABELS:
        if extension in sample and not label:
            label, more = _said(tar, sample[extension], _read(tar, file, sample[extension]), extension)
    if not label:
        raise ManifestError(f"{tar}: {member.name!r} has no label: no .json with class or label, no .cls, no .txt beside it.")
    yield TarVideo(member.name, member.offset, member.size, label, more.get("split", ""), more.get("group", ""))


def _said(tar: Path, member: _Member, data: bytes, extension: str) -> tuple[str, dict[str, str]]:
    """(label, split and group) of a member that says something of a video."""
    try:
        text = data.decode().strip()
        values = json.loads(text) if extension == "json" else {"label": text}
    except (ValueError, RecursionError):
        raise ManifestError(f"{tar}: {member.name!r} is not {'JSON' if extension == 'json' else 'text'} in UTF-8.") from None
    said = {name: str(value).strip() for name, value in values.items() if isinstance(value, str | int)} if isinstance(values, dict) else {}
    label = said.get("class") or said.get("label", "")
    if len(label) > MAX_LABEL_LETTERS or "\n" in label:
        raise ManifestError(
            f"{tar}: the label in {member.name!r} has {len(label)} letters, a class {MAX_LABEL_LETTERS} at most. A caption?"
        )
    return label, said


def _read(tar: Path, file: BinaryIO, member: _Member) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise ManifestError(f"{tar}: {member.name!r} has {member.size} bytes, a label may have {MAX_LABEL_BYTES}.")
    file.seek(member.offset)
    return file.read(member.size)


def _members(tar: Path, file: BinaryIO) -> Iterator[_Member]:
    """Regular files in a POSIX (ustar, pax) or GNU tar, whose bytes may lie behind the end of a tar that was cut off."""
    at, name, stated = 0, "", -1
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):  # the end: empty blocks, or nothing
            return
        size = _number(header[124:136]) if len(header) == BLOCK else -1
        if size < 0 or _number(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            hint = "It is compressed: decompress it" if header[:2] == b"\x1f\x8b" else "Copy it again, or remove it"
            raise ManifestError(f"{tar} is no tar, or damaged, at byte {at}. {hint}.")
        kind = header[156:157]
        if kind in (_PAX, _LONG_NAME):
            if size > MAX_NAME_BYTES:
                raise ManifestError(f"{tar}: the name of a member at byte {at} has {size} bytes, at most {MAX_NAME_BYTES} are read.")
            name, stated = _extended(file.read(size), kind, name, stated)
        else:
            size = stated if stated >= 0 else size
            if kind in _REGULAR:
                yield _Member(name or _plain_name(header), at + BLOCK, size)
            name, stated = "", -1
        at += BLOCK + -(-size // BLOCK) * BLOCK


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for large ones; -1 for neither, and for what no file can have."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:])
        return value if value < 1 << 62 else -1
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else -1


def _plain_name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    joined = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
    return joined.decode(errors="replace")


def _extended(data: bytes, kind: bytes, name: str, size: int) -> tuple[str, int]:
    """(name, size in bytes) that an extended header states for the member behind it, the given ones where it does not."""
    if kind == _LONG_NAME:
        return data.rstrip(b"\0").decode(errors="replace"), size
    while data:  # records "<length> <keyword>=<value>\n", the length of all of it
        length, _, rest = data.partition(b" ")
        if not re.fullmatch(rb"[0-9]{1,6}", length) or not 0 < int(length) <= len(data):
            break
        keyword, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if keyword == b"path":
            name = value.decode(errors="replace")
        elif keyword == b"size" and re.fullmatch(rb"[0-9]{1,15}", value):
            size = int(value)
        data = data[int(length) :]
    return name, size
