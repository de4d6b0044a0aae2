"""A command that a cluster shall run: what it fills, what it needs, and the files that go with it. Checked before anything is sent."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import click

from cluster.topology import num_micro_batches
from jobs.errors import RecipeError
from jobs.recipe import load_recipe, parse_labels
from jobs.run_folder import libraries
from pipeline.location import Location, within

RECIPE = "recipe.yaml"
VERBS = ("train", "eval", "run", "data build")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a job needs of a cluster; plain values, so that it travels as JSON.

    read: files, folders and URLs that every node must see, by recipe key. shared: folders that must be one and the same everywhere, and
    writable; made if missing. libraries: versions that the job was submitted with. nvdec: videos are decoded on GPUs.
    num_micro_batches: of a global batch, None when nothing is trained. launch: the recipe's section. timeout_s: how long a node may take
    for an answer.
    """

    read: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    nvdec: bool = False
    num_micro_batches: int | None = None
    launch: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """verb: one of VERBS. folder: which the command fills, a path on the cluster or a URL. command: what to run there, without `posmlp`.

    files: text by name, beside which the command runs. digest: of command and files.
    """

    verb: str
    folder: str
    command: Sequence[str]
    needs: Needs
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([list(self.command), dict(self.files)]).encode()).hexdigest()

    @classmethod
    def of(cls, words: Sequence[str], *, timeout_s: float) -> Self:
        """From a command line without `posmlp`. Paths in it are those of the cluster; relative ones are taken from the current folder.

        Raises click.UsageError for another verb or a wrong option, RecipeError for a wrong recipe.
        """
        verb, given = _parsed(words)
        if verb == "data build":
            work = cls._build(given)
        elif verb == "eval":
            work = cls._eval(given)
        else:
            work = cls._recipe(verb, given)
        return replace(work, needs=replace(work.needs, libraries=_versions(), timeout_s=timeout_s))

    @classmethod
    def _recipe(cls, verb: str, given: Mapping[str, object]) -> Self:
        recipe = load_recipe(
            str(given["recipe"]), _overrides(given, *([f"launch.launcher={given['launcher']}"] if given["launcher"] else []))
        )
        if recipe.launch.launcher == "local":
            raise RecipeError("launch.launcher=local trains without Ray, on one machine. To submit, leave it out.")
        data, shared = recipe.data, {"run.dir": recipe.run_dir}
        read: dict[str, Location] = {}
        if verb == "run" and data.videos is not None:
            read["data.videos"] = data.videos
            read.update(data.label_files)
            if isinstance(data.dir, Path):
                shared["data.dir"] = data.dir
        else:
            read["data.dir"] = within(recipe.dataset_dir, "dataset.json")
        read.update({f"data.mix[{place}].dir": within(each.dir, "dataset.json") for place, each in enumerate(data.mix)})
        if recipe.train.init_from is not None:
            read["train.init_from"] = recipe.train.init_from
        needs = Needs(
            read=_texts(read),
            shared=_texts(shared),
            nvdec=recipe.loader.decode == "nvdec",
            num_micro_batches=num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch),
            launch=recipe.model_dump(mode="json")["launch"],
        )
        return cls(verb=verb, folder=str(recipe.run_dir), command=[verb, RECIPE], needs=needs, files={RECIPE: recipe.to_yaml()})

    @classmethod
    def _eval(cls, given: Mapping[str, object]) -> Self:
        folder = os.path.abspath(str(given["run_dir"]))
        command = ["eval", folder, "--average", str(given["average"]), *_overrides(given)]
        needs = Needs(read={"RUN": os.path.join(folder, RECIPE)}, shared={"RUN": folder})
        return cls(verb="eval", folder=folder, command=command, needs=needs)

    @classmethod
    def _build(cls, given: Mapping[str, object]) -> Self:
        if given["dry_run"]:
            raise click.UsageError("--dry-run tries videos where it runs: type it on a node of the cluster.")
        videos, out = _absolute(given["videos"]), _absolute(given["out"])
        texts = given["labels"]
        assert isinstance(texts, tuple)
        data = parse_labels(videos, texts, None)  # which splits FILE and SPLIT=FILE are of, with absolute paths
        named = {key: (key.removeprefix("data.labels.") if key.startswith("data.labels.") else "") for key in data.label_files}
        labels = [f"{named[key]}={path}" if named[key] else str(path) for key, path in data.label_files.items()]
        words = [
            *(word for text in labels for word in ("--labels", text)),
            *(["--format", str(given["format_"])] if given["format_"] else []),
        ]
        shared = {"--out": out} if isinstance(out, Path) else {}
        needs = Needs(read=_texts({"--videos": videos, **data.label_files}), shared=_texts(shared))
        command = ["data", "build", "--videos", str(videos), *words, "--out", str(out), *_overrides(given)]
        return cls(verb="data build", folder=str(out), command=command, needs=needs)


def _parsed(words: Sequence[str]) -> tuple[str, Mapping[str, object]]:
    """(verb, its parameters by name), read by the very command that will run."""
    from jobs.cli import posmlp  # which imports this package's verbs late

    group: click.Command = posmlp
    context, names, rest = click.Context(posmlp, info_name="posmlp"), [], list(words)
    while isinstance(group, click.Group):
        if not rest:
            raise click.UsageError(f"What shall be submitted? Add one of: {', '.join(f'-- {verb} ...' for verb in VERBS)}.", context)
        name, command, rest = group.resolve_command(context, rest)
        names.append(str(name))
        assert command is not None
        group = command
        if not isinstance(command, click.Group):
            context = command.make_context(name, rest, parent=context)
    verb = " ".join(names)
    if verb not in VERBS:
        raise click.UsageError(f"'{verb}' cannot be submitted; possible: {', '.join(VERBS)}.")
    return verb, context.params


def _overrides(given: Mapping[str, object], *more: str) -> list[str]:
    overrides = given["overrides"]
    assert isinstance(overrides, tuple)
    return [*overrides, *more]


def _absolute(place: object) -> Location:
    return place if isinstance(place, str) else Path(os.path.abspath(str(place)))


def _texts(paths: Mapping[str, Location]) -> dict[str, str]:
    return {key: str(path) for key, path in paths.items()}


def _versions() -> dict[str, str]:
    return {name: version for name, version in libraries().items() if name != "posmlp-video" and version != "not installed"}


def base_id(verb: str, folder: str) -> str:
    """The part of a job's id that all submissions of one work have in common."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(folder).name)[:40].strip("-") or "run"
    return f"posmlp-{verb.replace(' ', '-')}-{name}-{hashlib.sha256(folder.encode()).hexdigest()[:10]}"


def number_of(name: str) -> int:
    """Which submission of its work a job is, from its id; 0 for ids of another kind."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
