"""A training state in DeepSpeed's universal checkpoint format, for export only: we never read it back.

    OUT/latest_universal                                  which folder counts
    OUT/global_stepN/zero/<parameter>/fp32.pt             weights; beside it exp_avg.pt, exp_avg_sq.pt, step.pt of trainable ones
    OUT/global_stepN/zero/optimizer_state.pt              what ZeRO 1 and 2 (param_groups) and ZeRO 3 (optimizer_state_dict) look for
    OUT/global_stepN/mp_rank_00_model_states.pt           counters, and the model's whole state dict with its buffers
    OUT/global_stepN/zero_pp_rank_0_mp_rank_00_model_states.pt   the counters again, where ZeRO 3 looks for them

`engine.load_checkpoint(OUT)` of an engine with {"checkpoint": {"load_universal": true}} then goes on from there at any world size and
ZeRO stage 1 to 3. DeepSpeed takes weights, moments and Adam's step from `zero/`; it reads no buffers in this format: load "module" of
the model states for those. Hyperparameters stay those of the engine that loads.
"""

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from cluster.tensor_file import Array

PARTS = {"model": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # our prefix -> DeepSpeed's file
FORMAT = 0.4  # UNIVERSAL_CHECKPOINT_VERSION_VALUE of DeepSpeed 0.19
STEP = "optimizer.step"


def write_universal(out: Path, step: int, tensors: Mapping[str, Array]) -> None:
    """Writes the arrays of a checkpoint to the new folder `out`, whole or not at all. The running average of the weights is left out."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    folder = temporary / f"global_step{step}"
    try:
        for name, value in tensors.items():
            prefix, _, parameter = name.partition(".")
            if prefix in PARTS:
                _save(folder / "zero" / parameter / f"{PARTS[prefix]}.pt", {"param": torch.tensor(value)})
            if prefix == "exp_avg":
                _save(folder / "zero" / parameter / "step.pt", torch.tensor(float(tensors[STEP])))
        # One empty group each leaves the loading engine's rates and decay as they are, however many groups it has.
        groups: list[dict[str, object]] = [{} for name in tensors if name.startswith("exp_avg.")]
        version = {"ds_version": importlib.metadata.version("deepspeed")}
        adam = {"state": {0: {"step": torch.tensor(float(tensors[STEP]))}}, "param_groups": groups}
        _save(folder / "zero" / "optimizer_state.pt", {**version, "param_groups": groups, "optimizer_state_dict": adam})
        counters = {
            **version,
            "global_steps": step,
            "skipped_steps": step - int(tensors[STEP]),
            "dp_world_size": 1,
            "mp_world_size": 1,
            "universal_checkpoint_info": {"universal_checkpoint_version": FORMAT},
        }
        module = {name.partition(".")[2]: torch.tensor(value) for name, value in tensors.items() if name.startswith(("model.", "buffer."))}
        _save(folder / "mp_rank_00_model_states.pt", {**counters, "module": module})
        _save(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", {**counters, "module": {}})
        (temporary / "latest_universal").write_text(folder.name, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
