"""A recipe: one typed YAML file that says everything about a dataset and a run. Pure: reads no video, imports no framework.

Reading goes file -> plain YAML -> dotted overrides (`train.epochs=3`) -> typed sections. Unknown keys are refused with the
nearest known one; errors name the key and, for keys from the file, the line. The resolved recipe is what a run saves.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic
import yaml

from cluster.options import CheckpointOptions, EngineOptions, LaunchOptions, OptimizerOptions
from jobs.deadline import seconds
from jobs.errors import RecipeError
from model.presets import ModelConfig
from pipeline.location import Location, location
from pipeline.options import AugmentOptions, ClipOptions, EncodeOptions, LimitOptions, LoaderOptions
from pipeline.order import MAX_TURNS

MAX_RECIPE_BYTES = 1 << 20


def _location(value: object) -> object:
    return location(value) if isinstance(value, str) else value


def _local(value: object) -> object:
    """A path, or several. Raises ValueError for a URL, which would become a folder of an odd name."""
    if isinstance(value, dict):
        return {name: _local(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_local(each) for each in value]
    place = _location(value)
    if isinstance(place, str):
        raise ValueError("got a URL, expected a path of this machine; data.videos, data.dir and those in data.mix alone may be URLs")
    return place


Count = Annotated[int, pydantic.Field(ge=1)]
Place = Annotated[Path | str, pydantic.BeforeValidator(_location)]
LocalPath = Annotated[Path, pydantic.BeforeValidator(_local)]
Format = Literal[  # those of pipeline.label_file
    "auto", "csv", "tsv", "jsonl", "parquet", "kinetics", "kinetics_whole", "something", "list", "ava", "ava_cut", "boxes", "folders",
    "frames", "images", "tars",
]  # fmt: skip
_INTERVAL = re.compile(r"(\d+(?:\.\d+)?) ?(step|epoch)s?")


class Section(pydantic.BaseModel):
    """A group of keys; frozen, so that a run cannot drift from the recipe it saved."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class RunSection(Section):
    """dir: the run folder, created if missing. seed: of order, augmentation and initial weights."""

    dir: LocalPath | None = None
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0


class MixedDataset(Section):
    """One more dataset to train on beside data.dir. Its classes are found among those of data.dir by name.

    dir: the built dataset, a folder or a URL. weight: its share of the samples, beside data.weight and the other datasets' weights.
    split_column, train_split: the split of it that is trained on.
    """

    dir: Place
    weight: Count = 1
    split_column: str = "split"
    train_split: str = "train"


class DataSection(Section):
    """Raw videos, the dataset built from them, and which of its splits are trained on and reported.

    videos: folder of raw videos, here or at a URL (s3://bucket/folder).
    labels: a label file, a list of them, or one per split: {train: FILE, val: FILE}; None: class = subfolder.
    format: of the label files, or of the folders where there are none; auto tells it from their content.
    dir: the built dataset, a folder or a URL; None: the folder `dataset` in the run folder.
    split_column: of the label file, where it has several. train_split, val_split: names in that column: trained on, and reported.
    choose_split: a name in that column that is neither trained on nor reported: what `eval.every` judges.
    choose_fraction: instead, share of each class of the train split that is held out for it, by whole groups and drawn by run.seed, and
    not trained on.
    allow_missing: build although the label file names videos that are not there; they are listed in the quarantine.
    val_fraction: share held out per class when the labels name no split. seed: of the deal of videos to shards.
    shard_size_mib: wanted size of a tar; small datasets get smaller ones, so that they are built in parallel.
    mix: further datasets that are trained on, a list of {dir, weight, split_column, train_split}; evaluation stays on data.dir.
    weight: share of data.dir in such a mixture. Weights are whole numbers: 3 and 1 are 3 samples of every 4, exactly. train.epochs counts
    passes over data.dir.
    """

    videos: Place | None = None
    labels: Annotated[Path | tuple[Path, ...] | dict[str, Path] | None, pydantic.BeforeValidator(_local)] = None
    format: Format = "auto"
    dir: Place | None = None
    split_column: str = "split"
    train_split: str = "train"
    val_split: str = "val"
    choose_split: str | None = None
    choose_fraction: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    allow_missing: bool = False
    val_fraction: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    shard_size_mib: Count = 128
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0
    mix: tuple[MixedDataset, ...] = ()
    weight: Count = 1
    encode: EncodeOptions = EncodeOptions()
    limits: LimitOptions = LimitOptions()

    @property
    def label_files(self) -> dict[str, Path]:
        """Key, as `data.labels` or `data.labels.train`, to label file; empty without labels."""
        if isinstance(self.labels, Mapping):
            return {f"data.labels.{split}": path for split, path in self.labels.items()}
        if isinstance(self.labels, tuple):
            return {f"data.labels[{place}]": path for place, path in enumerate(self.labels)}
        return {} if self.labels is None else {"data.labels": self.labels}


def _auto(value: object) -> object:
    return 0 if value == "auto" else value


class TrainSection(Section):
    """How much is trained. A global batch is a whole number of micro-batches, which are never split (see ARCHITECTURE.md).

    global_batch: clips. micro_batch: clips; auto (0) is the most that fit the memory, measured once before the first step and kept for
    the whole run. epochs: passes over the train split; steps: optimizer steps, instead of epochs.
    trace: every rank records keys, frames, crops and tensor digests of what it consumed under `trace/`.
    time_limit: how long a call may take, as 3h30m or in seconds: it saves in time, ends with exit code 75, and the same command goes on.
    init_from: weights to begin with: a run folder, a checkpoint's folder, or a file (.safetensors, .pth).
    profile: [first, last] steps, counted from 1, of which every rank writes a profiler trace under `profile/`; null: none.
    freeze: beginnings of parameter names that are not trained, for example [patch_embed1, blocks1].
    """

    global_batch: Count = 32
    micro_batch: Annotated[int, pydantic.Field(ge=0), pydantic.BeforeValidator(_auto)] = 8
    epochs: Annotated[float, pydantic.Field(gt=0)] = 60.0
    steps: Count | None = None
    trace: bool = False
    time_limit: Annotated[float, pydantic.BeforeValidator(seconds)] | None = None
    init_from: LocalPath | None = None
    freeze: tuple[str, ...] = ()
    profile: tuple[Count, Count] | None = None

    @pydantic.model_validator(mode="after")
    def _divides(self) -> Self:
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: got {list(self.profile)}, expected the first step before the last")
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch: got {self.global_batch}, expected a multiple of train.micro_batch ({self.micro_batch}), "
                f"for example {max(1, round(self.global_batch / self.micro_batch)) * self.micro_batch}"
            )
        return self


def _interval(text: str) -> str:
    """ "2 epochs" or "500 steps", as it is. Raises ValueError for anything else."""
    found = _INTERVAL.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0 or (found[2] == "step" and not float(found[1]).is_integer()):
        raise ValueError("expected a number of epochs or of whole steps, for example '1 epoch' or '500 steps'")
    return text.strip()


class EvalSection(Section):
    """How a split is judged: every video is seen in clips x crops (x 2 with `flip`) views, which are fused to one prediction.

    every: validation while training, as "2 epochs" or "500 steps": the middle view of each sample of data.choose_split or
    data.choose_fraction is judged, the state saved, and the best checkpoint kept; null: never.
    micro_batch: views in one forward pass. clips: spread evenly over the video; in segment sampling all cover it, shifted within the
    segments; uniform sampling has one only. crops: 1 is the centre, 3 lie along the longer side.
    flip: each view also mirrored; refused where augment.flip is 0, since left and right may be classes there.
    fusion: "sum_logits" adds the views' logits, "mean_softmax" averages their probabilities.
    """

    micro_batch: Count = 8
    clips: Annotated[int, pydantic.Field(ge=1, le=100)] = 1
    crops: Literal[1, 3] = 1
    flip: bool = False
    fusion: Literal["sum_logits", "mean_softmax"] = "sum_logits"
    every: Annotated[str, pydantic.AfterValidator(_interval)] | None = None

    @property
    def num_views(self) -> int:
        return self.clips * self.crops * (2 if self.flip else 1)

    def protocol(self) -> dict[str, object]:
        """What decides the figures of an evaluation."""
        return self.model_dump(mode="json", exclude={"every"})

    def every_steps(self, steps_per_epoch: float) -> int | None:
        """Optimizer steps from one validation to the next; None without validation."""
        found = _INTERVAL.fullmatch(self.every) if self.every else None
        return found and max(1, round(float(found[1]) * (1 if found[2] == "step" else steps_per_epoch)))


class TrackSection(Section):
    """Where a run's figures go besides metrics.jsonl. What fails there is told once and stops nothing.

    tensorboard: event files in the run folder's `tensorboard/`. mlflow: address of a tracking server, http://HOST:PORT; needs the package
    mlflow. wandb: a project of Weights & Biases; needs the package wandb. experiment: MLflow's name for a group of runs.
    """

    tensorboard: bool = False
    mlflow: str | None = None
    wandb: str | None = None
    experiment: str = "posmlp-video"


class Recipe(Section):
    """Every key of a recipe, by section."""

    version: Literal[1] = 1
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    clip: ClipOptions = ClipOptions()
    augment: AugmentOptions = AugmentOptions()
    loader: LoaderOptions = LoaderOptions()
    model: ModelConfig = ModelConfig()
    train: TrainSection = TrainSection()
    optimizer: OptimizerOptions = OptimizerOptions()
    engine: EngineOptions = EngineOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    launch: LaunchOptions = LaunchOptions()
    eval: EvalSection = EvalSection()
    track: TrackSection = TrackSection()

    @pydantic.model_validator(mode="after")
    def _views_exist(self) -> Self:
        if self.eval.flip and self.augment.flip == 0:
            raise ValueError("eval.flip: got true, expected false where augment.flip is 0: training never showed a mirrored video")
        if self.eval.clips > 1 and self.clip.sampling == "uniform":
            raise ValueError(f"eval.clips: got {self.eval.clips}, expected 1 where clip.sampling is uniform, which has one clip only")
        if self.clip.starts == "base" and self.data.videos is not None and self.data.encode.form != "layered":
            raise ValueError(f"clip.starts: got 'base', expected 'any' where data.encode.form is {self.data.encode.form}")
        return self

    @pydantic.model_validator(mode="after")
    def _mirror_is_a_place(self) -> Self:
        if self.checkpoint.mirror is not None:
            try:
                location(self.checkpoint.mirror)
            except ValueError as error:
                raise ValueError(f"checkpoint.mirror: {error}") from None
        return self

    @pydantic.model_validator(mode="after")
    def _choice_is_a_part_of_its_own(self) -> Self:
        split, share = self.data.choose_split, self.data.choose_fraction
        if split is not None and split in (self.data.train_split, self.data.val_split):
            raise ValueError(f"data.choose_split: got '{split}', expected a split that is neither trained on nor reported, or null")
        if split is not None and share:
            raise ValueError(f"data.choose_fraction: got {share}, expected 0 where data.choose_split is set: one part to choose by")
        if self.eval.every and split is None and not share:
            raise ValueError(
                f"eval.every: got '{self.eval.every}', expected data.choose_split or data.choose_fraction beside it: what to judge"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _weights_fit(self) -> Self:
        weights = [self.data.weight, *(each.weight for each in self.data.mix)]
        if sum(weights) // math.gcd(*weights) > MAX_TURNS:
            raise ValueError(f"data.mix: got the weights {weights}, expected a sum of at most {MAX_TURNS} in lowest terms")
        return self

    @pydantic.model_validator(mode="after")
    def _views_and_mixing_fit(self) -> Self:
        micro, repeats = self.train.micro_batch, self.augment.repeats
        if micro % repeats:
            raise ValueError(f"augment.repeats: got {repeats}, expected a divisor of train.micro_batch ({micro}), which counts views")
        if self.train.global_batch % repeats:
            raise ValueError(f"augment.repeats: got {repeats}, expected a divisor of train.global_batch ({self.train.global_batch})")
        if micro and self.augment.mix is not None and micro // repeats < 2:
            raise ValueError(
                f"augment.mix: got a micro-batch of one sample, expected at least 2 to mix: set train.micro_batch={2 * repeats} or more, "
                "or remove augment.mix"
            )
        return self

    @property
    def samples_per_step(self) -> int:
        """Positions of the training stream in a global batch, which counts the views of each."""
        return self.train.global_batch // self.augment.repeats

    @property
    def run_dir(self) -> Path:
        if self.run.dir is None:
            raise RecipeError("run.dir is not set: add 'run.dir=FOLDER'.")
        return self.run.dir

    @property
    def mirror(self) -> Location | None:
        """Where checkpoints are copied to."""
        return None if self.checkpoint.mirror is None else location(self.checkpoint.mirror)

    @property
    def dataset_dir(self) -> Location:
        return self.data.dir if self.data.dir is not None else self.run_dir / "dataset"

    def network(self, num_classes: int) -> ModelConfig:
        """The model's configuration with classes, frames and size taken from the dataset, `clip` and `augment`.

        Raises RecipeError where the model section says otherwise.
        """
        facts = {"num_classes": num_classes, "num_frames": self.clip.num_frames, "input_size": self.augment.size}
        sources = {"num_classes": "the dataset", "num_frames": "clip.num_frames", "input_size": "augment.size"}
        for name, value in facts.items():
            stated = getattr(self.model, name)
            if stated not in (None, value, (value, value)):
                raise RecipeError(f"model.{name}: got {stated}, but {sources[name]} says {value}. Remove model.{name}.")
        return dataclasses.replace(self.model, num_classes=num_classes, num_frames=self.clip.num_frames, input_size=self.augment.size)

    def to_yaml(self) -> str:
        """The resolved recipe, every key present; reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def numerics(self) -> dict[str, object]:
        """Dotted keys that decide which numbers a run computes: a run resumes only where these are equal.

        Where data lies, how many workers there are, how often is saved and how bytes are fetched is not among them.
        """
        plain = self.model_dump(mode="json")
        kept = {name: plain[name] for name in ("clip", "augment", "model", "optimizer")}
        kept["optimizer"] = {name: value for name, value in plain["optimizer"].items() if name not in ("max_skipped", "max_spike")}
        kept["train"] = {name: plain["train"][name] for name in ("global_batch", "micro_batch", "epochs", "steps", "init_from", "freeze")}
        kept["run"] = {"seed": plain["run"]["seed"]}
        kept["engine"] = {name: plain["engine"][name] for name in ("precision", "compile")}
        kept["data"] = {name: plain["data"][name] for name in ("split_column", "train_split", "choose_fraction", "weight")}
        kept["data"]["mix"] = [{name: value for name, value in each.items() if name != "dir"} for each in plain["data"]["mix"]]
        return {f"{section}.{name}": value for section, keys in sorted(kept.items()) for name, value in sorted(keys.items())}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in resources.files("jobs.recipes").iterdir() if path.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by path, or one that comes with the package by name, and applies `key=value` overrides.

    Relative paths in it are taken from the current folder. Without run.dir the run folder is `runs/<recipe's name>`.
    Raises RecipeError with the key, the line, what was got and what was expected.
    """
    text, where = _read(name_or_path)
    values = _parse_yaml(text, where)
    for override in overrides:
        _apply(values, override)
    recipe = parse_recipe(values, where=where, lines=_lines(text))
    return _with_absolute_paths(recipe, Path("runs") / Path(name_or_path).stem)


def parse_overrides(values: Mapping[str, object], overrides: Sequence[str]) -> Recipe:
    """A recipe without a file: plain sections plus `key=value` overrides. Paths become absolute."""
    merged = {name: dict(section) if isinstance(section, Mapping) else section for name, section in values.items()}
    for override in overrides:
        _apply(merged, override)
    return _with_absolute_paths(parse_recipe(merged, where="the command line"), None)


def label_files(given: Sequence[str]) -> str | list[str] | dict[str, str] | None:
    """The value of data.labels for what was given on the command line: FILE or SPLIT=FILE, any number of times."""
    pairs = [text.partition("=") if not os.path.exists(text) else ("", "", text) for text in given]
    stated = [(split, path) for split, equals, path in pairs if equals]
    if stated and len(dict(stated)) != len(given):
        raise RecipeError(f"--labels {' '.join(given)}: state the split of every file, each once, as in train=a.csv val=b.csv, or of none.")
    if stated:
        return dict(stated)
    return given[0] if len(given) == 1 else list(given) or None


def parse_labels(videos: Location, given: Sequence[str], format: str | None) -> DataSection:
    """The data section for labels given on the command line, checked, paths absolute."""
    values = {"videos": str(videos), "labels": label_files(given), **({"format": format} if format else {})}
    return parse_overrides({"data": values}, []).data


def parse_recipe(values: object, *, where: str, lines: Mapping[str, int] | None = None) -> Recipe:
    """Typed recipe from plain values. Raises RecipeError naming every wrong key at once."""
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        problems: dict[str, str] = {}
        for problem in error.errors(include_url=False):
            key, text = _explain(problem["loc"], problem["type"], problem["msg"], problem["input"])
            problems[key] = f"{problems[key]}, or {text}" if key in problems else text
        found = [f"{key}{_line(key, lines or {})}: {text}" for key, text in problems.items()]
        raise RecipeError(f"{where}: " + "\n  ".join(["", *found] if len(found) > 1 else found)) from None


def _with_absolute_paths(recipe: Recipe, default_run_dir: Path | None) -> Recipe:
    data: dict[str, object] = {name: _absolute(getattr(recipe.data, name)) for name in ("videos", "dir")}
    data["labels"] = _absolute_labels(recipe.data.labels)
    data["mix"] = tuple(each.model_copy(update={"dir": _absolute(each.dir)}) for each in recipe.data.mix)
    run = recipe.run.model_copy(update={"dir": _absolute(recipe.run.dir or default_run_dir)})
    train = recipe.train.model_copy(update={"init_from": _absolute(recipe.train.init_from)})
    mirror = None if recipe.mirror is None else str(_absolute(recipe.mirror))
    checkpoint = dataclasses.replace(recipe.checkpoint, mirror=mirror)
    parts = {"run": run, "data": recipe.data.model_copy(update=data), "train": train, "checkpoint": checkpoint}
    return recipe.model_copy(update=parts)


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path in recipe_names() and not os.path.exists(name_or_path):
        return (resources.files("jobs.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8"), f"recipe {name_or_path}"
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, recipe_names(), 1)
        hint = f" Did you mean the packaged recipe '{near[0]}'?" if near else f" Packaged recipes: {', '.join(recipe_names())}."
        raise RecipeError(f"{name_or_path}: no such recipe file.{hint}")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes, expected a recipe of at most {MAX_RECIPE_BYTES}.")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not text in UTF-8; a recipe is a YAML file.") from None


def _parse_yaml(text: str, where: str) -> dict[str, object]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: got a {type(values).__name__}, expected sections such as 'data:' and 'train:'.")
    return values


def _apply(values: dict[str, object], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"'{override}': expected key=value, for example train.epochs=3.")
    *sections, last = key.split(".")
    node = values
    for section in sections:
        child = node[section] = {} if node.get(section) is None else node[section]  # an optional section is null when it is off
        if not isinstance(child, dict):
            raise RecipeError(f"'{override}': '{section}' is a value, not a section.")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[last] = text


def _explain(location: tuple[int | str, ...], kind: str, message: str, value: object) -> tuple[str, str]:
    """(dotted key, what is wrong with it) of one pydantic error."""
    names = []
    section: object = Recipe
    for part in location:
        if isinstance(part, int) and _fields(section):  # an item of a list of sections
            names.append(str(part))
            continue
        if kind in ("extra_forbidden", "unexpected_keyword_argument") or isinstance(part, int) or part in _fields(section):
            names.append(str(part))
            section = _fields(section).get(str(part), object)
    key = ".".join(names)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        owner: object = Recipe
        for name in names[:-1]:
            owner = owner if name.isdigit() else _fields(owner).get(name, object)
        near = difflib.get_close_matches(names[-1], _fields(owner), 1)
        hint = f"did you mean '{'.'.join([*names[:-1], near[0]])}'?" if near else f"known here: {', '.join(_fields(owner))}."
        return key, f"unknown key; {hint}"
    message = message.removeprefix("Value error, ")
    if message.startswith("got "):  # it says what of the value may be shown
        return key, message
    field, colon, rest = message.partition(": got ")
    if colon:
        return f"{key}.{field}" if key else field, f"got {rest}"
    return key, f"got {value!r}: {message[:1].lower() + message[1:]}"


def _fields(section: object) -> dict[str, object]:
    """Field name -> type of a section, which is a pydantic model or a dataclass; empty for anything else."""
    if typing.get_origin(section) is tuple:
        section = next(iter(typing.get_args(section)), object)
    if isinstance(section, types.UnionType):
        section = next((option for option in typing.get_args(section) if _fields(option)), object)
    if isinstance(section, type) and issubclass(section, pydantic.BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    if isinstance(section, type) and dataclasses.is_dataclass(section):
        hints = typing.get_type_hints(section)
        return {field.name: hints[field.name] for field in dataclasses.fields(section)}
    return {}


def _lines(text: str) -> dict[str, int]:
    """Dotted key -> line (from 1) in the YAML text."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    found[prefix + key.value] = key.start_mark.line + 1
                    walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def _line(key: str, lines: Mapping[str, int]) -> str:
    while key:
        if key in lines:
            return f" (line {lines[key]})"
        key = key.rpartition(".")[0]
    return ""


def _absolute_labels(labels: Path | Sequence[Path] | Mapping[str, Path] | None) -> Path | tuple[Path, ...] | dict[str, Path] | None:
    if isinstance(labels, Mapping):
        return {split: _absolute_path(path) for split, path in labels.items()}
    if isinstance(labels, Sequence):
        return tuple(map(_absolute_path, labels))
    return None if labels is None else _absolute_path(labels)


def _absolute(place: Location | None) -> Location | None:
    return _absolute_path(place) if isinstance(place, Path) else place


def _absolute_path(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))
