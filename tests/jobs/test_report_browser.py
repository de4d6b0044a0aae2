"""The report and the comparison as a browser shows them: nothing broken, nothing asked of anyone, readable on a desk and on a phone."""

import json
import random
import shutil
from pathlib import Path

import pytest

from jobs import comparison, evaluate, report
from jobs.recipe import parse_overrides
from pipeline.index import Dataset
from tests.jobs.browser import Findings, find_browser, open_page
from tests.jobs.test_report import write_steps

WIDTHS = (1280, 400)
LEAST_PX = 9.5  # of any text, charts included


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> list[Path]:
    """Three runs on one dataset with real videos, judged as it were by models of different skill; one was killed and resumed."""
    dataset = Dataset.open(motion_dataset)
    rows = [int(row) for row in dataset.rows("split", "val")]
    folders = []
    for skill, name in ((0.3, "first"), (0.6, "a-run-whose-name-is-long-enough-to-be-in-the-way-of-things"), (0.9, "third")):
        run = tmp_path_factory.mktemp("runs") / name
        run.mkdir()
        write_steps(run / "metrics.jsonl", [(1, 0, 170, "rank 1 was killed"), (2, 150, 300, None)])
        overrides = [f"run.dir={run}", f"data.dir={motion_dataset}", f"optimizer.lr={skill}"]
        (run / "recipe.yaml").write_text(parse_overrides({}, overrides).to_yaml())
        (run / "env.json").write_text(json.dumps({"python": "3.11", "libraries": {"torch": "2"}}))
        judge(run, dataset, rows, skill)
        folders.append(run)
    return folders


def judge(run: Path, dataset: Dataset, rows: list[int], skill: float) -> None:
    """Writes `eval.json` by the product's own merging and figures, from made-up logits."""
    import numpy as np

    from jobs.accuracy import summarise
    from jobs.predictions import ViewOutput, merge, records, write_part
    from jobs.recipe import EvalSection

    draw = random.Random(skill)
    outputs = []
    for position, row in enumerate(rows):
        item = dataset.item(row)
        logits = np.array([draw.gauss(0, 1) for _ in dataset.info.classes], dtype=np.float32)
        logits[item.label] += 3 * (draw.random() < skill)
        outputs.append(ViewOutput(position=position, key=item.key, label=item.label, logits=logits, failed=None))
    parts = run / "parts"
    parts.mkdir()
    write_part(parts, 0, outputs)
    merged = merge(parts, [output.key for output in outputs], num_views=1, fusion="sum_logits")
    shutil.rmtree(parts)
    facts = {"schema": 2, "split": "val", "step": 300, "checkpoints": ["c"], "dataset_fingerprint": dataset.info.fingerprint, "views": 1}
    figures = {**summarise(merged, dataset.info.classes), "videos": records(merged), "eval": EvalSection().model_dump()}
    (run / "eval.json").write_text(evaluate.to_text({**facts, **figures}))


def assert_fine(found: Findings, *, videos: int) -> None:
    assert found.foreign == []
    assert found.violations == []
    assert [frame["width"] for frame in found.frames] == list(WIDTHS)
    for frame in found.frames:
        assert frame["content"] == frame["room"], "the page must not scroll sideways"
        assert frame["outside"] == []
        assert float(str(frame["smallest"])) >= LEAST_PX
        assert frame["videos"] == videos
        assert frame["broken"] == []
        assert frame["playing"] == videos


def test_the_report(runs: list[Path], browser: str) -> None:
    found = open_page(report.write_report(runs[0], num_videos=4).read_text(), WIDTHS, browser)
    assert_fine(found, videos=4)
    assert found.frames[0]["title"] == "first · PosMLP-Video run report"


@pytest.mark.parametrize("num", [2, 3])
def test_the_comparison(runs: list[Path], browser: str, num: int, tmp_path: Path) -> None:
    path = comparison.write_comparison(runs[:num], tmp_path / "comparison.html", num_videos=2)
    assert_fine(open_page(path.read_text(), WIDTHS, browser), videos=2)


def test_a_run_with_nothing_in_it(tmp_path: Path, browser: str) -> None:
    assert_fine(open_page(report.render(tmp_path), WIDTHS, browser), videos=0)


def test_what_is_wrong_is_found(browser: str) -> None:
    """The measure itself: a page with every fault that the tests above must not meet."""
    wide = "<p style='width:700px'>too wide</p><p style='font-size:6px'>small</p>"
    page = f"""<!doctype html><title>bad</title><body style="margin:0"><main>{wide}<script>document.title = "ran"</script>
    <img src="http://example.invalid/a.png"><video src="data:video/mp4;base64,AAAA" muted autoplay></video></main>"""
    found = open_page(page, WIDTHS, browser, violations=4)
    assert any("example.invalid" in request for request in found.foreign)
    assert any(violation.startswith("script-src") for violation in found.violations)
    assert any(violation.startswith("img-src") for violation in found.violations)
    desk, phone = found.frames
    assert desk["content"] == desk["room"]
    assert int(str(phone["content"])) >= 700
    assert phone["outside"] == ["too wide"]
    assert phone["smallest"] == 6
    assert len(phone["broken"]) == 1  # type: ignore[arg-type]
