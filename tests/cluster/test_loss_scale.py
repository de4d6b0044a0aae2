"""fp16: losses are scaled without a trace where nothing overflows, and the scale finds itself where something does."""

import math

import pytest
import torch
import toy_training
from torch import nn

from cluster.engine import Engine, autocast
from cluster.errors import ClusterError
from cluster.loss_scale import GROWTH, LossScale
from cluster.options import EngineOptions

ALONE = toy_training.ALONE
A = toy_training.NUM_MICRO_BATCHES
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),  # DeepSpeed's own
]


def step(engine: Engine, number: int, factor: float = 1.0) -> object:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        value = toy_training.loss(model, batch)
        return value + (factor - 1.0) * (value - value.detach())  # the same loss with `factor` times the gradient

    return engine.train_step(number, [(micro, toy_training.batch(number, micro)) for micro in range(A)], loss)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_scaling_by_powers_of_two_changes_no_bit(zero: int) -> None:
    """On a CPU, where fp16 itself is refused, the scale is put into an engine of float32."""
    plain, scaled = (toy_training.build_engine(ALONE, total_steps=9, zero=zero) for _ in range(2))
    scaled._scale = LossScale()
    for number in range(3):
        first, second = step(plain, number), step(scaled, number)
        assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)  # type: ignore[attr-defined]
    expected, found = plain.state(), scaled.state()
    assert found.pop("optimizer.scale").tolist() == [65536.0, 3.0, 0.0]
    assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)
    assert expected.keys() == found.keys()


@pytest.mark.parametrize("zero", [0, 2])
def test_an_overflow_halves_the_scale_and_is_no_bad_step(zero: int) -> None:
    engine = toy_training.build_engine(ALONE, total_steps=9, zero=zero)
    engine._scale = LossScale()
    before = engine.state()
    result = step(engine, 1, 1e36)  # times 65536 it is more than float32 holds
    assert "overflows fp16" in str(result.skipped)  # type: ignore[attr-defined]
    state = engine.state()
    assert state["optimizer.scale"].tolist() == [32768.0, 0.0, 1.0]
    assert all((before[name] == state[name]).all() for name in before if name != "optimizer.scale")
    assert step(engine, 2).skipped is None  # type: ignore[attr-defined]
    again = toy_training.build_engine(ALONE, total_steps=9, zero=zero)
    again._scale = LossScale()
    again.restore(engine.state())
    assert (again._scale.value, again._scale.good, again._scale.overflows) == (32768.0, 1, 1)
    with pytest.raises(ClusterError, match="loss of step 3 is nan"):  # a bad loss is no overflow
        step(engine, 3, math.nan)


def test_the_scale_grows_after_good_steps_and_stays_in_bounds() -> None:
    scale = LossScale()
    for _ in range(GROWTH):
        scale.applied()
    assert (scale.value, scale.good) == (2.0**17, 0)
    for _ in range(40):
        scale.overflowed()
    assert (scale.value, scale.may_shrink) == (1.0, False)
    for _ in range(40 * GROWTH):
        scale.applied()
    assert scale.value == 2.0**24


def test_fp16_on_a_cpu_is_refused_and_judged_in_float32() -> None:
    with pytest.raises(ClusterError, match=r"engine\.precision: got fp16, which is for GPUs.*Set engine\.precision=bf16 or fp32"):
        toy_training.build_engine(ALONE, total_steps=9, precision="fp16")
    with autocast(EngineOptions(precision="fp16"), "cpu"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
