"""posmlp data info: what a dataset holds, as a card."""

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs import leaks
from pipeline.index import SPLIT_PREFIX, Dataset
from pipeline.location import Location


def run(root: Location) -> dict[str, object]:
    """The card: plain values, JSON-able. Raises DatasetError when there is no finished dataset."""
    dataset = Dataset.open(root)
    info = dataset.info
    kept = dataset.kept() if len(dataset.overlay.excluded) else slice(None)  # a mask would copy what is mapped
    videos = kept if info.boxes is None else dataset.videos()
    frames = dataset.column("end")[videos].astype(np.int64) - dataset.column("begin")[videos].astype(np.int64)
    sizes = dataset.column("size")[videos].astype(np.int64)
    pixels = Counter(zip(dataset.column("width")[videos].tolist(), dataset.column("height")[videos].tolist(), strict=True))
    labels = np.bincount(dataset.column("label")[kept].astype(np.int64), minlength=len(info.classes))
    splits = {}
    for column, names in info.splits.items():
        codes = dataset.column(SPLIT_PREFIX + column)[kept]
        splits[column] = {name: int((codes == code).sum()) for code, name in enumerate(names)}
    return {
        "folder": str(root),
        "fingerprint": info.fingerprint,
        "items": dataset.num_kept,
        **({} if info.boxes is None else {"keyframes": dataset.num_kept, "boxes": info.boxes.num_boxes, "videos": len(frames)}),
        "left_out": len(dataset.overlay.excluded),
        "relabelled": len(dataset.overlay.relabelled),
        "overlays": [str(each) for each in dataset.overlay.files],
        "quarantined": _quarantine(dataset.copied(info.quarantine_file)),
        "quarantine_list": f"{root}/{info.quarantine_file}",
        "duplicates": _duplicates(dataset),
        "classes": dict(zip(info.classes, labels.tolist(), strict=True)),
        "splits": splits,
        "shards": len(info.shards),
        "bytes": sum(shard.size for shard in info.shards),
        "hours": round(float((frames / dataset.column("fps")[videos].astype(np.float64)).sum()) / 3600, 3) if len(frames) else 0.0,
        "frames": _spread(frames),
        "video_bytes": _spread(sizes),
        "sizes": {f"{width}x{height}": count for (width, height), count in pixels.most_common(8)},
        "fps": {f"{rate:g}": count for rate, count in Counter(dataset.column("fps")[videos].tolist()).most_common(8)},
        "build": info.build,
        "libraries": info.libraries,
    }


def _spread(values: npt.NDArray[np.int64]) -> dict[str, int]:
    if not len(values):
        return {}
    points = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
    return {name: int(np.percentile(values, share)) for name, share in points.items()}


def _duplicates(dataset: Dataset) -> str:
    found = leaks.find(dataset)
    return leaks.summary(found) if found.known else "not looked for: it was built by an older version"


def _quarantine(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    return dict(Counter(pyarrow.parquet.read_table(path, columns=["reason"]).column("reason").to_pylist()).most_common())


def show(card: dict[str, object]) -> None:
    """Prints the card for people."""
    table = Table(show_header=False)
    card = {name: value for name, value in card.items() if value or name not in ("left_out", "relabelled", "overlays")}
    for name, value in card.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {entry}" for key, entry in list(value.items())[:12]) + (" …" if len(value) > 12 else "")
            table.add_row(name, shown or "none")
        else:
            table.add_row(name, escape("\n".join(value) if isinstance(value, list) else str(value)))
    Console().print(table)
