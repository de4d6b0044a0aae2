"""Which checkpoints stay, decided from names and scores alone: the same here and in a mirror. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What decides whether a checkpoint stays. name: of its folder. number: of the save. score: None where it was not judged."""

    name: str
    step: int
    number: int
    score: Sequence[float] | None


def best_of(saved: Iterable[Saved]) -> str | None:
    """The name of the one with the greatest score, of equal ones the first saved; None where none was judged."""
    ranked = [(list(one.score), -one.number, one.name) for one in saved if one.score is not None]
    return max(ranked, default=([], 0, None))[2]


def kept(saved: Iterable[Saved], keep: int, keep_every: int) -> set[str]:
    """Names of those that stay: the newest `keep`, of each multiple of `keep_every` steps (unless 0) the last save, the best one."""
    ordered = sorted(saved, key=lambda one: one.number)
    regular = {one.step: one.name for one in ordered if keep_every and one.step % keep_every == 0}
    best = best_of(ordered)
    return {*(one.name for one in ordered[-keep:]), *regular.values(), *([best] if best else [])}
