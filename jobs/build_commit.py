"""From finished shards to a dataset: their records become the index, the list of digests, the quarantine list and, last, dataset.json.

data build     index.arrow, likeness.arrow, quarantine.parquet, dataset.json; boxes.arrow where items are keyframes
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
from pipeline import boxes, duplicates
from pipeline.durable import committed, sha256_of
from pipeline.errors import DatasetError
from pipeline.index import BoxesInfo, Dataset, DatasetInfo, ShardInfo, write_index
from pipeline.media import library_versions
from pipeline.quarantine import Reason

SHOWN = 5  # rejects named in a message
KEPT_GENERATIONS = 2  # who opened the dataset a moment ago still finds its index


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a call added: shards with their rows (whose column `shard` counts from `first_shard`), and rows of the quarantine list.

    likenesses: the digests of the rows of `tables`. boxes: of these rows, as rows of `boxes.STORED` each; none where items are videos.
    """

    shards: list[ShardInfo]
    tables: list[pa.Table]
    likenesses: list[pa.Table]
    rejects: list[dict[str, object]]
    boxes: list[pa.ChunkedArray]


def libraries() -> dict[str, str]:
    """Versions that decide which bytes come out."""
    return {**library_versions(), "pyarrow": pa.__version__, "python": platform.python_version()}


def collect(out: Path, work: Path, numbers: Iterable[int], first_shard: int = 0) -> Made:
    """The records of the shards with these numbers, in this order; shards whose videos were all rejected are removed."""
    made = Made(shards=[], tables=[], likenesses=[], rejects=[], boxes=[])
    for number in numbers:
        record = read_record(record_path(work, number))
        made.rejects.extend(record.rejects)
        table = record.rows
        if table.num_rows == 0:
            (out / record.shard.file).unlink(missing_ok=True)
            continue
        place = table.schema.get_field_index("shard")  # becomes an index into the shards that there are
        column = pa.repeat(pa.scalar(first_shard + len(made.shards), pa.int32()), table.num_rows)
        made.tables.append(table.set_column(place, table.schema.field(place), column))
        made.likenesses.append(record.likenesses)
        made.shards.append(record.shard)
        if record.boxes is not None:
            made.boxes.append(record.boxes)
    return made


def missing_rows(missing: Sequence[str]) -> list[dict[str, object]]:
    """Rows of the quarantine list for paths that a label file names and the folder does not have."""
    return [{"path": name, "reason": Reason.MISSING.value, "explanation": Reason.MISSING.text} for name in missing]


def read_quarantine(dataset: Dataset) -> list[dict[str, object]]:
    """The dataset's quarantine list, a dict a row."""
    rows = pyarrow.parquet.read_table(dataset.copied(dataset.info.quarantine_file)).to_pylist()
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
    info = replace(info, boxes=_write_boxes(out / info.boxes_file, made, base))
    sha256, size = write_index(out / info.index_file, tables)
    with committed(out / info.likeness_file) as file:
        duplicates.write_table(file, [*([_likeness(base)] if base else []), *made.likenesses])
    info = replace(info, likeness_sha256=sha256_of(out / info.likeness_file)).with_index(
        sha256=sha256,
        size=size,
        num_items=sum(shard.num_items for shard in info.shards),
        num_frames=_num_frames(tables, keyframes=info.boxes is not None),
    )
    with committed(out / "dataset.json") as file:
        file.write(info.to_json().encode())
    _remove_older(out, generation)
    return info


def _num_frames(tables: Sequence[pa.Table], *, keyframes: bool) -> int:
    """Of all stored videos, each counted once however many keyframes it has; items begin at 0."""
    if keyframes:
        videos = pa.concat_tables([table.select(["shard", "offset", "end"]) for table in tables])
        tables = [videos.group_by(["shard", "offset"]).aggregate([("end", "max")]).rename_columns({"end_max": "end"})]
    return sum(pc.sum(table.column("end")).as_py() for table in tables)


def _write_boxes(path: Path, made: Made, base: Dataset | None) -> BoxesInfo | None:
    """The boxes of all items, those of `base` first; None where items are videos."""
    before = base.boxes() if base else None
    if before is None and not made.boxes:
        return None
    parts = [] if before is None else [before.table]
    row = len(base) if base else 0
    for packed in made.boxes:
        parts.append(boxes.table_of((cell.as_buffer() for cell in packed), row))
        row += len(packed)
    with committed(path) as file:
        whole = boxes.write_table(file, parts)
    num_boxes = len(boxes.BoxTable(whole, 0))
    return BoxesInfo(sha256=sha256_of(path), size=path.stat().st_size, num_boxes=num_boxes, most_classes=boxes.most_classes(whole))


def _likeness(base: Dataset) -> pa.Table:
    """The digests of a dataset's rows; nulls where it was built without them."""
    found = base.likeness()
    if found is not None:
        return found.select([field.name for field in duplicates.COLUMNS])
    return pa.table([pa.nulls(len(base), field.type) for field in duplicates.COLUMNS], schema=pa.schema(duplicates.COLUMNS))


def _remove_older(out: Path, generation: int) -> None:
    for pattern in ("index*.arrow", "likeness*.arrow", "boxes*.arrow", "quarantine*.parquet"):
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
