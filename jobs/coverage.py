"""posmlp data coverage: how many of the videos that a list names are in a folder, per class and per split. Reads names, no video.

What it counts as there, a build would find; whether it decodes is the build's to say.
"""

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from jobs.errors import RecipeError
from pipeline.labels import LabelFiles, described
from pipeline.location import Location
from pipeline.manifest import Source, list_videos

Counts = dict[str, int]


def run(videos: Location, labels: LabelFiles, format: str = "auto") -> dict[str, object]:
    """listed, present, missing, share; the same per split column and name, and per class; `missing_paths`. Raises ManifestError."""
    if labels is None:
        raise RecipeError("No list to compare with: add --labels FILE, for example an official list.")
    listed = list_videos(videos, labels, format)
    total = _none()
    splits: dict[str, dict[str, Counts]] = {column: defaultdict(_none) for column in listed.labels.split_columns}
    classes: dict[str, Counts] = defaultdict(_none)
    for sources, what in ((listed.present, "present"), (listed.absent, "missing")):
        for source in sources:
            for counts in (total, classes[source.label], *_of_splits(splits, source)):
                counts["listed"] += 1
                counts[what] += 1
    return {
        "folder": str(videos),
        "labels": described(listed.labels),
        **_with_share(total),
        "splits": {column: {name: _with_share(counts) for name, counts in sorted(names.items())} for column, names in splits.items()},
        "classes": {name: _with_share(counts) for name, counts in sorted(classes.items())},
        "missing_paths": sorted(source.path for source in listed.absent),
    }


def _none() -> Counts:
    return {"listed": 0, "present": 0, "missing": 0}


def _of_splits(splits: dict[str, dict[str, Counts]], source: Source) -> list[Counts]:
    return [names[name] for names, name in zip(splits.values(), source.splits, strict=True) if name]


def _with_share(counts: Counts) -> dict[str, int | float]:
    return {**counts, "share": round(counts["present"] / counts["listed"], 4) if counts["listed"] else 0.0}


def show(found: dict[str, object]) -> None:
    """Prints the counts for people, the least covered classes first."""
    table = Table("", "listed", "present", "missing", "present %")
    splits, classes = found["splits"], found["classes"]
    assert isinstance(splits, dict)
    assert isinstance(classes, dict)
    rows = [("all", found), *((f"{column} {name}", counts) for column, names in splits.items() for name, counts in names.items())]
    for name, counts in [*rows, *sorted(classes.items(), key=lambda each: (each[1]["share"], each[0]))]:
        table.add_row(name, str(counts["listed"]), str(counts["present"]), str(counts["missing"]), f"{100 * counts['share']:.1f}")
    console = Console(soft_wrap=True)
    console.print(f"{found['folder']}: {found['labels']}", markup=False)
    console.print(table)
