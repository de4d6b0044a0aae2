"""Only deaths without progress count, and the pauses between them grow. Real gangs: test_launch.py."""

from cluster.restarts import MAX_DELAY_S, Restarts, no_progress


def test_progress_gives_the_budget_back() -> None:
    reached = 0
    restarts = Restarts(2, lambda: reached)
    assert [restarts.delay_s(), restarts.delay_s()] == [0.0, 1.0]
    reached = 10
    assert [restarts.delay_s() for _ in range(3)] == [0.0, 1.0, None]
    assert "died 3 times without getting further, more often than launch.max_restarts=2" in restarts.verdict()


def test_pauses_double_up_to_a_bound() -> None:
    restarts = Restarts(99, no_progress)
    assert [restarts.delay_s() for _ in range(9)] == [0, 1, 2, 4, 8, 16, 32, MAX_DELAY_S, MAX_DELAY_S]


def test_none_are_allowed_with_a_budget_of_none() -> None:
    assert Restarts(0, no_progress).delay_s() is None
