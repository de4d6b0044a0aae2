"""What a run folder holds, and what makes a checkpoint in it belong to a recipe and a dataset.

recipe.yaml      the resolved recipe            env.json       versions and machine
metrics.jsonl    one event a line               attempts/      one file per start of the gang, the newest may write
checkpoints/     step-…/ with manifest last     damage/        samples that were replaced, per rank
logs/            what workers printed           trace/         what every rank consumed (train.trace: true)
eval/            views judged so far            eval.json      predictions and figures, as the recipe asks
report.html      the page about it              eval-….json    the same, judged in another way
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections import Counter
from fractions import Fraction
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.checkpoint import Checkpoint, CheckpointStore
from jobs.errors import RecipeError
from jobs.recipe import Recipe, load_recipe
from pipeline.durable import sha256_of
from pipeline.errors import DatasetError
from pipeline.index import Dataset
from pipeline.keyed import KEYED_VERSION
from pipeline.location import Location
from pipeline.manifest import held_out
from pipeline.mixture import Mixture
from pipeline.order import ORDER_VERSION
from pipeline.requests import check_base_layer, check_keyframes

SHOWN = 5  # classes named in a message
_LIBRARIES = ("posmlp-video", "torch", "nvidia-dali-cuda130", "ray", "deepspeed", "webdataset", "av", "numpy", "pyarrow")


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole: after a crash it holds the old text or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def libraries() -> dict[str, str]:
    """The versions of the libraries that decide what a run computes; "not installed" of those that are not there."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def environment() -> dict[str, object]:
    """`env.json`: library versions, machine and, in a checkout, the commit."""
    return {
        "libraries": libraries(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str | None:
    """The commit this package was run from, where it was run from a checkout and git is there."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - git of the user's own PATH
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def prepare(recipe: Recipe) -> None:
    """Creates the run folder with its resolved recipe and environment."""
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    write_text(recipe.run_dir / "recipe.yaml", recipe.to_yaml())
    write_text(recipe.run_dir / "env.json", json.dumps(environment(), indent=1) + "\n")


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe that a run folder was made with; `run.dir` is where the folder is now. Raises RecipeError."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{run_dir} is not a run folder: it has no recipe.yaml. Train first: posmlp train RECIPE run.dir={run_dir}")
    recipe = load_recipe(str(path))
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": Path(os.path.abspath(run_dir))})})


def checkpoints(recipe: Recipe) -> CheckpointStore:
    """The run's checkpoint store. A key that an older checkpoint does not state had its default: a new key's default changes nothing."""
    keep, every = recipe.checkpoint.keep, recipe.checkpoint.keep_every
    return CheckpointStore(recipe.run_dir / "checkpoints", keep=keep, keep_every=every, absent=Recipe().numerics())


def total_steps(recipe: Recipe, num_samples: int) -> int:
    """Optimizer steps of a run over a train split of `num_samples` items of data.dir."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, math.ceil(recipe.train.epochs * epoch_length(recipe, num_samples) / recipe.samples_per_step))


def epoch_length(recipe: Recipe, num_samples: int) -> int:
    """Positions of the stream in which data.dir's `num_samples` are shown once, those of other datasets between them."""
    share = Fraction(recipe.data.weight, recipe.data.weight + sum(each.weight for each in recipe.data.mix))
    return math.ceil(num_samples / share)


def train_rows(recipe: Recipe, dataset: Dataset) -> npt.NDArray[np.uint32]:
    """(n,) rows of the index that are trained on, ascending."""
    rows = dataset.rows(recipe.data.split_column, recipe.data.train_split)
    return rows[~_held_out(recipe, dataset, rows)] if recipe.data.choose_fraction else rows


def choice_rows(recipe: Recipe, dataset: Dataset) -> npt.NDArray[np.uint32]:
    """(n,) rows of the index that validation while training judges, ascending; none where the recipe names none."""
    if recipe.data.choose_split is not None:
        return dataset.rows(recipe.data.split_column, recipe.data.choose_split)
    rows = dataset.rows(recipe.data.split_column, recipe.data.train_split)
    return rows[_held_out(recipe, dataset, rows)] if recipe.data.choose_fraction else rows[:0]


def _held_out(recipe: Recipe, dataset: Dataset, rows: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """(n,) which of the train split's rows `data.choose_fraction` holds out. Windows of one video stay together."""
    names = dataset.table.select(["group", "source"]).take(pa.array(rows))  # at once: cell by cell they take seconds at 300,000
    units = [group or source for group, source in zip(*(column.to_pylist() for column in names.columns), strict=True)]
    members: dict[str, Counter[str]] = {}
    for label, unit in zip(dataset.column("label")[rows].tolist(), units, strict=True):
        members.setdefault(str(label), Counter())[unit] += 1
    held = held_out(members, recipe.data.choose_fraction, recipe.run.seed, {})
    return np.array([held[unit] for unit in units], dtype=np.bool_)


def identity(recipe: Recipe, dataset: Dataset) -> dict[str, object]:
    """What must be equal for a checkpoint to be resumed: the datasets, the recipe's numerics, versions that change the stream."""
    versions = {"version.order": ORDER_VERSION, "version.keyed": KEYED_VERSION}
    mixed = [Dataset.open(each.dir, recipe.loader.remote).info.fingerprint for each in recipe.data.mix]
    others = {f"dataset of data.mix[{place}]": fingerprint for place, fingerprint in enumerate(mixed)}
    return {"dataset": dataset.info.fingerprint, **others, **versions, **recipe.numerics()}


def newest_checkpoint(recipe: Recipe, dataset: Dataset) -> Checkpoint | None:
    """The newest whole checkpoint of this recipe and dataset; damaged ones are skipped and named on standard error.

    Raises CheckpointError, with both values, where the run folder's checkpoints are of another dataset or recipe.
    """
    return checkpoints(recipe).newest(identity(recipe, dataset), warn=lambda text: click.echo(f"warning: {text}", err=True))


def open_dataset(recipe: Recipe, split: str) -> Dataset:
    """The recipe's dataset, its index checked against its SHA-256 and `split` not empty. Raises DatasetError."""
    dataset = open_checked(recipe, recipe.dataset_dir, recipe.data.split_column, split)
    check_base_layer(dataset, recipe.clip)
    check_keyframes(dataset, recipe.clip, recipe.augment)
    if dataset.info.boxes is not None and dataset.info.boxes.most_classes > 1:
        raise DatasetError(
            f"{dataset.where}: the boxes of a keyframe have up to {dataset.info.boxes.most_classes} classes, and there is no model for "
            "boxes yet. Training and evaluation take datasets in which the boxes of a keyframe have one class."
        )
    return dataset


def open_checked(recipe: Recipe, place: Location, split_column: str, split: str) -> Dataset:
    """One of the recipe's datasets, index and boxes checked against their SHA-256, shards of their sizes, `split` not empty.

    Raises DatasetError.
    """
    dataset = Dataset.open(place, recipe.loader.remote)
    digests = {dataset.root / dataset.info.index_file: dataset.info.index_sha256}
    if (path := dataset.boxes_path()) is not None and dataset.info.boxes is not None:
        digests[path] = dataset.info.boxes.sha256
    for path, expected in digests.items():
        digest = sha256_of(path)
        if digest == expected:
            continue
        advice = f"Run 'posmlp data validate {dataset.where}', then build it again."
        if dataset.origin is not None:  # only this machine's copy
            dataset.origin.cache.drop(path.name)
            advice = "It is removed; run the same command again, which fetches it anew."
        raise DatasetError(f"{path} was altered: its SHA-256 is {digest[:16]}…, dataset.json says {expected[:16]}…. {advice}")
    sizes = dataset.folder.sizes("shards")
    for shard in dataset.info.shards:
        size = sizes.get(shard.file)
        if size != shard.size:
            got = "is missing" if size is None else f"is {size} bytes long, expected {shard.size}"
            raise DatasetError(f"{dataset.where}/{shard.file} {got}. Run 'posmlp data validate {dataset.where}', then build it again.")
    if len(dataset.rows(split_column, split)) == 0:
        raise DatasetError(f"{dataset.where}: split '{split}' of '{split_column}' is empty. Choose another split.")
    return dataset


def worker_dataset(recipe: Recipe, place: Location, fingerprint: object) -> Dataset:
    """One of the recipe's datasets for one rank. Raises DatasetError when it is not as the driver opened it: all see the same items."""
    dataset = Dataset.open(place, recipe.loader.remote)
    if dataset.info.fingerprint != fingerprint:
        raise DatasetError(
            f"{dataset.where} was changed while a command worked with it: its fingerprint is {dataset.info.fingerprint}, was "
            f"{fingerprint}. Take its overlays back ('posmlp data exclude --undo', 'posmlp data relabel --undo') to go on with the same "
            "command."
        )
    return dataset


def check_classes(recipe: Recipe, dataset: Dataset, mixture: Mixture | None = None) -> None:
    """Raises DatasetError where the recipe's splits cannot teach what they ask for: no validation videos, or a class without training ones.

    Before training, which may take days, and not after it. mixture: of `dataset` with the others that are trained on.
    """
    column, train, val = recipe.data.split_column, recipe.data.train_split, recipe.data.val_split
    labels = dataset.column("label")
    parts = {train: train_rows(recipe, dataset), val: dataset.rows(column, val)}
    found = {split: labels[rows].astype(np.int64) for split, rows in parts.items()}
    counts = {split: np.bincount(values, minlength=len(dataset.info.classes)) for split, values in found.items()}
    for place, each in enumerate(recipe.data.mix, 1):
        assert mixture is not None
        taught = mixture.labels(place)[mixture.parts[place].rows(each.split_column, each.train_split)]
        counts[train] = counts[train] + np.bincount(taught, minlength=len(dataset.info.classes))
    if not counts[val].any():
        raise DatasetError(
            f"{dataset.where}: split '{val}' of '{column}' is empty. Set data.val_split; '{train}' evaluates on what was learned."
        )
    if recipe.eval.every and not len(choice_rows(recipe, dataset)):
        raise DatasetError(
            f"{dataset.where}: eval.every has nothing to judge: data.choose_split is empty, or data.choose_fraction finds no class of two "
            f"groups in '{train}'. Choose another split or share, or set eval.every=null."
        )
    lacking = [f"'{name}' ({counts[val][label]} in '{val}')" for label, name in enumerate(dataset.info.classes) if not counts[train][label]]
    if lacking:
        raise DatasetError(
            f"{dataset.where}: {len(lacking)} of {len(dataset.info.classes)} classes have no video in '{train}' of '{column}': "
            f"{', '.join(lacking[:SHOWN])}. Nothing can be learned of them: give '{train}' some of their videos, or leave these classes "
            "out of the labels. 'posmlp data info' shows which videos were quarantined."
        )
