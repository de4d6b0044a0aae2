"""The folder of raw videos, on a disk or at a URL: which files it holds, and which of them a label means. Reads names and sizes alone."""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from pipeline.errors import ManifestError
from pipeline.frame_folder import IMAGE_SUFFIXES, series_of
from pipeline.label_file import VIDEO_SUFFIXES
from pipeline.location import Location
from pipeline.remote import RemoteFolder

_NO_TEXT = re.compile("[\ud800-\udfff]")  # bytes of a name that Python could not read as text

Found: TypeAlias = tuple[str, int | None, int | None]


class LocalVideos:
    """Below `path`, links that lead out of it excepted; what it learns of subfolders is kept, so that a file costs one system call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._home = os.path.realpath(path)
        self._inside: dict[str, bool] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}  # folder -> stem -> names of videos; read where a label has no extension

    def __str__(self) -> str:
        return str(self._path)

    def walk(self, suffixes: Collection[str] = VIDEO_SUFFIXES) -> Iterator[str]:
        """Relative paths of all files with these suffixes; hidden files and folders are not looked at, links to folders not followed."""
        home = os.fspath(self._path)
        for folder, folders, files in os.walk(home):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inner = os.path.relpath(folder, home).replace(os.sep, "/")
            for name in files:
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                    yield name if inner == "." else f"{inner}/{name}"

    def subfolders(self, path: str) -> list[str]:
        """Relative paths of the folders in a folder, hidden ones excepted."""
        names = (entry.name for entry in (self._path / path).iterdir() if entry.is_dir() and not entry.name.startswith("."))
        return [os.path.normpath(f"{path}/{name}") for name in sorted(names)]

    def on_disk(self, path: str, what: str) -> Path:
        """A file or folder that is read in many small parts, of the kind `what`. Raises ManifestError for a link that leads out."""
        self._size(path, path, f"{self}/{path}")
        return self._path / path

    def find(self, text: str, where: str) -> Found:
        """The path that a label gives, normalised; its size in bytes, None for no such file; of a folder of pictures their number.

        where: of the label. Raises ManifestError when the path leads out of here.
        """
        path = os.path.normpath(text) if text else ""
        if os.path.isabs(path) and path.startswith(self._home.rstrip(os.sep) + os.sep):
            path = os.path.relpath(path, self._home)
        _refuse_outside(path, text, where)
        size, folder = self._size(path, text, where)
        if size is None and os.path.splitext(path)[1].lower() not in VIDEO_SUFFIXES:
            path = self._with_extension(path, text, where)
            size, folder = self._size(path, text, where)
        num_frames = None
        if folder:
            size, num_frames = _pictures(os.path.join(self._home, path))
        return path.replace(os.sep, "/"), size, num_frames

    def _size(self, path: str, text: str, where: str) -> tuple[int | None, bool]:
        """(size in bytes, None for nothing there; whether it is a folder)."""
        full = os.path.join(self._home, path)
        folder = os.path.dirname(full)
        if folder not in self._inside:
            self._inside[folder] = self._holds(os.path.realpath(folder))
        try:
            status = os.lstat(full)
            if not self._inside[folder] or (stat.S_ISLNK(status.st_mode) and not self._holds(os.path.realpath(full))):
                real = os.path.realpath(full)
                raise ManifestError(f"{where}: path '{text}' is a link that leads out of the videos folder, to {real}.")
            status = os.stat(full) if stat.S_ISLNK(status.st_mode) else status
            return status.st_size, stat.S_ISDIR(status.st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return None, False
        except OSError as error:  # a name that is longer than a file system allows
            raise ManifestError(f"{where}: path '{text[:80]}' cannot be looked up: {error.strerror}.") from None

    def _with_extension(self, path: str, text: str, where: str) -> str:
        """The video in the same folder that is called like this and has an extension; the path itself when there is none."""
        folder, name = os.path.split(path)
        full = os.path.join(self._home, folder)
        if folder not in self._stems:
            stems = self._stems.setdefault(folder, {})
            for other in os.listdir(full) if self._inside[full.rstrip(os.sep)] and os.path.isdir(full) else ():
                stem, suffix = os.path.splitext(other)
                if suffix.lower() in VIDEO_SUFFIXES or suffix.lower() in IMAGE_SUFFIXES:
                    stems.setdefault(stem, []).append(other)
        found = _only(self._stems[folder].get(name, []), text, where)
        return os.path.join(folder, found) if found else path

    def _holds(self, real: str) -> bool:
        return real == self._home or real.startswith(self._home.rstrip(os.sep) + os.sep)


class RemoteVideos:
    """The same for a URL, which is listed once: there are no links, and no empty folders. Each video is one object."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._sizes = RemoteFolder(url).sizes()

    def __str__(self) -> str:
        return self._url

    def walk(self, suffixes: Collection[str] = VIDEO_SUFFIXES) -> Iterator[str]:
        for path in self._sizes:
            if os.path.splitext(path)[1].lower() in suffixes and not any(part.startswith(".") for part in path.split("/")):
                yield path

    def subfolders(self, path: str) -> list[str]:
        return []

    def on_disk(self, path: str, what: str) -> Path:
        """Raises ManifestError: each video would take many requests."""
        raise ManifestError(
            f"{self._url}/{path}: {what} are read from a disk only; at a URL a video is one file. Copy them into a folder of this machine "
            "and give that as data.videos."
        )

    def find(self, text: str, where: str) -> Found:
        inner = text.removeprefix(f"{self._url}/")
        path = os.path.normpath(inner) if inner else ""
        _refuse_outside(path, text, where)
        if path not in self._sizes and os.path.splitext(path)[1].lower() not in VIDEO_SUFFIXES:
            if path in self._picture_folders:
                self.on_disk(path, "folders of pictures")
            path = _only(self._stems.get(path, []), text, where) or path
        return path, self._sizes.get(path), None

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        stems: dict[str, list[str]] = defaultdict(list)
        for path in self._sizes:
            stem, suffix = os.path.splitext(path)
            if suffix.lower() in VIDEO_SUFFIXES or suffix.lower() in IMAGE_SUFFIXES:
                stems[stem].append(path)
        return stems

    @cached_property
    def _picture_folders(self) -> set[str]:
        return {path.rpartition("/")[0] for path in self.walk(IMAGE_SUFFIXES)}


Videos: TypeAlias = LocalVideos | RemoteVideos


def videos_at(place: Location) -> Videos:
    """Raises ManifestError when there is no such folder, StorageError."""
    if isinstance(place, str):
        return RemoteVideos(place)
    if not place.is_dir():
        raise ManifestError(f"{place} is not a folder. data.videos must name the folder that holds the videos.")
    return LocalVideos(place)


def _refuse_outside(path: str, text: str, where: str) -> None:
    if not text or os.path.isabs(path) or path.split(os.sep)[0] == ".." or "\0" in path:
        raise ManifestError(f"{where}: path {text!r} must be relative to the videos folder and stay in it.")
    if not path.isascii() and _NO_TEXT.search(path):
        raise ManifestError(f"{where}: path {text!a} is not a name in UTF-8. Rename the file.")


def _only(names: list[str], text: str, where: str) -> str | None:
    """The one file that a label without an extension may mean. Raises ManifestError when there are several."""
    if len(names) > 1:
        raise ManifestError(f"{where}: '{text}' may be {' or '.join(sorted(names))}. Name the extension, or keep one of them.")
    return names[0] if names else None


def _pictures(folder: str) -> tuple[int, int]:
    """(about how many bytes, number of numbered pictures) of a folder: one picture is looked at for all."""
    try:
        names = series_of(os.listdir(folder)).names
        return len(names) * os.lstat(os.path.join(folder, names[len(names) // 2])).st_size if names else 0, len(names)
    except OSError:  # the build says what it is
        return 0, 0
