"""posmlp data exclude, posmlp data relabel: overlays beside a dataset's immutable shards, on a disk or at a URL, and taking them back.

A dataset with an overlay is another dataset: its fingerprint changes, so that a run that began without it does not resume with it.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.build_folder import explained, only_builder
from jobs.errors import JobError
from pipeline import overlay
from pipeline.durable import TEMPORARY
from pipeline.errors import DatasetError
from pipeline.index import Dataset, read_info
from pipeline.location import Location
from pipeline.overlay import Kind

MAX_BYTES = 1 << 30  # of a list of keys
MAX_REASON = 500  # characters
SHOWN = 5  # offenders named in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Amended:
    """What a command did. file: the overlay, "" when nothing was to be done; num: items in it; dataset: as it is now."""

    file: str
    num: int
    dataset: Dataset


def exclude(root: Location, keys: Sequence[str], reason: str = "") -> Amended:
    """Leaves items out of the dataset; those that are out already are no error.

    Raises DatasetError (no dataset, keys that it does not have), PipelineError (another writer), JobError (no key, a bad reason).
    """
    with _changed(root) as dataset:
        rows = _rows(dataset, keys)
        return _write(dataset, Kind.EXCLUDE, np.setdiff1d(rows, dataset.overlay.excluded), reason)


def relabel(root: Location, labels: Mapping[str, str], reason: str = "") -> Amended:
    """Gives items another of the dataset's classes; those that have it already are no error. Raises what `exclude` raises.

    A class that the dataset does not have is refused: models are built for the number of classes. Build the dataset anew for one more.
    """
    with _changed(root) as dataset:
        if dataset.info.boxes is not None:
            raise DatasetError(f"{root} has keyframes, whose labels are those of their boxes. Correct the label file and build it anew.")
        classes = {name: place for place, name in enumerate(dataset.info.classes)}
        strange = sorted(set(labels.values()) - classes.keys())
        if strange:
            raise DatasetError(
                f"{root} has no class {_listed(strange)}; it has {_listed(dataset.info.classes)}. Take one of these; a new class needs a "
                "dataset that is built with it ('posmlp data build'), or videos of it ('posmlp data append')."
            )
        rows = _rows(dataset, list(labels))
        new = {row: classes[labels[dataset.text("key", row)]] for row in rows.tolist()}
        have = dataset.column("label")
        wanted = np.array([row for row, label in new.items() if have[row] != label], dtype=np.uint32)
        return _write(dataset, Kind.RELABEL, wanted, reason, np.array([new[row] for row in wanted.tolist()], dtype=np.int32))


def undo(root: Location, kind: Kind) -> Amended:
    """Takes the newest exclusion or relabelling back. Raises JobError when there is none."""
    with _changed(root) as dataset:
        found = [each for each in dataset.overlay.files if each.kind == kind]
        if not found:
            raise JobError(f"{root} has no {kind} to take back. 'posmlp data info {root}' lists its overlays.")
        dataset.folder.delete([found[-1].file])
        return Amended(file=found[-1].file, num=len(found[-1].rows), dataset=Dataset.open(root))


@contextmanager
def _changed(root: Location) -> Iterator[Dataset]:
    """The dataset as it is while nobody else writes in its folder. At a URL nobody is kept out: what two write at once both counts."""
    if isinstance(root, str):
        yield Dataset.open(root)
        return
    with explained(root):
        read_info(root)  # before anything is locked: is there one at all?
        with only_builder(root):
            for leftover in (root / overlay.FOLDER).glob(TEMPORARY):
                leftover.unlink(missing_ok=True)
            yield Dataset.open(root)


def _write(dataset: Dataset, kind: Kind, rows: overlay.Rows, reason: str, labels: overlay.Labels | None = None) -> Amended:
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise JobError(f"--reason: expected at most {MAX_REASON} characters in one line.")
    if not len(rows):
        return Amended(file="", num=0, dataset=dataset)
    number = 1 + max((each.number for each in dataset.overlay.files), default=0)
    keys = dataset.table.column("key").take(pa.array(rows)).combine_chunks()
    file = overlay.write_file(dataset.folder, kind, number, rows, keys, labels, reason)
    return Amended(file=file, num=len(rows), dataset=Dataset.open(dataset.where))


def _rows(dataset: Dataset, keys: Sequence[str]) -> overlay.Rows:
    """The rows of `keys`, ascending. Raises DatasetError naming keys that the dataset does not have."""
    if not keys:
        raise JobError("No key is named. Give keys, or --from FILE; 'posmlp data view' shows the keys of a dataset.")
    wanted = pa.array(sorted(set(keys)), pa.string())
    column = dataset.table.column("key")
    rows = np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy()).astype(np.uint32)
    if len(rows) < len(wanted):
        unknown = sorted(set(keys) - set(column.take(pa.array(rows)).to_pylist()))
        raise DatasetError(f"{dataset.where} has no item {_listed(unknown)}. Nothing was changed; 'posmlp data view' shows its keys.")
    return rows


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more


def read_keys(path: Path) -> list[str]:
    """Keys from a file (`-`: standard input): one a line, or CSV with a column key. Raises JobError."""
    text = _text(path)
    first = text.partition("\n")[0].strip()
    if "key" in first.split(","):
        return [row["key"] for row in _csv(path, text, ("key",))]
    return [line for line in text.splitlines() if line.strip()]


def read_labels(path: Path) -> dict[str, str]:
    """Key -> class from CSV with the columns key and label (`-`: standard input). Raises JobError."""
    return pairs((row["key"], row["label"]) for row in _csv(path, _text(path), ("key", "label")))


def split_label(text: str) -> tuple[str, str]:
    """KEY=CLASS. A key may hold a "=", so the last one counts; a class with a "=" in its name goes into a file. Raises JobError."""
    key, separator, label = text.rpartition("=")
    if not separator or not key or not label:
        raise JobError(f"'{text}': expected KEY=CLASS, for example walk/anna_03=run.")
    return key, label


def pairs(found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key -> class. Raises JobError when a key has two classes."""
    labels: dict[str, str] = {}
    for key, label in found:
        if labels.setdefault(key, label) != label:
            raise JobError(f"'{key}' is given two classes, '{labels[key]}' and '{label}'. Keep one.")
    return labels


def _text(path: Path) -> str:
    """Raises JobError, also for what is no text: nothing but keys and classes is in such a file."""
    name = "standard input" if path == Path("-") else str(path)
    try:
        with click.open_file(path, "rb") as file:
            data = bytes(file.read(MAX_BYTES + 1))
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise JobError(f"--from {name}: {error.strerror}. Give a file of keys.") from None
    except UnicodeDecodeError:
        raise JobError(f"--from {name} is not text in UTF-8.") from None
    if len(data) > MAX_BYTES:
        raise JobError(f"--from {name} has more than {MAX_BYTES >> 20} MiB. Is it a list of keys?")
    return text


def _csv(path: Path, text: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    lacking = set(columns) - set(reader.fieldnames or ())
    if lacking:
        raise JobError(f"--from {path} lacks the column {' and '.join(sorted(lacking))}. Expected CSV with a header: {','.join(columns)}.")
    try:
        for row in reader:
            if any(not row[name] for name in columns) or None in row:
                raise JobError(f"--from {path}, line {reader.line_num}: expected a value of {' and of '.join(columns)}.")
            yield row
    except csv.Error as error:
        raise JobError(f"--from {path}, line {reader.line_num}: {error}.") from None


def show(done: Amended, verb: str) -> None:
    """Says what was done. verb: "left out", "relabelled", "taken back"."""
    dataset = done.dataset
    what = f"{done.num} items {verb} ({done.file})" if done.file else "nothing to do, it is so already"
    out = len(dataset.overlay.excluded)
    click.echo(
        f"{dataset.where}: {what}; {dataset.num_kept} items now, {out} left out, {len(dataset.overlay.relabelled)} relabelled; "
        f"fingerprint {dataset.info.fingerprint}"
    )
