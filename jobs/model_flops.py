"""How much of what a device can compute a training uses: a step's model FLOPs over the rate of one large matrix product, or a peak."""

import time

import torch

from jobs.recipe import Recipe
from model.presets import count_macs

SIZES = {"cpu": 1024, "cuda": 8192}  # of the square product: long enough to be timed, short enough for a start
REPEATS = 4
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def step_flops(recipe: Recipe, num_classes: int, world_size: int) -> float:
    """Floating-point operations of the model in one optimizer step of one rank: forward once, backward twice that, nothing recomputed."""
    return 2.0 * 3.0 * count_macs(recipe.network(num_classes).resolve()) * recipe.train.global_batch / world_size


def peak_flops(recipe: Recipe, device: str, precision: str) -> float:
    """Operations per second that count as all: `engine.peak_tflops`, or the best of some matrix products, measured now."""
    if recipe.engine.peak_tflops:
        return recipe.engine.peak_tflops * 1e12
    where = torch.device(device)
    size = SIZES[where.type]
    factor = torch.ones(size, size, device=where, dtype=TYPES[precision])
    seconds = min(_timed(factor, where) for _ in range(REPEATS))
    return 2.0 * size**3 / seconds


def _timed(factor: torch.Tensor, where: torch.device) -> float:
    began = time.perf_counter()
    product = torch.mm(factor, factor)
    if where.type == "cuda":
        product[0, 0].item()  # waits for it
    return time.perf_counter() - began
