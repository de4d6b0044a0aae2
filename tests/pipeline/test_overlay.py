"""Overlays: whatever was excluded and relabelled in whatever order, a dataset opens as a plain model says, and nothing else does."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import overlay
from pipeline.errors import DatasetError
from pipeline.index import SPLIT_PREFIX, Dataset
from pipeline.overlay import Kind
from tests.pipeline.test_index import make

NUM, CLASSES = 9, 2
COMMANDS = st.lists(
    st.one_of(
        st.tuples(st.just(Kind.EXCLUDE), st.dictionaries(st.integers(0, NUM - 1), st.just(0), min_size=1)),
        st.tuples(st.just(Kind.RELABEL), st.dictionaries(st.integers(0, NUM - 1), st.integers(0, CLASSES - 1), min_size=1)),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("overlay"), [4, 5])


def write(dataset: Dataset, number: int, kind: Kind, labels: dict[int, int], reason: str = "") -> Path:
    rows = np.array(sorted(labels), dtype=np.uint32)
    values = np.array([labels[row] for row in rows.tolist()], dtype=np.int32) if kind == Kind.RELABEL else None
    keys = dataset.table.column("key").take(rows).combine_chunks()
    return overlay.write_file(dataset.root, kind, number, rows, keys, values, reason)


def apply(dataset: Dataset, commands: Sequence[tuple[Kind, dict[int, int]]]) -> Dataset:
    shutil.rmtree(dataset.root / overlay.FOLDER, ignore_errors=True)
    for number, (kind, labels) in enumerate(commands, 1):
        write(dataset, number, kind, labels)
    return Dataset.open(dataset.root)


@settings(max_examples=60, deadline=None)
@given(commands=COMMANDS)
def test_opens_as_a_plain_model_says(built: Dataset, commands: list[tuple[Kind, dict[int, int]]]) -> None:
    labels = dict(enumerate(built.table.column("label").to_pylist()))
    out: set[int] = set()
    for kind, named in commands:
        out |= named.keys() if kind == Kind.EXCLUDE else set()
        labels |= named if kind == Kind.RELABEL else {}
    opened = apply(built, commands)
    kept = [row for row in range(NUM) if row not in out]
    assert opened.num_kept == len(kept)
    assert np.flatnonzero(opened.kept()).tolist() == kept
    assert [opened.column("label")[row] for row in kept] == [labels[row] for row in kept]
    assert [opened.item(row).label for row in kept] == [labels[row] for row in kept]
    codes = built.column(SPLIT_PREFIX + "split")
    for code, name in enumerate(built.info.splits["split"]):
        assert opened.rows("split", name).tolist() == [row for row in kept if codes[row] == code]
    # The fingerprint is of the meaning: equal for the same items in one command, and the built one where nothing is changed.
    changed = {row: label for row, label in labels.items() if row in kept and label != built.column("label")[row]}
    short = [(Kind.EXCLUDE, dict.fromkeys(out, 0))] * bool(out) + [(Kind.RELABEL, changed)] * bool(changed)
    assert apply(built, short).info.fingerprint == opened.info.fingerprint
    assert (opened.info.fingerprint == built.info.fingerprint) == (not short)
    assert opened.info.fingerprint.startswith(built.info.fingerprint)


def test_different_overlays_have_different_fingerprints(built: Dataset) -> None:
    commands: list[list[tuple[Kind, dict[int, int]]]] = [[(Kind.EXCLUDE, {row: 0})] for row in range(NUM)]
    commands += [[(Kind.RELABEL, {row: 1 - int(built.column("label")[row])})] for row in range(NUM)]
    prints = {apply(built, each).info.fingerprint for each in commands}
    assert len(prints) == 2 * NUM


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    dataset = make(tmp_path, [4, 5])
    path = write(dataset, 1, Kind.EXCLUDE, {3: 0, 8: 0}, "blurred")
    [read] = overlay.read_files(tmp_path)
    assert (read.reason, read.rows.tolist(), read.keys.to_pylist()) == ("blurred", [3, 8], ["k0/3", "k1/4"])
    data = path.read_bytes()
    for place in range(0, len(data), 97):  # any flipped byte
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DatasetError, match="was altered"):
            Dataset.open(tmp_path)
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"names row 8, the index has 8"):
        make(tmp_path, [3, 5])  # another index
    with pytest.raises(DatasetError, match=r"keys lie in other rows. Remove it"):
        make(tmp_path, [5, 5])
    assert Dataset.open(tmp_path, overlays=False).num_kept == 10
    path.unlink()
    write(make(tmp_path, [4, 5]), 1, Kind.RELABEL, {0: 7})
    with pytest.raises(DatasetError, match="labels go to 7, the dataset has 2 classes"):
        Dataset.open(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path, [4])
    (tmp_path / overlay.FOLDER).mkdir()
    for data, text in ((b"", "no overlay"), (b"ARROW1\0\0" * 5, "no overlay")):
        name = f"000001-exclude-{hashlib.sha256(data).hexdigest()[:16]}.arrow"
        (tmp_path / overlay.FOLDER / name).write_bytes(data)
        with pytest.raises(DatasetError, match=text):
            Dataset.open(tmp_path)
        (tmp_path / overlay.FOLDER / name).unlink()
    (tmp_path / overlay.FOLDER / ".000001-exclude-x.arrow.77-aa.tmp").write_bytes(b"half")  # of a killed command
    assert Dataset.open(tmp_path).num_kept == 4
