"""From finished shards to a dataset: their records become the index, the list of digests, the quarantine list and, last, dataset.json.

data build     index.arrow, likeness.arrow, quarantine.parquet, dataset.json
data append    the same with the generation in the names; dataset.json, replaced, is what makes the new ones count
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from jobs.build_shard import read_record, record_path
from pipeline import duplicates
from pipeline.durable import committed, sha256_of
from pipeline.errors import DatasetError
from pipeline.index import Dataset, DatasetInfo, ShardInfo, write_index
from pipeline.media import library_versions
from pipeline.quarantine import Reason

SHOWN = 5  # rejects named in a message
KEPT_GENERATIONS = 2  # who opened the dataset a moment ago still finds its index


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a call added: shards with their rows (whose column `shard` counts from `first_shard`), and rows of the quarantine list.

    likenesses: the digests of the rows of `tables`.
    """

    shards: list[ShardInfo]
    tables: list[pa.Table]
    likenesses: list[pa.Table]
    rejects: list[dict[str, object]]


def libraries() -> dict[str, str]:
    """Versions that decide which bytes come out."""
    return {**library_versions(), "pyarrow": pa.__version__, "python": platform.python_version()}


def collect(out: Path, work: Path, numbers: Iterable[int], first_shard: int = 0) -> Made:
    """The records of the shards with these numbers, in this order; shards whose videos were all rejected are removed."""
    made = Made(shards=[], tables=[], likenesses=[], rejects=[])
    for number in numbers:
        shard, table, digests, rejected = read_record(record_path(work, number))
        made.rejects.extend(rejected)
        if table.num_rows == 0:
            (out / shard.file).unlink(missing_ok=True)
            continue
        place = table.schema.get_field_index("shard")  # becomes an index into the shards that there are
        column = pa.repeat(pa.scalar(first_shard + len(made.shards), pa.int32()), table.num_rows)
        made.tables.append(table.set_column(place, table.schema.field(place), column))
        made.likenesses.append(digests)
        made.shards.append(shard)
    return made


def missing_rows(missing: Sequence[str]) -> list[dict[str, object]]:
    """Rows of the quarantine list for paths that a label file names and the folder does not have."""
    return [{"path": name, "reason": Reason.MISSING.value, "explanation": Reason.MISSING.text} for name in missing]


def read_quarantine(dataset: Dataset) -> list[dict[str, object]]:
    """The dataset's quarantine list, a dict a row."""
    rows = pyarrow.parquet.read_table(dataset.root / dataset.info.quarantine_file).to_pylist()
    return [dict(row) for row in rows]


def commit(
    out: Path,
    made: Made,
    quarantine: Sequence[dict[str, object]],
    *,
    classes: list[str],
    splits: dict[str, list[str]],
    build: Mapping[str, object],
    base: Dataset | None = None,
) -> DatasetInfo:
    """Writes index and quarantine list, then dataset.json. base: the dataset that is appended to; its rows and shards come first.

    Raises DatasetError when there is not one video.
    """
    generation = base.info.generation + 1 if base else 0
    info = DatasetInfo(
        generation=generation,
        classes=classes,
        splits=splits,
        num_items=0,
        num_quarantined=len(quarantine),
        num_frames=0,
        index_sha256="",
        index_size=0,
        shards=[*(base.info.shards if base else []), *made.shards],
        build=dict(build),
        libraries=libraries(),
    )
    _write_quarantine(out / info.quarantine_file, quarantine, list(splits))
    tables = [*([base.table] if base else []), *made.tables]
    if not tables:
        listed = "; ".join(f"{row['path']}: {row['reason']} ({row['detail'] or row['explanation']})" for row in quarantine[:SHOWN])
        raise DatasetError(f"None of the {len(quarantine)} videos could be used, see {out / info.quarantine_file}: {listed}")
    sha256, size = write_index(out / info.index_file, tables)
    with committed(out / info.likeness_file) as file:
        duplicates.write_table(file, [*([_likeness(base)] if base else []), *made.likenesses])
    info = replace(info, likeness_sha256=sha256_of(out / info.likeness_file)).with_index(
        sha256=sha256,
        size=size,
        num_items=sum(shard.num_items for shard in info.shards),
        num_frames=sum(pc.sum(table.column("end")).as_py() for table in tables),  # of whole videos, which begin at 0
    )
    with committed(out / "dataset.json") as file:
        file.write(info.to_json().encode())
    _remove_older(out, generation)
    return info


def _likeness(base: Dataset) -> pa.Table:
    """The digests of a dataset's rows; nulls where it was built without them."""
    found = base.likeness()
    if found is not None:
        return found.select([field.name for field in duplicates.COLUMNS])
    return pa.table([pa.nulls(len(base), field.type) for field in duplicates.COLUMNS], schema=pa.schema(duplicates.COLUMNS))


def _remove_older(out: Path, generation: int) -> None:
    for pattern in ("index*.arrow", "likeness*.arrow", "quarantine*.parquet"):
        for path in out.glob(pattern):
            digits = path.stem.partition("-")[2] or "0"
            if digits.isdigit() and int(digits) <= generation - KEPT_GENERATIONS:
                path.unlink(missing_ok=True)


def _write_quarantine(path: Path, rows: Sequence[dict[str, object]], split_columns: Sequence[str]) -> None:
    text = ["path", "label", *split_columns, "group", "reason", "explanation", "detail"]
    seconds = ["start_s", "end_s"]
    schema = pa.schema([*(pa.field(name, pa.string()) for name in text), *(pa.field(name, pa.float64()) for name in seconds)])
    ordered = sorted(rows, key=lambda row: (str(row["path"]), str(row.get("start_s")), str(row.get("end_s"))))
    with committed(path) as file:
        pyarrow.parquet.write_table(pa.Table.from_pylist(ordered, schema=schema), file)
