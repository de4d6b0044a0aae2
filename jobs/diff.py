"""posmlp data diff: what two datasets have in common, and what not.

Items are matched by key in Arrow's hash join over the mapped columns, so that 10^7 rows are never rows of Python. In which shard an
item lies, and who built it, is no difference: a reader sees the same. Overlays are applied: items that are left out are not there.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipeline import boxes
from pipeline.index import SPLIT_PREFIX, Dataset
from pipeline.location import Location

EXAMPLES = 20  # keys that are named of each kind of difference
BYTES = ("size", "crc32")
FRAMES = ("begin", "end", "fps", "width", "height", "codec")
NONE = "(none)"  # an item in no split of a column


def run(left: Location, right: Location) -> dict[str, object]:
    """The differences as plain values, JSON-able; `equal` says whether there is none. Raises DatasetError when one cannot be opened."""
    a, b = Dataset.open(left), Dataset.open(right)
    shared = [column for column in a.info.splits if column in b.info.splits]
    items = _items(_comparable(a, shared), _comparable(b, shared))
    found: dict[str, object] = {
        "a": str(left),
        "b": str(right),
        "fingerprints": [a.info.fingerprint, b.info.fingerprint],
        "num_items": [a.num_kept, b.num_kept],
        "overlays": [[str(each) for each in dataset.overlay.files] for dataset in (a, b)],
        "quarantined": [a.info.num_quarantined, b.info.num_quarantined],
        "classes": _names(a.info.classes, b.info.classes),
        "split_columns": _names(list(a.info.splits), list(b.info.splits)),
        "options": _values(a.info.build, b.info.build),
        "items": items,
        "libraries": _values(dict(a.info.libraries), dict(b.info.libraries)),
    }
    # Versions of libraries explain differences, they are none.
    names_equal = all(not names["only_a"] and not names["only_b"] for names in (_only(found["classes"]), _only(found["split_columns"])))
    order_equal = a.info.classes == b.info.classes
    found["equal"] = names_equal and order_equal and not found["options"] and all(not entry["num"] for entry in items.values())
    found["class_order_differs"] = not order_equal
    return found


def _only(names: object) -> dict[str, list[str]]:
    assert isinstance(names, dict)
    return names


def _names(a: Sequence[str], b: Sequence[str]) -> dict[str, list[str]]:
    return {"only_a": sorted(set(a) - set(b)), "only_b": sorted(set(b) - set(a))}


def _values(a: dict[str, object], b: dict[str, object]) -> dict[str, list[object]]:
    """Keys whose values differ, with both."""
    return {name: [a.get(name), b.get(name)] for name in sorted({*a, *b}) if a.get(name) != b.get(name)}


def _comparable(dataset: Dataset, split_columns: Sequence[str]) -> pa.Table:
    """key and what of an item is compared, classes and splits by name (as dictionaries: codes beside one short list of names)."""
    table, found = dataset.table, dataset.boxes()
    words = np.zeros(len(dataset), np.uint64) if found is None else boxes.digests(found.table, dataset.info.classes)
    frames = np.zeros(len(dataset), np.int32) if found is None else dataset.column("keyframe")
    if len(dataset.overlay.excluded):
        table = table.filter(pa.array(dataset.kept()))
    columns = {name: table.column(name) for name in ("key", *BYTES, *FRAMES)}
    columns["label"] = _named(pa.chunked_array([dataset.column("label")[dataset.kept()]]), dataset.info.classes)
    columns |= {"boxes": pa.chunked_array([words[dataset.kept()]]), "keyframe": pa.chunked_array([frames[dataset.kept()]])}
    for name in split_columns:
        codes = table.column(SPLIT_PREFIX + name).cast(pa.int32())
        columns[SPLIT_PREFIX + name] = _named(pc.add(codes, pa.scalar(1, pa.int32())), [NONE, *dataset.info.splits[name]])
    return pa.table(columns)


def _named(codes: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    return pc.take(pa.array(names, pa.large_string()), codes)


def _items(a: pa.Table, b: pa.Table) -> dict[str, dict[str, object]]:
    """Kind of difference -> {num, keys}: the first EXAMPLES keys in their order."""
    found = {
        "only_a": _listed(a.select(["key"]).join(b.select(["key"]), "key", join_type="left anti")),
        "only_b": _listed(b.select(["key"]).join(a.select(["key"]), "key", join_type="left anti")),
    }
    kinds = {"bytes": BYTES, "frames": FRAMES, "label": ("label",), "boxes": ("boxes", "keyframe")}
    kinds |= {name: (name,) for name in a.column_names if name.startswith(SPLIT_PREFIX)}
    for kind, columns in kinds.items():  # one kind at a time, so that a join holds few columns
        both = a.select(["key", *columns]).join(b.select(["key", *columns]), "key", join_type="inner", right_suffix="/b")
        differ = [pc.not_equal(both.column(name), both.column(f"{name}/b")) for name in columns]
        mask = differ[0]
        for more in differ[1:]:
            mask = pc.or_(mask, more)
        found[kind] = _listed(both.filter(mask), columns if len(columns) == 1 else ())
    return found


def _listed(table: pa.Table, shown: Sequence[str] = ()) -> dict[str, object]:
    first = table.take(pc.select_k_unstable(table, EXAMPLES, sort_keys=[("key", "ascending")]))
    keys = first.column("key").to_pylist()
    listed: dict[str, object] = {"num": table.num_rows, "keys": keys}
    if shown:
        listed["values"] = [
            list(pair) for pair in zip(*(first.column(f"{shown[0]}{side}").to_pylist() for side in ("", "/b")), strict=True)
        ]
    return listed


TITLES = {"only_a": "items only in A", "only_b": "items only in B", "bytes": "items with other bytes", "frames": "items with other frames",
          "label": "items with another label", "boxes": "keyframes with other boxes"}  # fmt: skip


def show(found: dict[str, object]) -> None:
    """Prints the differences for people."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    counts, names = found["num_items"], (found["a"], found["b"])
    assert isinstance(counts, list)
    for side, name, count in zip("AB", names, counts, strict=True):
        console.print(f"{side}: {name}, {count} items")
    overlays = found["overlays"]
    assert isinstance(overlays, list)
    for side, files in zip("AB", overlays, strict=True):
        for each in files:
            console.print(f"{side} has {each}")
    for title, key in (("classes", "classes"), ("split columns", "split_columns")):
        for side, listed in _only(found[key]).items():
            if listed:
                console.print(f"{title} only in {side[-1].upper()}: {', '.join(listed)}")
    only = _only(found["classes"])
    if found["class_order_differs"] and not only["only_a"] and not only["only_b"]:
        console.print("the same classes in another order: labels are other numbers")
    for title in ("options", "libraries"):
        values = found[title]
        assert isinstance(values, dict)
        for name, (a, b) in values.items():
            console.print(f"{title[:-1] if title == 'options' else 'library'} {name}: {a} in A, {b} in B")
    items = found["items"]
    assert isinstance(items, dict)
    for kind, entry in items.items():
        _show_items(console, kind, entry)
    console.print("equal" if found["equal"] else "different")


def _show_items(console: Console, kind: str, entry: dict[str, object]) -> None:
    num, keys, values = entry["num"], entry["keys"], entry.get("values")
    assert isinstance(num, int)
    assert isinstance(keys, list)
    if not num:
        return
    title = TITLES.get(kind) or f"items in another split ({kind.removeprefix(SPLIT_PREFIX)})"
    console.print(f"{title}: {num}")
    for number, key in enumerate(keys):
        change = f": {values[number][0]} in A, {values[number][1]} in B" if isinstance(values, list) else ""
        console.print(f"  {key}{change}")
    if num > len(keys):
        console.print(f"  and {num - len(keys)} more")
