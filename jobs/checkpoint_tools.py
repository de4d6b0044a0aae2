"""posmlp checkpoint list | inspect | verify | export: what a run has saved, whether it is whole, and its weights for elsewhere."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoint import MANIFEST, SCORE, Checkpoint, CheckpointStore, model_state, open_checkpoint, write_safetensors
from cluster.errors import CheckpointError
from jobs.checkpoint_mirror import Mirror
from jobs.errors import JobError
from pipeline.location import Location


def listed(run_dir: Path) -> list[Checkpoint]:
    """A run's checkpoints with a readable manifest, newest first. Raises JobError where there is none."""
    found = CheckpointStore(run_dir / "checkpoints", keep=1).manifests()
    if not found:
        raise JobError(f"{run_dir} has no checkpoint; expected a run folder. Train first: posmlp train RECIPE run.dir={run_dir}")
    return found


def chosen(run_dir: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, the newest one without; its bytes are checked. Raises JobError or CheckpointError."""
    found = listed(run_dir)
    fitting = [checkpoint for checkpoint in found if step in (None, checkpoint.step)]
    if not fitting:
        steps = ", ".join(str(checkpoint.step) for checkpoint in found)
        raise JobError(f"{run_dir} has no checkpoint of step {step}; there are {steps}.")
    return open_checkpoint(fitting[0].path)


def lines(place: Location) -> Iterator[str]:
    """The checkpoints of a run folder, or of a mirror at a URL, for people; newest first. Raises JobError where there is none."""
    if isinstance(place, Path):
        for found in listed(place):
            yield line(found, sum(path.stat().st_size for path in found.path.iterdir()), found.judgement())
        return
    mirror = Mirror(place)
    whole = {name: files for name, files in mirror.listing().items() if MANIFEST in files}
    if not whole:
        raise JobError(f"{place} has no checkpoint; expected a run's checkpoint.mirror.")
    for name, files in whole.items():
        there = mirror.manifest(name)
        judged = mirror.judgement(name) if SCORE in files else None
        yield f"{name} is damaged: {there}" if isinstance(there, str) else line(there, sum(files.values()), judged)


def line(checkpoint: Checkpoint, size: int, facts: Mapping[str, Any] | None) -> str:
    """One checkpoint for people. size: in bytes. facts: its judgement."""
    top1 = facts.get("top1") if facts else None
    judged = f"  top-1 {top1:.3f} of {facts.get('split')!r}" if facts and isinstance(top1, int | float) else ""
    return f"step {checkpoint.step:>8}  {len(checkpoint.tensors):>5} tensors  {size / (1 << 20):>9.1f} MiB  {checkpoint.path.name}{judged}"


def inspect(checkpoint: Checkpoint) -> dict[str, object]:
    """JSON-able: what a checkpoint belongs to and what it holds, by kind of tensor."""
    kinds: dict[str, dict[str, int]] = {}
    for name, entry in checkpoint.tensors.items():
        assert isinstance(entry, Mapping)
        kind = kinds.setdefault(name.partition(".")[0], {"tensors": 0, "elements": 0})
        size = 1
        for extent in entry["shape"]:
            size *= int(extent)
        kind["tensors"] += 1
        kind["elements"] += size
    return {"path": str(checkpoint.path), "step": checkpoint.step, "number": checkpoint.number, "holds": kinds, **checkpoint.meta}


def verify(run_dir: Path) -> list[str]:
    """What is wrong with a run's checkpoints, one line each; every byte is read."""
    problems = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        try:
            open_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
    listed(run_dir)  # an empty folder is an error, not a clean bill
    return problems


def export_universal(checkpoint: Checkpoint, out: Path) -> None:
    """Writes weights, moments and counters as a folder in DeepSpeed's universal format (`cluster.universal`). Raises as `export`."""
    from cluster.universal import write_universal

    _check_new(out)
    write_universal(out, checkpoint.step, checkpoint.load())


def _check_new(out: Path) -> None:
    if out.exists() or not out.parent.is_dir():
        raise JobError(f"{out} {'exists' if out.exists() else 'is in no folder that exists'}; choose another --out.")


def export(checkpoint: Checkpoint, out: Path, *, averaged: bool = True) -> list[str]:
    """Writes the weights and buffers as one safetensors file under the released names, whole or not at all; returns their names.

    averaged: the running average of the weights where there is one. Index buffers are included where the released class has them;
    a model that the released names cannot express keeps its own. Raises JobError where `out` exists or its folder does not.
    """
    import torch

    from jobs.recipe import parse_recipe
    from jobs.trained_model import build_model
    from model.errors import ModelError
    from model.weights import export_released

    _check_new(out)
    recipe = parse_recipe(checkpoint.meta["recipe"], where=f"{checkpoint.path}'s recipe")
    classes = checkpoint.meta["classes"]
    assert isinstance(classes, list)
    state = model_state(checkpoint.load(), averaged=averaged)
    model = build_model(recipe, len(classes))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    try:
        tensors = {name: tensor.numpy() for name, tensor in export_released(model).items()}
    except ModelError:
        tensors = state
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        write_safetensors(temporary, tensors)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return sorted(tensors)
