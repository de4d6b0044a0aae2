"""From a recipe to a model, and from a checkpoint to the same model with its weights."""

import numpy as np
import torch

from cluster.checkpoint import Array, Checkpoint, model_state
from cluster.errors import CheckpointError
from jobs.recipe import Recipe
from model.posmlp import PosMLPVideo


def build_model(recipe: Recipe, num_classes: int) -> PosMLPVideo:
    """The recipe's model with its initial weights, which depend on run.seed alone."""
    torch.manual_seed(recipe.run.seed)
    return PosMLPVideo(recipe.network(num_classes))


def load_trained(recipe: Recipe, num_classes: int, checkpoint: Checkpoint, *others: Checkpoint) -> PosMLPVideo:
    """The model in evaluation mode with a checkpoint's weights and statistics, or with the mean of several.

    Raises CheckpointError where they do not fit.
    """
    model = build_model(recipe, num_classes)
    weights = averaged(checkpoint, *others) if others else model_state(checkpoint.load())
    wanted = model.state_dict()
    wrong = [name for name, tensor in wanted.items() if name not in weights or weights[name].shape != tuple(tensor.shape)]
    if wrong:
        raise CheckpointError(
            f"The checkpoint of step {checkpoint.step} in {recipe.run_dir} does not fit the recipe's model: "
            f"{len(wrong)} tensors are missing or of another shape, first '{wrong[0]}'. Use the recipe it was trained with."
        )
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in wanted})
    return model.eval()


def averaged(checkpoint: Checkpoint, *others: Checkpoint) -> dict[str, Array]:
    """The mean of several checkpoints' weights and buffers, summed in float64; whole numbers are those of the first.

    A batch norm's running mean and variance are averaged like weights: an estimate, since the averaged network's own statistics would
    need another pass over the training data. Raises CheckpointError where the checkpoints are of different models.
    """
    first = model_state(checkpoint.load())
    totals = {name: value.astype(np.float64) for name, value in first.items() if np.issubdtype(value.dtype, np.floating)}
    for other in others:
        state = model_state(other.load())
        if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in first.items()}:
            raise CheckpointError(f"{checkpoint.path} and {other.path} hold different models and cannot be averaged.")
        for name in totals:
            totals[name] += state[name].astype(np.float64)
    return {name: (totals[name] / (1 + len(others))).astype(value.dtype) if name in totals else value for name, value in first.items()}
