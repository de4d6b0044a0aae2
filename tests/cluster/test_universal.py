"""DeepSpeed itself goes on from an exported training state, at every ZeRO stage."""

from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
import toy_training
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from cluster.universal import write_universal

ALONE = toy_training.ALONE
A = toy_training.NUM_MICRO_BATCHES
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),  # DeepSpeed's own
]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_loads_weights_moments_and_step(tmp_path: Path, stage: int) -> None:
    ours = toy_training.build_engine(ALONE, total_steps=9)
    for number in range(3):
        ours.train_step(number, [(micro, toy_training.batch(number, micro)) for micro in range(A)], toy_training.loss)
    state = ours.state()
    write_universal(tmp_path / "out", 3, state)
    model = toy_training.build_model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 7e-4},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
        "checkpoint": {"load_universal": True},
        "steps_per_print": None,
    }
    engine = deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)[0]
    path, _ = engine.load_checkpoint(str(tmp_path / "out"))
    assert path is not None
    assert engine.global_steps == 3
    for name, parameter in model.named_parameters():
        assert np.array_equal(safe_get_full_fp32_param(parameter).numpy(), state[f"model.{name}"]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(safe_get_full_optimizer_state(parameter, moment).numpy(), state[f"{moment}.{name}"]), name
    assert {float(group["lr"]) for group in adam.param_groups} == {1e-3, 7e-4}  # the loading engine's own
    assert {float(entry["step"]) for entry in adam.state.values() if "step" in entry} == {3.0}
    module = torch.load(tmp_path / "out" / "global_step3" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert torch.equal(module["1.running_mean"], torch.from_numpy(state["buffer.1.running_mean"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing unfinished is left
