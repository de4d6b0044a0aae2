"""The learning rate is a pure function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.options import OptimizerOptions
from cluster.schedule import learning_rate


def test_warm_up_peak_and_end() -> None:
    options = OptimizerOptions(lr=1.0, warmup=0.1, warmup_lr=0.1, min_lr=0.01)
    assert learning_rate(0, 100, options) == pytest.approx(0.1)
    assert learning_rate(5, 100, options) == pytest.approx(0.55)
    assert learning_rate(10, 100, options) == pytest.approx(1.0)
    assert learning_rate(55, 100, options) == pytest.approx(0.505)  # the middle of the cosine
    assert learning_rate(99, 100, options) == pytest.approx(0.01, abs=1e-3)


@given(st.integers(1, 500), st.floats(0, 1))
def test_it_rises_then_falls_within_its_bounds(total: int, warmup: float) -> None:
    options = OptimizerOptions(lr=1e-3, warmup=warmup, warmup_lr=1e-5, min_lr=1e-6)
    rates = [learning_rate(step, total, options) for step in range(total)]
    warm = round(warmup * total)
    assert all(1e-6 <= rate <= 1e-3 for rate in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)


@pytest.mark.parametrize("step", [-1, 10])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match="0 to 9"):
        learning_rate(step, 10, OptimizerOptions())


def test_steps_at_milestones() -> None:
    options = OptimizerOptions(lr=1.0, warmup=0.0, min_lr=0.05, schedule="step", milestones=(0.3, 0.6, 0.9), gamma=0.3)
    rates = [learning_rate(step, 10, options) for step in range(10)]
    assert rates == pytest.approx([1.0] * 3 + [0.3] * 3 + [0.09] * 3 + [0.05])


def test_warm_up_stable_decay() -> None:
    options = OptimizerOptions(lr=1.0, warmup=0.2, warmup_lr=0.0, min_lr=0.2, schedule="wsd", cooldown=0.4)
    rates = [learning_rate(step, 10, options) for step in range(10)]
    assert rates == pytest.approx([0.0, 0.5] + [1.0] * 4 + [1.0, 0.8, 0.6, 0.4])


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["cosine", "step", "wsd"]))
def test_every_schedule_stays_within_its_bounds(total: int, warmup: float, cooldown: float, schedule: str) -> None:
    options = OptimizerOptions(lr=1e-3, warmup=warmup, min_lr=1e-6, cooldown=cooldown, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(step, total, options) for step in range(total)]
    warm = round(warmup * total)
    assert all(1e-6 <= rate <= 1e-3 for rate in rates)
    assert rates[warm:] == sorted(rates[warm:], reverse=True)


@pytest.mark.parametrize(
    "bad",
    [{"milestones": (0.5, 0.2)}, {"milestones": (0.0,)}, {"gamma": 0.0}, {"cooldown": 1.5}, {"layer_decay": 0.0}, {"ema": 1.0},
     {"max_skipped": -1}, {"max_spike": 0.5}],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerOptions(**bad)  # type: ignore[arg-type]
