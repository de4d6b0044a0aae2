"""A folder of downloaded clips, and which file is which line of an official list of YouTube clips.

Downloaders name a clip `<id>_<start, six digits>_<end>` or `<id>`, with any video extension, in one folder, or in class folders that
are called as the class is, with spaces or underscores, below folders of splits or not. Only names are looked at.
"""

import os
from collections import defaultdict
from collections.abc import Iterable

from pipeline.errors import ManifestError


class Downloads:
    """Finds files by id and times. paths: of all videos, relative, with slashes."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._by_stem: dict[str, str | list[str]] = {}
        for path in paths:
            stem = os.path.splitext(path.rpartition("/")[2])[0]
            other = self._by_stem.get(stem)
            self._by_stem[stem] = path if other is None else [*([other] if isinstance(other, str) else other), path]

    def find(self, where: str, video: str, start: float, end: float, label: str) -> tuple[str | None, bool]:
        """The clip's file, None for none, and whether it is named by the id alone. start, end: seconds in the YouTube video.

        Of several files that may be it, the one in the class's folder. Raises ManifestError when that does not tell; where: for it.
        """
        for stem in clip_names(video, start, end):
            if (found := self._by_stem.get(stem)) is not None:
                return found if isinstance(found, str) else _one_of(where, found, label), stem == video
        return None, False

    def named(self, where: str, video: str) -> str | None:
        """The file that is called as a video is, None for none. Raises ManifestError where there are several; where: for it."""
        found = self._by_stem.get(video)
        return found if found is None or isinstance(found, str) else _one_of(where, found, "")


def clip_names(video: str, start: float, end: float) -> list[str]:
    """What the file of a clip may be called, without extension, the most telling name first."""
    return [f"{video}_{round(start):06d}_{round(end):06d}", f"{video}_{round(start)}_{round(end)}", video]


def _one_of(where: str, paths: list[str], label: str) -> str:
    homes: dict[bool, list[str]] = defaultdict(list)
    for path in paths:
        homes[_plain(label) in map(_plain, path.split("/")[:-1])].append(path)
    best = homes[True] or homes[False]
    if len(best) > 1:
        raise ManifestError(f"{where}: {len(best)} files may be this clip, among them {best[0]} and {best[1]}. Keep one of them.")
    return best[0]


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold().strip()
