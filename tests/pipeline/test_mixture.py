"""Mixtures: exact shares in any world size and after any resume, every dataset walked through by itself, classes by name."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DatasetError
from pipeline.index import Dataset
from pipeline.mixture import Mixture
from pipeline.options import AugmentOptions, ClipOptions
from pipeline.requests import MicroBatchRequest, train_requests
from tests.pipeline.numbered import Video, encode, flip_byte, write_dataset
from tests.pipeline.test_loader import digest, load

CLIP, AUGMENT = ClipOptions(num_frames=4, stride=3), AugmentOptions(size=32)
WEIGHTS = [3, 1]
GLOBAL, MICRO = 16, 2


def renamed(dataset: Dataset, classes: list[str]) -> Dataset:
    (dataset.root / "dataset.json").write_text(replace(dataset.info, classes=classes).with_fingerprint().to_json())
    return Dataset.open(dataset.root)


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    """Six videos beside five smaller ones, whose classes are the same in another order and fewer."""
    first = [Video(data=encode(9, first=100 * row), num_frames=9) for row in range(6)]
    other = [Video(data=encode(12, first=1000 + 50 * row, width=112, height=80), num_frames=12, width=112, height=80) for row in range(5)]
    second = renamed(write_dataset(tmp_path / "second", other), ["c", "a", "b"])
    return Mixture([write_dataset(tmp_path / "first", first), second])


def rows_of(mixture: Mixture) -> list[np.ndarray]:
    return [mixture.rows(part, "split", "train") for part in range(len(mixture.parts))]


def requests(mixture: Mixture, **change: object) -> Iterator[MicroBatchRequest]:
    values: dict = {"seed": 5, "global_batch": GLOBAL, "micro_batch": MICRO, "rank": 0, "world_size": 1, "start_step": 0, "end_step": 3}
    return train_requests(mixture, rows_of(mixture), weights=WEIGHTS, clip=CLIP, augment=AUGMENT, **{**values, **change})


def test_rows_items_and_columns_are_those_of_the_parts(mixture: Mixture) -> None:
    first, second = mixture.parts
    assert rows_of(mixture)[1].tolist() == list(range(6, 11))
    for row in range(11):
        part, inner = (0, row) if row < 6 else (1, row - 6)
        item, own = mixture.item(row), mixture.parts[part].item(inner)
        assert (mixture.part(row), item.row) == (part, row)
        assert (item.offset, item.width, item.crc32) == (own.offset, own.width, own.crc32)
        assert mixture.info.classes[item.label] == mixture.parts[part].info.classes[own.label]
        assert item.key == (own.key if part == 0 else f"second:{own.key}")
        assert mixture.column("width")[row] == own.width
    rows = np.array([10, 0, 6, 5], dtype=np.uint32)
    assert mixture.column("width")[rows].tolist() == [112, 96, 112, 96]
    assert mixture.labels(1).tolist() == [mixture.item(row).label for row in range(6, 11)]
    assert len(first) + len(second) == 11


def test_classes_that_the_first_does_not_have_are_refused(mixture: Mixture) -> None:
    with pytest.raises(DatasetError, match=r"second has 1 classes that .*first does not have, first 'jump'"):
        Mixture([mixture.parts[0], renamed(mixture.parts[1], ["a", "jump", "c"])])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), world=st.sampled_from([1, 2, 4, 8]), resumes=st.lists(st.integers(0, 11), max_size=3))
def test_shares_are_exact_in_any_world_size_and_after_any_resume(
    tmp_path_factory: pytest.TempPathFactory, seed: int, world: int, resumes: list[int]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mixture-property"
    names = [(folder / "a", 6), (folder / "b", 5)]
    if not folder.exists():
        blank = Video(data=b"", num_frames=9)
        for root, num in names:
            write_dataset(root, [blank] * num)
    mixture = Mixture([Dataset.open(root) for root, _ in names])
    seen: dict[int, int] = {}
    cuts = [0, *sorted(resumes), 12]
    for begin, end in pairwise(cuts):
        for rank in range(world):
            for request in requests(mixture, seed=seed, rank=rank, world_size=world, start_step=begin, end_step=end):
                for position, row in zip(request.positions.tolist(), request.rows.tolist(), strict=True):
                    assert position not in seen
                    seen[position] = row
    assert sorted(seen) == list(range(12 * GLOBAL))
    stream = [seen[position] for position in range(12 * GLOBAL)]
    for begin in range(len(stream) - 4):
        assert sum(row < 6 for row in stream[begin : begin + 4]) == 3
    for part, num in ((0, 6), (1, 5)):
        own = [row for row in stream if mixture.part(row) == part]
        for epoch in range(len(own) // num):
            assert len(set(own[epoch * num : (epoch + 1) * num])) == num


def test_batches_are_those_of_each_dataset_alone(mixture: Mixture) -> None:
    whole = {(batch.step, batch.micro): batch for batch in load(mixture, requests(mixture), micro_batch=MICRO)}  # type: ignore[arg-type]
    parts: Counter[bool] = Counter()
    for batch in whole.values():
        for key, label in zip(batch.keys, batch.labels.tolist(), strict=True):
            part, name = (1, key.removeprefix("second:")) if key.startswith("second:") else (0, key)
            inner = int(name.removeprefix("video-"))
            assert mixture.info.classes[label] == mixture.parts[part].info.classes[mixture.parts[part].item(inner).label]
            parts[bool(part)] += 1
    assert parts == {False: 36, True: 12}
    resumed = [batch for rank in (1, 0) for batch in
               load(mixture, requests(mixture, rank=rank, world_size=2, start_step=1), micro_batch=MICRO, threads=1)]  # fmt: skip # type: ignore[arg-type]
    assert len(resumed) == 2 * GLOBAL // MICRO
    assert all(digest(batch) == digest(whole[batch.step, batch.micro]) for batch in resumed)


def test_a_substitute_is_of_the_same_dataset(mixture: Mixture) -> None:
    flip_byte(mixture.parts[1], 2)
    flip_byte(mixture.parts[0], 4)
    damaged = [each for batch in load(mixture, requests(mixture), micro_batch=MICRO) for each in batch.damaged]  # type: ignore[arg-type]
    assert {each.key for each in damaged} == {"video-4", "second:video-2"}
    assert all(each.key.startswith("second:") == str(each.substitute_key).startswith("second:") for each in damaged)
