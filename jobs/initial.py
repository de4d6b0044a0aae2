"""Where training begins: the recipe's own initial weights, or those of another run or file, and which of them stay frozen."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from cluster.checkpoint import MANIFEST, Checkpoint, CheckpointStore, model_state, open_checkpoint
from jobs.errors import RecipeError
from model.weights import LoadReport, load_resized, read_state

if TYPE_CHECKING:
    from model.posmlp import PosMLPVideo


def initialise(model: "PosMLPVideo", source: Path) -> LoadReport:
    """Loads `train.init_from` into `model`: dictionaries are resized by offset, a head for other classes stays fresh.

    source: a run folder (its newest whole checkpoint), a checkpoint folder, a .safetensors file or a torch file (nothing is unpickled).
    A checkpoint's running average of the weights is taken where it has one.
    Raises RecipeError, CheckpointError or ModelError saying what does not fit.
    """
    return load_resized(model, _read(source))


def _read(source: Path) -> dict[str, torch.Tensor]:
    if source.is_dir():
        return {name: torch.from_numpy(value) for name, value in model_state(_checkpoint(source).load()).items()}
    if not source.is_file():
        raise RecipeError(f"train.init_from: {source} does not exist; expected a run folder, a checkpoint folder or a file of weights.")
    try:
        return read_state(source)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"train.init_from: {source} cannot be read as weights, without unpickling: {reason}") from None
    except Exception as error:  # what torch and safetensors raise for other files has no common class
        raise RecipeError(f"train.init_from: {source} cannot be read as weights: {type(error).__name__}") from None


def _checkpoint(folder: Path) -> Checkpoint:
    if (folder / MANIFEST).is_file():
        return open_checkpoint(folder)
    found = CheckpointStore(folder / "checkpoints", keep=1).newest(warn=lambda text: click.echo(f"warning: {text}", err=True))
    if found is None:
        raise RecipeError(f"train.init_from: {folder} is neither a checkpoint nor a run folder with a whole one.")
    return found


def freeze(model: torch.nn.Module, prefixes: Sequence[str]) -> list[str]:
    """Freezes the parameters whose names begin with one of `prefixes`, whole components of a name; returns their names.

    Raises RecipeError for a prefix that is no parameter's.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(_begins(name, prefix) for name in names):
            parts = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise RecipeError(f"train.freeze: no parameter's name begins with '{prefix}'; the model's parts are {parts}.")
    frozen = [name for name in names if any(_begins(name, prefix) for prefix in prefixes)]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def _begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def rate_scales(model: "PosMLPVideo", layer_decay: float) -> dict[str, float]:
    """Parameter name -> factor of its learning rate: `layer_decay` to the power of the layers above its own."""
    top = model.num_layers - 1
    return {name: layer_decay ** (top - model.layer_id(name)) for name, _ in model.named_parameters()}
