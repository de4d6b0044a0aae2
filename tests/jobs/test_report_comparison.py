"""The comparison: counts by hand, chances from a textbook, and what can and cannot be set side by side."""

import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import comparison
from jobs.errors import JobError
from jobs.results import read_evaluation, sign_test, worst_videos
from tests.jobs.test_report import EVIL, Page, write_run
from tests.jobs.test_train import posmlp

CLASSES = ["left", "right", "up"]


def relabel(run: Path, predictions: dict[int, int], **facts: object) -> None:
    """Changes what the run's evaluation predicts for some of its videos, by place."""
    path = run / "eval.json"
    result = json.loads(path.read_text())
    for place, predicted in predictions.items():
        result["videos"][place]["top"] = [predicted]
    path.write_text(json.dumps({**result, **facts}))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs, judged on 19 videos; the second has videos 0 and 1 wrong, and 6 right, which the first takes for another class."""
    write_run(tmp_path / "a" / "run", CLASSES)
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a" / "run", tmp_path / name / "run")
    first = read_evaluation(tmp_path / "a" / "run" / "eval.json")
    assert [place for place, video in enumerate(first.videos) if not video.right] == [6]
    relabel(tmp_path / "b" / "run", {0: 1, 1: 2, 6: 0})
    text = (tmp_path / "b" / "run" / "recipe.yaml").read_text()
    (tmp_path / "b" / "run" / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 7", 1))
    return [tmp_path / name / "run" for name in ("a", "b", "c")]


def test_counts_by_hand(runs: list[Path]) -> None:
    first, second, third = (read_evaluation(run / "eval.json") for run in runs)
    pair = comparison.paired(first, second, 1)
    assert (pair.both, pair.first_only, pair.other_only, pair.neither) == (16, 2, 1, 0)
    assert pair.gain == pytest.approx(-1 / 19)
    assert pair.chance == 1.0
    rows = {row.name: row for row in comparison.class_rows([first, second, third])}
    assert rows["left"].num == 7
    assert rows["left"].recalls == [6 / 7, 5 / 7, 6 / 7]
    assert rows["left"].against == [(pytest.approx(-1 / 7), 2, 1), (0.0, 0, 0)]
    assert comparison.class_rows([first, second])[0].name == "left"


@pytest.mark.parametrize(
    ("first", "second", "chance"),
    [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (1, 7, 18 / 256), (8, 3, 2 * (1 + 11 + 55 + 165) / 2048), (0, 10, 2 / 1024)],
)
def test_the_sign_test(first: int, second: int, chance: float) -> None:
    assert sign_test(first, second) == pytest.approx(chance)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_the_sign_test_is_a_probability(first: int, second: int) -> None:
    assert 0 <= sign_test(first, second) <= 1
    assert sign_test(first, second) == sign_test(second, first)


def test_the_page(runs: list[Path]) -> None:
    page = Page(comparison.render(runs))
    for wanted in (
        "a/run against 2 other runs",
        "b/run: -5.3 points",
        "Only a/run has 2 right, only b/run 1",
        "c/run: +0.0 points",
        "They differ on no video",
        "McNemar",
        "run.seed 0 7 0",
        "94.7 %",
    ):
        assert wanted in page.text, wanted
    assert page.tags["script"] == 0
    assert page.tags["svg"] == 4


def test_what_files_contain_is_text(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, [f"{name}{EVIL}" for name in CLASSES], text=EVIL)
    page = Page(comparison.render([tmp_path / "a", tmp_path / "b"]))
    assert page.tags["script"] == page.tags["img"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_runs_that_judged_other_videos_are_not_paired(runs: list[Path]) -> None:
    result = json.loads((runs[1] / "eval.json").read_text())
    result["videos"][0]["key"] = "another"
    (runs[1] / "eval.json").write_text(json.dumps(result))
    text = Page(comparison.render(runs[:2])).text
    assert "not all judged on the same videos" in text
    assert "McNemar" not in text
    relabel(runs[1], {}, eval={"clips": 4}, views=4)
    assert "judged in different views" in Page(comparison.render(runs[:2])).text


@pytest.mark.parametrize("part", ["eval.json", "metrics.jsonl", "dataset/dataset.json"])
@pytest.mark.parametrize("content", [None, "", "[1]", '{"schema": 1}'])
def test_a_missing_or_damaged_part(runs: list[Path], part: str, content: str | None) -> None:
    (runs[1] / part).unlink() if content is None else (runs[1] / part).write_text(content)
    page = Page(comparison.render(runs[:2]))
    assert ("not evaluated yet" in page.text or "cannot be shown" in page.text) == (part == "eval.json")


def test_names_tell_runs_apart(runs: list[Path]) -> None:
    shutil.copy(runs[0] / "eval.json", runs[0] / "eval-clips4.json")
    assert comparison.names(runs[:2]) == ["a/run", "b/run"]
    assert comparison.names([runs[0], runs[0] / "eval-clips4.json"]) == ["run", "run · clips4"]
    assert comparison.names([runs[0], runs[0]]) == ["run", "run"]


def test_what_is_no_run(runs: list[Path], tmp_path: Path) -> None:
    for sources in ([runs[0], tmp_path], [runs[0], runs[0] / "eval-clips4.json"], [runs[0]] * 9):
        with pytest.raises(JobError):
            comparison.write_comparison(sources, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    done = posmlp("report", str(runs[0]))
    assert (done.returncode, done.stdout) == (0, f"report: {runs[0] / 'report.html'}\n"), done.stderr
    done = posmlp("report", *map(str, runs), "--out", str(tmp_path / "all" / "page.html"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "all" / "page.html").is_file()
    done = posmlp("report", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'nothing'} is not a run folder")
    assert not (tmp_path / "nothing").exists()


def test_worst_mistakes_come_first(runs: list[Path]) -> None:
    evaluation = read_evaluation(runs[1] / "eval.json")
    scores = {0: 0.4, 1: 0.9, 2: 0.35, 3: 0.99}
    for place, score in scores.items():
        evaluation.videos[place].scores[0] = score
    order = worst_videos(evaluation)
    assert order[:2] == [1, 0]  # both wrong
    assert order[2] == 2  # right, by the narrowest margin
    assert order[-1] == 3
    assert math.isclose(len(order), 19)
