"""Average of the weights, groups, schedules, bad steps: each as plain torch does it in a loop, at other world sizes and ZeRO stages too."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_training as toy
from safetensors.numpy import load_file
from torch import nn

from cluster.checkpoint import Array, model_state
from cluster.engine import Engine
from cluster.errors import CheckpointError, ClusterError
from cluster.guard import MEMORY, Guard
from cluster.launch import launch
from cluster.options import EngineOptions, LaunchOptions, OptimizerOptions
from cluster.schedule import average_decay, learning_rate

ALONE = toy.ALONE
A = toy.NUM_MICRO_BATCHES
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),  # DeepSpeed's own
]


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """The featured run in plain torch: a loop, an AdamW with a group for each rate, an average kept by hand."""
    model, options = toy.featured_model(), toy.FEATURED
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {
            "params": [parameter],
            "weight_decay": options.weight_decay if parameter.ndim > 1 else 0.0,
            "scale": toy.RATE_SCALES.get(name, 1.0),
        }
        for name, parameter in named.items()
    ]
    adam = torch.optim.AdamW(groups, eps=options.eps)
    norm = model[1]
    averages = {name: parameter.detach().clone() for name, parameter in named.items()}
    averages |= {f"1.{name}": getattr(norm, name).clone() for name in ("running_mean", "running_var")}
    running = {name: getattr(norm, name).clone() for name in ("running_mean", "running_var")}
    for step in range(toy.FEATURED_STEPS):
        if step == toy.BAD_STEP:
            continue
        adam.zero_grad()
        means = {name: torch.zeros_like(value) for name, value in running.items()}
        for micro in range(A):
            norm.reset_running_stats()
            norm.momentum = 1.0
            (toy.loss(model, toy.featured_batch(step, micro)) / A).backward()
            for name in means:
                means[name] += getattr(norm, name) / A
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, toy.FEATURED_STEPS, options) * group["scale"]
        adam.step()
        running = {name: 0.9 * running[name] + 0.1 * means[name] for name in running}
        decay = min(0.6, (1 + step) / (10 + step))
        current = {name: parameter.detach() for name, parameter in named.items()} | {f"1.{name}": value for name, value in running.items()}
        averages = {name: decay * old + (1 - decay) * current[name] for name, old in averages.items()}
    found = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    found |= {f"buffer.1.{name}": value for name, value in running.items()} | {f"ema.{name}": value for name, value in averages.items()}
    found |= {f"exp_avg.{name}": adam.state[parameter]["exp_avg"] for name, parameter in named.items()}
    return found | {"optimizer.step": torch.tensor(toy.FEATURED_STEPS - 1)}


def check(state: dict[str, Array], told: list[tuple[float, str | None]], plain: dict[str, torch.Tensor]) -> None:
    assert plain.keys() <= state.keys()
    assert "ema.5.bias" not in state  # it is frozen: its average is itself
    for name, value in plain.items():
        assert np.allclose(state[name], value.numpy(), atol=3e-6), name
    assert int(state["buffer.1.num_batches_tracked"]) == toy.FEATURED_STEPS - 1
    skipped = [step for step, (_, why) in enumerate(told) if why is not None]
    assert skipped == [toy.BAD_STEP]
    assert told[toy.BAD_STEP][1] == f"loss of step {toy.BAD_STEP} is nan"


@pytest.mark.parametrize("pair", [(0, 2), (2, 0), (3, 1)])
def test_alone_every_feature_equals_plain_torch(plain: dict[str, torch.Tensor], pair: tuple[int, int]) -> None:
    result = toy.featured_run(ALONE, *pair)
    check(result["state"], result["told"], plain)  # type: ignore[arg-type]


def test_on_two_ranks_every_feature_equals_plain_torch(plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    pairs = [(0, 2), (2, 3), (3, 0)]
    launch(
        "toy_training:features",
        {"pairs": pairs, "result": str(tmp_path)},
        run_dir=tmp_path / "run",
        num_micro_batches=A,
        options=LaunchOptions(launcher="local", workers=2, max_restarts=0, hang_timeout_s=120, cpus_per_worker=1),
        on_event=lambda event: None,
    )
    for first, second in pairs:
        told = [(tmp_path / f"told-{first}-{second}-{rank}.json").read_text() for rank in range(2)]
        assert told[0] == told[1]  # the ranks decide alike
        check(load_file(tmp_path / f"state-{first}-{second}.safetensors"), json.loads(told[0]), plain)


def engine(zero: int = 0, **changes: object) -> Engine:
    return Engine(
        toy.build_model(), optimizer=replace(toy.OPTIMIZER, **changes), options=EngineOptions(precision="fp32", zero_stage=zero),  # type: ignore[arg-type]
        total_steps=99, num_micro_batches=A, worker=ALONE,
    )  # fmt: skip


def batches(step: int) -> list[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    return [(micro, toy.batch(step, micro)) for micro in range(A)]


def steep(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A finite loss with an infinite slope."""
    value = toy.loss(model, batch)
    return value + (value - value.detach()).abs().sqrt()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_skipped_step_changes_nothing_and_is_counted(zero: int) -> None:
    trained = engine(zero, max_skipped=2, ema=0.9)
    trained.train_step(0, batches(0), toy.loss)
    before = trained.state()
    assert "gradient norm of step 1 is" in str(trained.train_step(1, batches(1), steep).skipped)
    after = trained.state()
    assert before.keys() == after.keys()
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []
    restored = engine(zero, max_skipped=2, ema=0.9)  # the count survives a resume, as steps less AdamW's own count
    restored.restore(after)
    restored.train_step(2, batches(2), steep)
    with pytest.raises(ClusterError, match=r"gradient norm of step 3 is .* bad step number 3, more than optimizer\.max_skipped=2"):
        restored.train_step(3, batches(3), steep)


def test_a_loss_spike_is_a_bad_step() -> None:
    def loss(factor: float) -> object:
        return lambda model, batch: toy.loss(model, batch) * 0.0 + factor

    trained = engine(max_spike=3.0, max_skipped=1, ema=0.5)
    for step in range(MEMORY):
        assert trained.train_step(step, batches(step), loss(2.0)).skipped is None  # type: ignore[arg-type]
    state = trained.state()
    assert state["optimizer.losses"].tolist() == pytest.approx([2.0, MEMORY])
    resumed = engine(max_spike=3.0, max_skipped=1, ema=0.5)
    resumed.restore(state)
    spike = resumed.train_step(MEMORY, batches(MEMORY), loss(6.5))  # type: ignore[arg-type]
    assert spike.skipped == f"loss of step {MEMORY} is 6.5, 3.25 times the mean of the steps before"
    with pytest.raises(ClusterError, match=r"step 21 is 7.*bad step number 2"):
        resumed.train_step(MEMORY + 1, batches(0), loss(7.0))  # type: ignore[arg-type]
    lifted = engine(ema=0.5)  # without the bound its memory is passed over
    lifted.restore(state)
    assert "optimizer.losses" not in lifted.state()


def test_the_guard_follows_the_losses() -> None:
    guard = Guard(OptimizerOptions(max_spike=2.0))
    for loss in range(1, MEMORY + 1):
        assert guard.bound == math.inf
        assert guard.judge(0, float(loss), 1.0) is None
    assert guard.mean == pytest.approx((MEMORY + 1) / 2)
    assert guard.judge(0, 2.1 * guard.mean, 1.0) is not None
    assert guard.mean == pytest.approx((MEMORY + 1) / 2)  # a bad step does not count


def test_some_rank_asking_to_stop_is_told_to_all() -> None:
    trained = engine()
    assert not trained.train_step(0, batches(0), toy.loss).stop
    assert trained.train_step(1, batches(1), toy.loss, stop=lambda: True).stop


def test_a_checkpoint_without_an_average_is_refused_by_one_who_wants_it() -> None:
    with pytest.raises(CheckpointError, match=r"'ema\.0\.weight' has shape None there"):
        engine(ema=0.9).restore(engine().state())


def test_evaluation_takes_the_average_where_there_is_one() -> None:
    trained = engine(ema=0.9)
    for step in range(3):
        trained.train_step(step, batches(step), toy.loss)
    state = trained.state()
    averaged, last = model_state(state), model_state(state, averaged=False)
    assert averaged.keys() == last.keys() == set(trained.model.state_dict())
    assert np.array_equal(averaged["5.weight"], state["ema.5.weight"])
    assert np.array_equal(averaged["1.running_var"], state["ema.1.running_var"])
    assert np.array_equal(averaged["1.num_batches_tracked"], state["buffer.1.num_batches_tracked"])
    assert np.array_equal(last["5.weight"], state["model.5.weight"])


def test_the_average_forgets_the_start() -> None:
    options = OptimizerOptions(ema=0.999)
    assert average_decay(0, options) == pytest.approx(0.1)
    assert average_decay(90, options) == pytest.approx(0.91)
    assert average_decay(100_000, options) == 0.999
    assert average_decay(5, OptimizerOptions()) is None
