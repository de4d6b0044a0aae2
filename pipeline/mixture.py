"""Several datasets as one to train on: their rows side by side, their classes by name.

Row numbers of a part are those of its index plus the lengths of the parts before it. Nothing is copied: columns stay mapped, and a
row is looked up where it lies.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import DatasetError
from pipeline.index import Dataset, DatasetInfo, Item

SHOWN = 5  # classes named in a message


class StackedColumn:
    """A numeric column of all parts, without a copy: what it holds is looked up by row."""

    def __init__(self, parts: Sequence[npt.NDArray[np.generic]], begins: npt.NDArray[np.int64]) -> None:
        self._parts, self._begins = parts, begins

    def __getitem__(self, rows: int | npt.NDArray[np.uint32]) -> npt.NDArray[np.generic] | np.generic:
        """The cells of `rows` (n,), or the cell of one row."""
        if isinstance(rows, int):
            number = int(np.searchsorted(self._begins, rows, side="right")) - 1
            cell: np.generic = self._parts[number][rows - int(self._begins[number])]
            return cell
        values = np.empty(len(rows), dtype=self._parts[0].dtype)
        where = np.searchsorted(self._begins, rows, side="right") - 1
        for number, part in enumerate(self._parts):
            mine = where == number
            values[mine] = part[rows[mine] - self._begins[number]]
        return values


class Mixture:
    """What a loader needs of several datasets, opened. Classes are those of the first, and those of the others are found among them.

    Raises DatasetError naming classes of another dataset that the first one does not have.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self._begins = np.cumsum([0, *(len(part) for part in self.parts[:-1])])
        self._labels = [_label_map(self.parts[0], part) for part in self.parts]

    @property
    def root(self) -> Path:
        return self.parts[0].root

    @property
    def info(self) -> DatasetInfo:
        """Of the first."""
        return self.parts[0].info

    def rows(self, part: int, split_column: str, split: str) -> npt.NDArray[np.uint32]:
        """Rows of one part's split, see `Dataset.rows`."""
        return self.parts[part].rows(split_column, split) + np.uint32(self._begins[part])

    def labels(self, part: int) -> npt.NDArray[np.int64]:
        """The labels of all rows of a part, as classes of the first."""
        return np.asarray(self._labels[part][self.parts[part].column("label")])

    def part(self, row: int) -> int:
        """The number of the dataset in which `row` lies."""
        return int(np.searchsorted(self._begins, row, side="right")) - 1

    def column(self, name: str) -> StackedColumn:
        return StackedColumn([part.column(name) for part in self.parts], self._begins)

    def item(self, row: int) -> Item:
        """With its row here and its label among the first's classes. Keys of the others begin with the name of their folder."""
        number = self.part(row)
        part = self.parts[number]
        item = part.item(row - int(self._begins[number]))
        key = item.key if number == 0 else f"{part.root.name}:{item.key}"
        return replace(item, row=row, key=key, label=int(self._labels[number][item.label]))


def _label_map(first: Dataset, other: Dataset) -> npt.NDArray[np.int64]:
    places = {name: place for place, name in enumerate(first.info.classes)}
    strange = [name for name in other.info.classes if name not in places]
    if strange:
        listed = ", ".join(f"'{name}'" for name in strange[:SHOWN])
        raise DatasetError(
            f"{other.root} has {len(strange)} classes that {first.root} does not have, first {listed}. In a mixture all classes must be "
            "classes of data.dir, which decides the model's: give them the same names, or build data.dir with all of them."
        )
    return np.array([places[name] for name in other.info.classes], dtype=np.int64)
