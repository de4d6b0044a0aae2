"""One step: equal to plain torch, whatever the world size; the state: equal through every pair of ZeRO stages."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_training
from torch import nn

from cluster.batch_norm import BatchNormStatistics
from cluster.engine import Engine
from cluster.errors import CheckpointError, ClusterError
from cluster.launch import launch
from cluster.options import EngineOptions, LaunchOptions, OptimizerOptions
from cluster.schedule import learning_rate

ALONE = toy_training.ALONE
A = toy_training.NUM_MICRO_BATCHES
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),  # DeepSpeed's own
]


def batches(step: int) -> list[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    return [(micro, toy_training.batch(step, micro)) for micro in range(A)]


@pytest.mark.parametrize("zero", [0, 1])
def test_steps_equal_plain_torch(zero: int) -> None:
    options = OptimizerOptions(lr=1e-2, warmup=0.2, clip_grad=0.5, weight_decay=0.1)
    plain, model = toy_training.build_model(), toy_training.build_model()
    for module in (plain, model):
        module[3].p = 0.0  # type: ignore[assignment]  # dropout's draws are the engine's business
    engine = Engine(
        model, optimizer=options, options=EngineOptions(precision="fp32", zero_stage=zero),  # type: ignore[arg-type]
        total_steps=6, num_micro_batches=A, worker=ALONE, no_weight_decay=["5.weight"],
    )  # fmt: skip
    decayed = [plain[0].weight]
    others = [parameter for parameter in plain.parameters() if parameter is not plain[0].weight]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], eps=options.eps)
    running_mean = torch.zeros(6)
    for step in range(6):
        result = engine.train_step(step, batches(step), toy_training.loss)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, 6, options)
        adam.zero_grad()
        losses, means = [], []
        for _, batch in batches(step):
            plain[1].reset_running_stats()
            plain[1].momentum = 1.0
            value = toy_training.loss(plain, batch)
            (value / A).backward()
            losses.append(float(value.detach()))
            means.append(plain[1].running_mean.clone())
        running_mean = 0.9 * running_mean + 0.1 * torch.stack(means).mean(0)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
        assert result.loss == pytest.approx(sum(losses) / A, rel=1e-6)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert norm > 0.5  # so that clipping was at work
    for name, value in plain.named_parameters():
        assert torch.allclose(torch.from_numpy(engine.state()[f"model.{name}"]), value, atol=2e-6), name
    assert torch.allclose(model[1].running_mean, running_mean, atol=1e-6)
    assert int(model[1].num_batches_tracked) == 6


def test_forwards_are_seeded_by_step_and_micro_batch() -> None:
    engine = toy_training.build_engine(ALONE, total_steps=9)
    drawn: list[float] = []

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        return toy_training.loss(model, batch)

    engine.train_step(0, batches(0), loss)
    engine.train_step(1, batches(1), loss)
    torch.rand(17)  # what happened before does not matter
    engine.train_step(0, batches(0), loss)
    assert len(set(drawn[: 2 * A])) == 2 * A
    assert drawn[2 * A :] == drawn[:A]


def test_batch_norm_blends_the_mean_of_all_micro_batches_once() -> None:
    generator = torch.Generator().manual_seed(0)
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3), untracked)
    model[2].eval()
    data = torch.randn(2, 5, 8, 3, generator=generator) * 2 + 1  # steps, micro-batches, samples, features
    statistics = BatchNormStatistics(model)
    for step in range(2):
        statistics.begin()
        for micro in range(5):
            model[0](data[step, micro])
            model[1](data[step, micro])
            statistics.add()
        statistics.finish(statistics.total / 5)
    means, variances = data.mean(2).mean(1), data.var(2).mean(1)  # per step: over samples, then over micro-batches
    assert torch.allclose(model[0].running_mean, 0.7 * 0.3 * means[0] + 0.3 * means[1], atol=1e-6)
    assert torch.allclose(model[0].running_var, 0.49 + 0.7 * 0.3 * variances[0] + 0.3 * variances[1], atol=1e-5)
    assert torch.allclose(model[1].running_mean, means.mean(0), atol=1e-6)  # momentum None: the average over steps
    assert torch.equal(model[2].running_mean, torch.zeros(3))  # in evaluation mode: left alone
    assert [int(model[index].num_batches_tracked) for index in range(3)] == [2, 2, 0]


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_names_the_step(zero: int, what: str) -> None:
    engine = toy_training.build_engine(ALONE, total_steps=9, zero=zero)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        value = toy_training.loss(model, batch)
        if what == "loss":
            return value * math.nan
        return value + (value - value.detach()).abs().sqrt()  # finite, with an infinite slope

    with pytest.raises(ClusterError, match=rf"{what}.* of step 7 is .*optimizer\.lr"):
        engine.train_step(7, batches(7), loss)


def test_micro_batches_must_come_in_order_and_whole() -> None:
    engine = toy_training.build_engine(ALONE, total_steps=9)
    with pytest.raises(ValueError, match="step 0: micro-batch 1 came as number 1"):
        engine.train_step(0, batches(0)[1:], toy_training.loss)
    with pytest.raises(ValueError, match="2 micro-batches came, expected 4"):
        toy_training.build_engine(ALONE, total_steps=9).train_step(0, batches(0)[:2], toy_training.loss)


def test_a_state_of_another_model_is_refused_by_name() -> None:
    engine = toy_training.build_engine(ALONE, total_steps=9)
    state = engine.state()
    with pytest.raises(CheckpointError, match=r"'model\.5\.bias' has shape None there, \(7,\) here"):
        engine.restore({name: value for name, value in state.items() if name != "model.5.bias"})
    with pytest.raises(CheckpointError, match=r"'model\.5\.bias' has shape \(6,\) there, \(7,\) here"):
        engine.restore({**state, "model.5.bias": state["model.5.bias"][:6]})
    with pytest.raises(CheckpointError, match=r"'model\.6\.bias' has shape \(7,\) there, None here"):
        engine.restore({**state, "model.6.bias": state["model.5.bias"]})


def test_frozen_parameters_are_saved_and_stay() -> None:
    for zero in (0, 1, 3):
        model = toy_training.build_model()
        model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
        engine = Engine(
            model, optimizer=OptimizerOptions(), options=EngineOptions(precision="fp32", zero_stage=zero),  # type: ignore[arg-type]
            total_steps=6, num_micro_batches=A, worker=ALONE,
        )  # fmt: skip
        before = engine.state()
        engine.train_step(0, batches(0), toy_training.loss)
        after = engine.state()
        assert (before["model.0.weight"] == after["model.0.weight"]).all()
        assert (before["model.5.weight"] != after["model.5.weight"]).any()
        assert "exp_avg.0.weight" not in after
        engine.restore(before)
        assert all((engine.state()[name] == before[name]).all() for name in before)


def test_bf16_is_autocast_over_fp32_parameters() -> None:
    engine = toy_training.build_engine(ALONE, total_steps=9, precision="bf16")
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits = model(batch[0])
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), batch[1])

    result = engine.train_step(1, batches(1), loss)
    exact = toy_training.build_engine(ALONE, total_steps=9).train_step(1, batches(1), toy_training.loss)
    assert set(seen) == {torch.bfloat16}
    assert result.loss == pytest.approx(exact.loss, rel=2e-2)
    assert {value.dtype.name for value in engine.state().values()} == {"float32", "int64"}
    assert toy_training.build_engine(ALONE, total_steps=9, precision="auto").precision in ("bf16", "fp32")


def test_every_pair_of_zero_stages_on_two_ranks(tmp_path: Path) -> None:
    launch(
        "toy_training:matrix",
        {"result": str(tmp_path / "result.json")},
        run_dir=tmp_path,
        num_micro_batches=A,
        options=LaunchOptions(launcher="local", workers=2, max_restarts=0, hang_timeout_s=120),
        on_event=lambda event: None,
    )
    assert json.loads((tmp_path / "result.json").read_text()) == []


def test_no_compiler_and_no_chatter_are_needed(tmp_path: Path) -> None:
    """On a PATH without any program, a step works and prints nothing."""
    code = (
        "import torch.distributed as dist, toy_training as toy\n"
        "from cluster.topology import Worker\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "worker = Worker(rank=0, world_size=1, local_rank=0, local_world_size=1, device='cpu', threads=1, attempt=1)\n"
        "for zero in (0, 3):\n"
        "    engine = toy.build_engine(worker, total_steps=2, zero=zero)\n"
        "    engine.train_step(0, [(m, toy.batch(0, m)) for m in range(4)], toy.loss)\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "HOME": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
