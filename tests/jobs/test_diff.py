"""Two datasets compared: equal where nothing differs, and each kind of difference counted for exactly the items that have it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from jobs import diff
from jobs.cli import posmlp
from pipeline.index import Dataset, DatasetInfo, write_index

Change = Callable[[dict[str, list[object]]], None]


def altered(root: Path, out: Path, change: Change | None = None, **info: object) -> Path:
    """A copy of a dataset whose index columns were changed, written by the product's own index writer."""
    shutil.copytree(root, out)
    dataset = Dataset.open(root)
    table = pa.ipc.open_file(pa.memory_map(str(root / dataset.info.index_file))).read_all()
    columns = table.to_pydict()
    if change:
        change(columns)
    digest, size = write_index(out / dataset.info.index_file, [pa.table(columns, schema=table.schema)])
    changed: DatasetInfo = replace(dataset.info, index_sha256=digest, index_size=size, num_items=len(columns["key"]), **info)  # type: ignore[arg-type]
    (out / "dataset.json").write_text(changed.with_fingerprint().to_json())
    return out


def nums(found: dict[str, object]) -> dict[str, int]:
    items = found["items"]
    assert isinstance(items, dict)
    return {kind: entry["num"] for kind, entry in items.items() if entry["num"]}


def test_a_dataset_equals_itself_in_any_order(motion_dataset: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(Dataset.open(motion_dataset))).tolist()

    def shuffle(columns: dict[str, list[object]]) -> None:
        for name, values in columns.items():
            columns[name] = [values[i] for i in order]

    other = altered(motion_dataset, tmp_path / "b", shuffle)
    assert diff.run(motion_dataset, other)["equal"] is True
    assert CliRunner().invoke(posmlp, ["data", "diff", str(motion_dataset), str(other)]).exit_code == 0


@pytest.mark.parametrize("kind", ["bytes", "frames", "label", "split:split"])
def test_each_kind_of_difference_is_counted(motion_dataset: Path, tmp_path: Path, kind: str) -> None:
    column = {"bytes": "crc32", "frames": "end"}.get(kind, kind)

    def change(columns: dict[str, list[object]]) -> None:
        for row in (2, 5, 7):
            value = int(str(columns[column][row]))
            columns[column][row] = value - 1 if value else 1

    found = diff.run(motion_dataset, altered(motion_dataset, tmp_path / "b", change))
    assert nums(found) == {kind: 3}
    keys = [Dataset.open(motion_dataset).text("key", row) for row in (2, 5, 7)]
    assert found["items"][kind]["keys"] == sorted(keys)  # type: ignore[index]
    assert found["equal"] is False


def test_items_of_one_side(motion_dataset: Path, tmp_path: Path) -> None:
    def fewer(columns: dict[str, list[object]]) -> None:
        for values in columns.values():
            del values[3]

    other = altered(motion_dataset, tmp_path / "b", fewer)
    assert nums(diff.run(motion_dataset, other)) == {"only_a": 1}
    assert nums(diff.run(other, motion_dataset)) == {"only_b": 1}


def test_labels_are_compared_by_name(motion_dataset: Path, tmp_path: Path) -> None:
    info = Dataset.open(motion_dataset).info
    last = len(info.classes) - 1

    def mirrored(columns: dict[str, list[object]]) -> None:
        columns["label"] = [last - int(str(label)) for label in columns["label"]]

    found = diff.run(motion_dataset, altered(motion_dataset, tmp_path / "b", mirrored, classes=info.classes[::-1]))
    assert nums(found) == {}
    assert found["class_order_differs"] is True
    assert found["equal"] is False
    renamed = altered(motion_dataset, tmp_path / "c", classes=["other", *info.classes[1:]])
    assert diff.run(motion_dataset, renamed)["classes"] == {"only_a": [info.classes[0]], "only_b": ["other"]}


def test_options_and_the_exit_code(motion_dataset: Path, tmp_path: Path) -> None:
    info = Dataset.open(motion_dataset).info
    other = altered(motion_dataset, tmp_path / "b", build={**info.build, "encode.gop": 7}, libraries={})
    shown = CliRunner().invoke(posmlp, ["data", "diff", str(motion_dataset), str(other)])
    assert shown.exit_code == 3  # 1 is an error
    assert CliRunner().invoke(posmlp, ["data", "diff", str(motion_dataset), str(tmp_path / "none")]).exit_code == 1
    assert f"option encode.gop: {info.build['encode.gop']} in A, 7 in B" in shown.output
    plain = CliRunner().invoke(posmlp, ["data", "diff", str(motion_dataset), str(other), "--json"])
    assert json.loads(plain.output)["options"] == {"encode.gop": [info.build["encode.gop"], 7]}
    assert diff.run(motion_dataset, altered(motion_dataset, tmp_path / "c", libraries={}))["equal"] is True
