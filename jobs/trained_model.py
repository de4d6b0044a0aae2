"""From a recipe to a model, and from a checkpoint to the same model with its weights."""

import torch

from cluster.checkpoint import Checkpoint, model_state
from cluster.errors import CheckpointError
from jobs.recipe import Recipe
from model.posmlp import PosMLPVideo


def build_model(recipe: Recipe, num_classes: int) -> PosMLPVideo:
    """The recipe's model with its initial weights, which depend on run.seed alone."""
    torch.manual_seed(recipe.run.seed)
    return PosMLPVideo(recipe.network(num_classes))


def load_trained(recipe: Recipe, num_classes: int, checkpoint: Checkpoint) -> PosMLPVideo:
    """The model in evaluation mode with a checkpoint's weights and statistics. Raises CheckpointError where they do not fit."""
    model = build_model(recipe, num_classes)
    weights = model_state(checkpoint.load())
    wanted = model.state_dict()
    wrong = [name for name, tensor in wanted.items() if name not in weights or weights[name].shape != tuple(tensor.shape)]
    if wrong:
        raise CheckpointError(
            f"The checkpoint of step {checkpoint.step} in {recipe.run_dir} does not fit the recipe's model: "
            f"{len(wrong)} tensors are missing or of another shape, first '{wrong[0]}'. Use the recipe it was trained with."
        )
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in wanted})
    return model.eval()
