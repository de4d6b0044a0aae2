"""What all pages share: reading a run folder's files whatever state they are in, values as text, and the templates.

Whatever comes from files is text to be escaped, never markup: names of videos and classes are other people's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from jobs.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, duration, num_bytes, percent, short
from jobs.inline_video import InlineVideo

MAX_FILE_BYTES = 64 << 20  # of a JSON or YAML file


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one run says of a video: its likeliest class, that class's probability, and the truth's. run: its place on the page."""

    run: int
    predicted: str
    confidence: float
    truth: float
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A video that plays on the page, its truth, and what each run says of it."""

    key: str
    truth: str
    video: InlineVideo
    verdicts: list[Verdict]


def read_mapping(path: Path, notes: list[str]) -> dict[str, object]:
    """A YAML or JSON mapping; empty, with a note, where the file is missing or unreadable."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"got a {type(values).__name__}, expected sections")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    return values


def sections(values: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """A nested mapping as sections of dotted keys and texts; what is in no section comes first, under ""."""
    found: dict[str, dict[str, str]] = {"": {}}
    for name, value in values.items():
        if isinstance(value, dict):
            found[str(name)] = dict(flat(value))
        else:
            found[""][str(name)] = text(value)
    return {name: rows for name, rows in found.items() if rows}


def flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and texts of a nested mapping."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", text(value))]
    return rows


def text(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "–"  # noqa: RUF001 - a dash for people
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(text(item) for item in value)
    return str(value)


def template(name: str) -> jinja2.Template:
    """One of the package's templates, escaping everything; unknown names in it are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"short": short, "percent": percent, "duration": duration, "bytes": num_bytes, "count": lambda n: f"{n:,}"}
    environment.globals |= {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return environment.get_template(name)
