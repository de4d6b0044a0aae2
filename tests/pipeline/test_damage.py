"""A seeded sample of the damage matrix: what is damaged is refused or right, never silently another picture, wherever that can be known."""

from pathlib import Path

from tests.soak_damage import DAMAGES, SOURCES, form_matrix, shard_matrix, source_matrix


def test_damage_in_the_source(tmp_path: Path) -> None:
    found = source_matrix(range(1), tmp_path)
    assert found.keys() == {(video, damage) for video in SOURCES for damage in DAMAGES}
    for (video, damage), counts in found.items():
        if damage in ("cut at 10 %", "cut at 50 %") and video == "H.264 in MP4":  # it lists where its frames lie
            assert all(name.startswith("refused") for name in counts), (video, damage, counts)
        assert sum(counts.values()) == 1


def test_what_is_only_odd(tmp_path: Path) -> None:
    for name, (got, expected) in form_matrix(tmp_path).items():
        assert got.startswith(expected), (name, got, expected)


def test_damage_in_the_shard(tmp_path: Path) -> None:
    for damage, counts in shard_matrix(range(1), tmp_path).items():
        assert counts["altered"] == 0, (damage, counts)
        assert counts["not seen by validate"] == 0, damage
