"""Where something lies: a path of this machine, or the URL of a folder in an object store. Paths are `Path`, URLs `str`.

A `Path` would make `s3:/bucket` of `s3://bucket`, so the two never mix.
"""

import re
from pathlib import Path, PurePosixPath
from typing import TypeAlias

Location: TypeAlias = Path | str

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)


def location(text: str) -> Location:
    """A text with `://` as a URL without slashes at its end, `file://…` and any other text as a path.

    Raises ValueError for a URL that carries credentials or options, or chains file systems: what is given here is written into files.
    """
    found = _URL.fullmatch(text)
    if found is None:
        return Path(text)
    scheme, rest = found[1].lower(), found[2].rstrip("/")
    if scheme == "file":
        return Path("/" + rest.lstrip("/"))
    if "@" in rest.partition("/")[0] or "?" in rest or "::" in rest or not rest:
        raise ValueError(
            f"got the URL {scheme}://…, expected scheme://bucket/folder without user, password, options or '::': "
            "credentials come from the environment"
        )
    return f"{scheme}://{rest}"


def within(place: Location, name: str) -> Location:
    """A file in a folder."""
    return f"{place}/{name}" if isinstance(place, str) else place / name


def inside(name: str) -> bool:
    """Whether a relative name, as a dataset.json has it, stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
