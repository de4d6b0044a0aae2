"""What fits the memory: `train.micro_batch: auto`, solved once before the first step, and what to do when memory runs out later.

One worker runs forward and backward on the smallest micro-batch and on one twice as large. What memory a sample takes follows from the
difference, and the largest fitting divisor of the global batch is kept in `memory.json` in the run folder, so that the same command
finds the same number on any machine: the micro-batch decides the numbers a run computes.

A step that finds no memory later ends the gang. If activations were kept, `memory.json` says that from now on they are recomputed
(`model.activation_checkpointing`, the same numbers for less memory and more time), and training goes on from its checkpoint.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from cluster import lease
from cluster.topology import Worker, world_sizes
from jobs.errors import JobError, user_errors
from jobs.recipe import Recipe, parse_recipe
from jobs.run_folder import write_text

FILE = "memory.json"
FORMAT = 1
SHARE = 0.8  # of the free memory that training may take; the rest is for DALI, prefetched clips and fragmentation
STATE_COPIES = 5  # weights, gradients, two moments, and one more for the average or a snapshot


def remembered(run_dir: Path) -> dict[str, object]:
    """What `memory.json` says; {} without one."""
    try:
        found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def remember(run_dir: Path, **facts: object) -> None:
    """Adds to `memory.json`."""
    write_text(run_dir / FILE, json.dumps({**remembered(run_dir), "format": FORMAT, **facts}, indent=1) + "\n")


def solved(recipe: Recipe, num_classes: int) -> Recipe:
    """The recipe with the number that `train.micro_batch: auto` means; measured now unless the run folder knows it."""
    if recipe.train.micro_batch:
        return recipe
    known = remembered(recipe.run_dir).get("micro_batch")
    if not isinstance(known, int):
        known = _measured(recipe, num_classes)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": known})})


def candidates(recipe: Recipe) -> list[int]:
    """Micro-batches that the recipe allows, ascending: divisors of the global batch that hold whole samples and give each worker one."""
    repeats, workers = recipe.augment.repeats, recipe.launch.fewest
    least = repeats * (2 if recipe.augment.mix is not None else 1)
    total = recipe.train.global_batch
    return [size for size in world_sizes(total) if size % repeats == 0 and size >= least and total // size % workers == 0]


def _measured(recipe: Recipe, num_classes: int) -> int:
    from cluster.launch import launch

    if not candidates(recipe):
        raise JobError(
            f"train.micro_batch=auto: no divisor of train.global_batch ({recipe.train.global_batch}) gives {recipe.launch.workers} workers "
            "one micro-batch each. Choose another train.global_batch or launch.workers."
        )
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    with lease.hold(recipe.run_dir):
        launch(
            "jobs.fit:worker",
            {"recipe": recipe.model_dump(mode="json"), "num_classes": num_classes},
            run_dir=recipe.run_dir / "fit",  # its attempts are not the training's
            num_micro_batches=1,
            options=dataclasses.replace(recipe.launch, workers=1),
            on_event=lambda event: None,
            user_errors=user_errors(),
        )
    shutil.rmtree(recipe.run_dir / "fit", ignore_errors=True)
    found = remembered(recipe.run_dir).get("micro_batch")
    assert isinstance(found, int)
    return found


def worker(payload: Mapping[str, object], worker: Worker) -> None:
    """Measures, decides and writes `memory.json`."""
    recipe, num_classes = parse_recipe(payload["recipe"], where="the run's recipe"), int(str(payload["num_classes"]))
    sizes = candidates(recipe)
    first = sizes[0]
    # The smaller pass goes first: an allocator keeps what it once had.
    small, large = (_peak_bytes(recipe, num_classes, worker.device, size) for size in (first, 2 * first))
    each = max(1.0, (large - small) / first)
    fixed = max(0.0, small - each * first)
    free, state = _free_bytes(recipe, worker.device), STATE_COPIES * 4 * _num_parameters(recipe, num_classes)
    budget = SHARE * free - fixed - state
    fitting = [size for size in sizes if each * size <= budget]
    if not fitting:
        raise JobError(
            f"train.micro_batch=auto: even {first} clips do not fit: they take about {(fixed + state + each * first) / 2**30:.1f} GiB of "
            f"{SHARE * free / 2**30:.1f}. Set model.activation_checkpointing=true, or a smaller model, clip.num_frames or augment.size."
        )
    remember(recipe.run_dir, micro_batch=fitting[-1], bytes_per_clip=round(each), free_bytes=round(free), device=worker.device)


def _num_parameters(recipe: Recipe, num_classes: int) -> int:
    from jobs.trained_model import build_model

    return sum(parameter.numel() for parameter in build_model(recipe, num_classes).parameters())


def _peak_bytes(recipe: Recipe, num_classes: int, device: str, size: int) -> int:
    """Memory that forward and backward of `size` clips take beyond weights and gradients."""
    import torch

    from cluster.engine import autocast
    from jobs.trained_model import build_model

    model = build_model(recipe, num_classes).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    clips = torch.randn(size, 3, recipe.clip.num_frames, recipe.augment.size, recipe.augment.size, device=device)
    _reset_peak(device)
    before = _peak(device)
    with autocast(recipe.engine, device):
        loss = model(clips).float().logsumexp(1).mean()
    loss.backward()
    return _peak(device) - before


def _reset_peak(device: str) -> None:
    import torch

    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # makes the highest resident size the present one
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int:
    import torch

    if device == "cpu":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return torch.cuda.max_memory_allocated(device)


def _free_bytes(recipe: Recipe, device: str) -> float:
    """Of a GPU, or of this machine for each of the workers that will be on it."""
    import psutil
    import torch

    if device != "cpu":
        return float(torch.cuda.mem_get_info(device)[1])
    cores = psutil.cpu_count() or 1
    workers = min(recipe.launch.most or cores, cores // max(1, recipe.launch.cpus_per_worker))
    return float(psutil.virtual_memory().available) / max(1, min(workers, cores))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a GPU or in the machine."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def with_recomputation(recipe: Recipe) -> Recipe:
    """The recipe as it is run when `memory.json` says that activations are recomputed. Its identity is that of the given one."""
    if not remembered(recipe.run_dir).get("activation_checkpointing"):
        return recipe
    return recipe.model_copy(update={"model": dataclasses.replace(recipe.model, activation_checkpointing=True)})


def out_of_memory(recipe: Recipe, step: int, error: BaseException) -> JobError:
    """What a rank raises when `step` of `recipe`, as it is run, found no memory; remembers to recompute activations that were kept."""
    kept = not recipe.model.activation_checkpointing
    if kept:
        remember(recipe.run_dir, activation_checkpointing=True, since_step=step)
    reason = " ".join(str(error).split())[:200]
    return JobError(
        f"Step {step} found no memory ({reason}). "
        + (
            "From now on activations are recomputed (model.activation_checkpointing); the same command goes on from the last checkpoint."
            if kept
            else "Activations are recomputed already: set a smaller train.micro_batch in a new run, engine.zero_stage=1 or more, "
            "or lower loader.prefetch_mib."
        )
    )
