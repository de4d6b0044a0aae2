"""posmlp bench scale: what an index and an order of 10^3 to 10^7 items cost one rank, in time and memory.

Each size runs in a process of its own, so that its memory is its own. The index is synthetic, its columns are the real ones.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import boxes, overlay
from pipeline.index import Dataset, DatasetInfo, ShardInfo, index_schema
from pipeline.order import Order
from pipeline.overlay import Kind

SIZES = (1_000, 100_000, 10_000_000)
BATCH = 1024  # positions of one global batch
REPEATS = 20
OVERLAID = 10_000  # items that an overlay leaves out


def run(sizes: Sequence[int] = SIZES) -> list[dict[str, float]]:
    """One row of figures per size; see `measure` for their meaning."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_synthetic(Path(folder), size)
            write_boxes(Path(folder), size)
            done = subprocess.run(
                [sys.executable, "-m", "jobs.bench_scale", folder], capture_output=True, text=True, check=True, env=dict(os.environ)
            )
            rows.append(json.loads(done.stdout))
    return rows


def table(rows: Sequence[dict[str, float]]) -> str:
    """The figures as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(f"{row[name]:g}" for name in names) + " |" for row in rows)])


def write_synthetic(root: Path, num_items: int) -> None:
    """A dataset folder with an index of `num_items` rows and no shards."""
    numbers = pa.array(np.arange(num_items, dtype=np.int64))
    keys = pc.binary_join_element_wise("class/video", pc.cast(numbers, pa.string()), "_")
    columns: dict[str, pa.Array] = {}
    for field in index_schema(["split"]):
        if field.name in ("key", "source"):
            columns[field.name] = keys
        elif field.name == "codec":
            columns[field.name] = pa.array(["h264"] * num_items, pa.string())
        elif field.name == "group":
            columns[field.name] = pa.array([""] * num_items, pa.string())
        elif field.name == "split:split":
            columns[field.name] = pa.array((np.arange(num_items) % 10 == 0).astype(np.int8))
        else:
            columns[field.name] = pa.array(np.full(num_items, 240)).cast(field.type)
    columns["shard"] = pa.array(np.zeros(num_items, dtype=np.int32))
    batch = pa.record_batch(list(columns.values()), schema=index_schema(["split"]))
    with pa.OSFile(str(root / "index.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    info = DatasetInfo(
        classes=["a"],
        splits={"split": ["train", "val"]},
        num_items=num_items,
        num_quarantined=0,
        num_frames=240 * num_items,
        index_sha256="",
        index_size=(root / "index.arrow").stat().st_size,
        shards=[ShardInfo(file="shards/none.tar", size=0, sha256="", num_items=num_items)],
    )
    (root / "dataset.json").write_text(info.to_json(), encoding="utf-8")


def measure(root: Path) -> dict[str, float]:
    """Figures of one rank: opening, choosing the train split, a batch of the order and its rows; memory that is not shared."""
    process = psutil.Process()
    before = process.memory_full_info().uss
    began = time.perf_counter()
    dataset = Dataset.open(root)
    opened = time.perf_counter()
    rows = dataset.rows("split", "train")
    chosen = time.perf_counter()
    order = Order(0, len(rows))
    times = []
    for repeat in range(REPEATS):
        start = time.perf_counter()
        positions = np.arange(repeat * 10**9, repeat * 10**9 + BATCH, dtype=np.int64)
        rows[order.locate(positions)[1]]
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for row in rows[:BATCH]:
        dataset.item(int(row))
    looked = time.perf_counter()
    memory = process.memory_full_info().uss
    out = np.linspace(0, len(dataset) - 1, min(len(dataset), OVERLAID)).astype(np.uint32)
    overlay.write_file(dataset.folder, Kind.EXCLUDE, 1, out, dataset.table.column("key").take(pa.array(out)).combine_chunks(), None, "")
    overlaid = time.perf_counter()
    kept = Dataset.open(root)
    reopened = time.perf_counter()
    kept.rows("split", "train")
    return {
        "items": len(dataset),
        "index MB": round((root / "index.arrow").stat().st_size / 1e6, 2),
        "open ms": round(1e3 * (opened - began), 2),
        "choose split ms": round(1e3 * (chosen - opened), 2),
        f"order of {BATCH} ms": round(1e3 * float(np.median(times)), 3),
        f"rows of {BATCH} ms": round(1e3 * (looked - start), 1),
        "private MB": round((memory - before) / 1e6, 1),
        f"open, {OVERLAID} left out, ms": round(1e3 * (reopened - overlaid), 2),
        "choose split of it ms": round(1e3 * (time.perf_counter() - reopened), 2),
        **measure_boxes(root, len(dataset), np.asarray(rows[:BATCH])),
    }


def write_boxes(root: Path, num_items: int) -> None:
    """A boxes.arrow with one box an item."""
    whole = {"row": np.arange(num_items, dtype=np.uint32), "x2": np.ones(num_items, np.float32), "y2": np.ones(num_items, np.float32)}
    zeros = {field.name: np.zeros(num_items, field.type.to_pandas_dtype()) for field in boxes.SCHEMA}
    with (root / "boxes.arrow").open("wb") as file:
        boxes.write_table(file, [pa.table(zeros | whole, schema=boxes.SCHEMA)])


def measure_boxes(root: Path, num_items: int, rows: npt.NDArray[np.uint32]) -> dict[str, float]:
    """The same of boxes.arrow: opening, and looking up the boxes of `rows`. Memory is without the file's pages, which ranks share."""
    before = _anonymous_kib()
    began = time.perf_counter()
    table = boxes.open_table(root / "boxes.arrow", num_items, 1)
    opened = time.perf_counter()
    for row in rows.tolist():
        table.of(row)
    looked = time.perf_counter()
    return {
        "boxes MB": round((root / "boxes.arrow").stat().st_size / 1e6, 2),
        "open boxes ms": round(1e3 * (opened - began), 2),
        f"boxes of {BATCH} ms": round(1e3 * BATCH / len(rows) * (looked - opened), 1),
        "private MB of boxes": round((_anonymous_kib() - before) * 1024 / 1e6, 2),
    }


def _anonymous_kib() -> int:
    """Memory of this process that no file stands behind."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(text.partition("Anonymous:")[2].split()[0])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
