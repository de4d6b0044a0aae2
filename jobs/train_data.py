"""What a recipe trains on: the train split of its dataset, or of several that are mixed by weight."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.recipe import Recipe
from jobs.run_folder import open_checked, train_rows, worker_dataset
from pipeline.index import Dataset
from pipeline.mixture import Mixture
from pipeline.requests import check_base_layer

Rows = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainData:
    """dataset: data.dir's. source: it alone, or the mixture. rows: of `source`, per dataset; weights: theirs."""

    dataset: Dataset
    source: Dataset | Mixture
    rows: list[Rows]
    weights: list[int]

    @property
    def mixture(self) -> Mixture | None:
        return self.source if isinstance(self.source, Mixture) else None

    @property
    def fingerprints(self) -> list[str]:
        mixed = self.source.parts if isinstance(self.source, Mixture) else [self.dataset]
        return [part.info.fingerprint for part in mixed]


def open_checked_data(recipe: Recipe) -> TrainData:
    """For the driver: every dataset with its index and shards checked, see `open_checked`. Raises DatasetError."""
    data = recipe.data
    first = open_checked(recipe.dataset_dir, data.split_column, data.train_split)
    check_base_layer(first, recipe.clip)
    return _of(recipe, first, [open_checked(each.dir, each.split_column, each.train_split) for each in data.mix])


def open_worker_data(recipe: Recipe, fingerprints: object) -> TrainData:
    """For a rank: the datasets as the driver opened them. Raises DatasetError where one of them is another by now."""
    assert isinstance(fingerprints, list)
    roots = [recipe.dataset_dir, *(each.dir for each in recipe.data.mix)]
    first, *others = [worker_dataset(root, fingerprint) for root, fingerprint in zip(roots, fingerprints, strict=True)]
    return _of(recipe, first, others)


def open_data(recipe: Recipe, first: Dataset) -> TrainData:
    """For whoever looks: `first` is data.dir's, opened. Raises DatasetError."""
    return _of(recipe, first, [Dataset.open(each.dir) for each in recipe.data.mix])


def _of(recipe: Recipe, first: Dataset, others: list[Dataset]) -> TrainData:
    data = recipe.data
    if not others:
        return TrainData(dataset=first, source=first, rows=[train_rows(recipe, first)], weights=[1])
    mixture = Mixture([first, *others])
    mixed = [mixture.rows(place, each.split_column, each.train_split) for place, each in enumerate(data.mix, 1)]
    rows = [train_rows(recipe, first), *mixed]
    return TrainData(dataset=first, source=mixture, rows=rows, weights=[data.weight, *(each.weight for each in data.mix)])
