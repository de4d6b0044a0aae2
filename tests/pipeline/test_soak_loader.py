"""Promise 5 at the loader, a seeded sample of `tests.pipeline.soak_loader`: killed and resumed twice, at any world sizes, nothing differs.

And the harness itself: it sees what it is there to see.
"""

from itertools import pairwise
from pathlib import Path

import pytest

from tests.pipeline.soak_loader import AUGMENTS, MICROS, PLAIN, WORLD_SIZES, Stream, check_whole, damaged_copy, plan, soak_dropped

STEPS = 14


@pytest.fixture(scope="module")
def streams(motion_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stream]:
    root = damaged_copy(motion_dataset, tmp_path_factory.mktemp("soak") / "damaged")
    return {augment: Stream(root, augment, steps=STEPS) for augment in AUGMENTS}


@pytest.mark.parametrize("seed", [1, 10])  # crop and flip; all augmentations
def test_killed_and_resumed_twice(streams: dict[str, Stream], seed: int) -> None:
    entry = soak_dropped(streams, seed)
    kills = entry["kills"]
    assert isinstance(kills, list)
    assert sorted(killed for killed, _ in kills) == sorted(WORLD_SIZES * 2)
    assert any(record[5] for record in streams[PLAIN].reference.values())


def test_plans_kill_and_resume_at_every_world_size() -> None:
    kills = {(one.world_size, other.world_size) for seed in range(20) for _, lives in plan(seed) for one, other in pairwise(lives)}
    assert kills == {(one, other) for one in WORLD_SIZES for other in WORLD_SIZES}


def test_what_is_lost_or_repeated_or_another_is_seen(streams: dict[str, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = streams[PLAIN]
    whole = [(step, micro) for step in range(2, 5) for micro in range(MICROS)]
    check_whole(stream, whole, 2, 5, "all")
    with pytest.raises(AssertionError, match="lost"):
        check_whole(stream, whole[:-1], 2, 5, "one short")
    with pytest.raises(AssertionError, match="repeated"):
        check_whole(stream, [*whole, whole[3]], 2, 5, "one twice")
    with pytest.raises(AssertionError, match="of no kept step"):
        check_whole(stream, [*whole, (5, 0)], 2, 5, "one too many")
    loader = Stream.loader
    monkeypatch.setattr(Stream, "loader", lambda self, rank, size, start, **more: loader(self, rank, size, start + (start > 0), **more))
    with pytest.raises(AssertionError, match="expected"):  # a loader that skips a step when it goes on
        soak_dropped(streams, 1)
