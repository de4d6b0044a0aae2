"""posmlp data leaks: videos that are in two splits at once, as equal bytes or as equal pictures.

A model that was trained on a video is not judged by it. The build finds which items are the same (`pipeline.duplicates`); here they are
compared with the splits, as overlays leave them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console

from jobs.errors import JobError
from pipeline.errors import DatasetError
from pipeline.index import SPLIT_PREFIX, Dataset

SHOWN = 50  # leaks that are printed for people; --json has them all


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One of the items that are the same. splits: split column -> name."""

    row: int
    key: str
    source: str
    label: str
    splits: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """Items that are the same. kind: "bytes", or "content" where some only look the same. leaks: split columns in which they are apart."""

    kind: str
    copies: list[Copy]
    leaks: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """Of a whole dataset, in the order of the index. known: items with digests; those of datasets that were built without have none."""

    known: int
    found: list[Duplicate]

    @property
    def leaks(self) -> list[Duplicate]:
        return [each for each in self.found if each.leaks]


def find(dataset: Dataset) -> Duplicates:
    """All duplicates among items that no overlay leaves out. Raises DatasetError when the digests are damaged."""
    table = dataset.likeness()
    if table is None:
        return Duplicates(known=0, found=[])
    groups = table.column("group").to_numpy()
    rows = np.flatnonzero((groups >= 0) & dataset.kept())
    order = rows[np.argsort(groups[rows], kind="stable")]
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []
    several = [part.tolist() for part in parts if len(part) > 1]  # the others' copies are left out
    known = len(dataset) - table.column("content").null_count
    return Duplicates(known=known, found=[_duplicate(dataset, table, part) for part in several])


def _duplicate(dataset: Dataset, table: pa.Table, rows: list[int]) -> Duplicate:
    copies = [_copy(dataset, row) for row in rows]
    same = len(set(table.column("bytes").take(pa.array(rows)).to_pylist())) == 1
    leaks = [name for name in dataset.info.splits if len({copy.splits[name] for copy in copies if name in copy.splits}) > 1]
    return Duplicate(kind="bytes" if same else "content", copies=copies, leaks=leaks)


def _copy(dataset: Dataset, row: int) -> Copy:
    codes = {name: int(dataset.column(SPLIT_PREFIX + name)[row]) for name in dataset.info.splits}
    splits = {name: dataset.info.splits[name][code] for name, code in codes.items() if code >= 0}
    label = dataset.info.classes[dataset.item(row).label]
    return Copy(row=row, key=dataset.text("key", row), source=dataset.text("source", row), label=label, splits=splits)


def run(root: Path) -> Duplicates:
    """The duplicates of the dataset in `root`. Raises DatasetError, also when it was built without digests."""
    dataset = Dataset.open(root)
    duplicates = find(dataset)
    if not duplicates.known and len(dataset):
        raise DatasetError(f"{root} was built by a version that did not look for duplicates. Build it anew to find them.")
    return duplicates


def keys(root: Path, duplicates: Duplicates, split: str, column: str | None) -> list[str]:
    """Keys of items of `split` that other splits have too: left out there, the leak is gone. Raises JobError for a split there is not.

    column: of the splits; None where there is only one.
    """
    splits = Dataset.open(root).info.splits
    if column is None and len(splits) > 1:
        raise JobError(f"{root} has the split columns {', '.join(splits)}. Add --column with one of them.")
    name = column if column is not None else next(iter(splits), "")
    if split not in splits.get(name, []):
        raise JobError(f"{root} has no split '{split}' in '{name}'; it has {splits}.")
    return [copy.key for each in duplicates.leaks if name in each.leaks for copy in each.copies if copy.splits.get(name) == split]


def summary(duplicates: Duplicates) -> str:
    """One line for people."""
    num = len(duplicates.leaks)
    inside = len(duplicates.found) - num
    return f"{num} videos are in more than one split, {inside} twice or more in the same one"


def show(root: Path, duplicates: Duplicates) -> None:
    """Prints the leaks for people."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{root}: {summary(duplicates)}")
    for each in duplicates.leaks[:SHOWN]:
        console.print(f"\nthe same {each.kind}, across {', '.join(each.leaks)}")
        for copy in each.copies:
            where = ", ".join(f"{name}: {split}" for name, split in copy.splits.items())
            console.print(f"  {copy.key} ({copy.label}; {where or 'in no split'})")
    if len(duplicates.leaks) > SHOWN:
        console.print(f"\nand {len(duplicates.leaks) - SHOWN} more; --json has them all")
    if duplicates.leaks:
        console.print(f"\nTo leave one side out: posmlp data leaks {root} --keys train | posmlp data exclude {root} --from -")
