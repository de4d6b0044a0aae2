"""The report: true to the run folder, readable whatever is missing in it, and never a way in for what files contain."""

import html.parser
import json
import math
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.metrics import MetricsWriter, merge_steps, read_metrics
from jobs.accuracy import summarise
from jobs.charts import duration, short, ticks
from jobs.curves import MAX_BINS, read_history
from jobs.evaluate import to_text
from jobs.predictions import Prediction, records
from jobs.recipe import parse_overrides
from jobs.report import kills, render, write_report
from jobs.results import wilson
from jobs.run_folder import environment
from jobs.stops import stops
from pipeline.index import DatasetInfo, ShardInfo, index_schema, write_index

CLASSES = ["left", "right", "up"]
PARTS = ["recipe.yaml", "env.json", "metrics.jsonl", "eval.json", "dataset/dataset.json", "damage/rank-0.jsonl"]
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %}"
VOID = {"meta", "link", "br", "img"}


class Page(html.parser.HTMLParser):
    """Parses a page strictly enough for ours: what opens must close, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def write_steps(path: Path, attempts: Sequence[tuple[int, int, int, str | None]], *, step_s: float = 0.5, pause_s: float = 10.0) -> None:
    """Attempts (number, resumed at, last step, reason of its end) as training writes them, with made-up times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = 1.7e9
    with path.open("w", encoding="utf-8") as file:
        for number, start, last, reason in attempts:
            events: list[dict[str, Any]] = [{"event": "attempt", "step": start, "world_size": 2}]
            for step in range(start + 1, last + 1):
                facts = {
                    "loss": 2.0 / step + number,
                    "lr": 1e-3,
                    "grad_norm": 1.0,
                    "clips_per_s": 32.0,
                    "data_wait": 0.05,
                    "step_s": step_s,
                }
                events.append({"event": "step", "step": step, "epoch": step / 10, **facts})
            events += [{"event": "restart", "reason": reason}] if reason else []
            for event in events:
                now += step_s if event["event"] == "step" else 0.0
                file.write(json.dumps({"time": now, "attempt": number, **event}) + "\n")
            now += pause_s


def write_dataset(root: Path, classes: list[str]) -> None:
    root.mkdir(parents=True)
    num = 2 * len(classes)
    columns: dict[str, list[object]] = {field.name: [0] * num for field in index_schema(["split"])}
    columns |= {
        "key": [f"k{i}" for i in range(num)],
        "source": [f"k{i}.mp4" for i in range(num)],
        "group": [""] * num,
        "codec": ["h264"] * num,
    }
    columns |= {"label": [i % len(classes) for i in range(num)], "end": [40] * num, "fps": [20.0] * num, "width": [128] * num}
    columns |= {"height": [96] * num, "size": [1000] * num, "split:split": [i // len(classes) for i in range(num)]}
    sha256, size = write_index(root / "index.arrow", [pa.table(columns, schema=index_schema(["split"]))])
    shard = ShardInfo(file="shards/shard-000000.tar", size=4096, sha256="0", num_items=num)
    info = DatasetInfo(
        classes=classes,
        splits={"split": ["train", "val"]},
        num_items=num,
        num_quarantined=1,
        num_frames=40 * num,
        index_sha256=sha256,
        index_size=size,
        shards=[shard],
    )
    (root / "dataset.json").write_text(info.with_fingerprint().to_json())
    rejects = [{"path": "left/truncated.mp4", "reason": "truncated", "detail": "17 of 40 frames"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rejects), root / "quarantine.parquet")


def write_eval(path: Path, classes: list[str], confusion: list[list[int]], **more: object) -> None:
    """As the product writes it, of made-up videos whose predictions come to `confusion`."""
    predictions = [
        Prediction(key=f"k{i}-{j}-{n}", label=i, top=(j,), scores=(0.6,), truth_log=math.log(0.6 if i == j else 0.1))
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        for n in range(count)
    ]
    facts = {"schema": 2, "split": "val", "views": 1, "step": 30, "checkpoints": ["c"], "dataset_fingerprint": ""}
    path.write_text(to_text({**facts, **summarise(predictions, classes), "videos": records(predictions), **more}))


def write_run(run: Path, classes: list[str] = CLASSES, text: str = "") -> None:
    """A whole run: killed after step 17, resumed from 10, ended at 30. `text` is put wherever a file may hold other people's."""
    write_steps(run / "metrics.jsonl", [(1, 0, 17, f"Rank 1 was killed by SIGKILL{text}"), (2, 10, 30, None)])
    with MetricsWriter(run / "metrics.jsonl", 2) as metrics:
        metrics.write("checkpoint", step=30, seconds=0.1, bytes=7 << 20)
        metrics.write("end", step=30)
    write_dataset(run / "dataset", classes)
    confusion = [[6 if i == j else int((i, j) == (0, 1)) for j in range(len(classes))] for i in range(len(classes))]
    failed = [{"key": f"up/k9{text}", "reason": f"checksum{text}"}]
    baseline = {"name": f"single frames{text}", "top1": 0.25}
    write_eval(run / "eval.json", classes, confusion, num_failed=1, failed=failed, baseline=baseline)
    (run / "recipe.yaml").write_text(
        parse_overrides({"data": {"videos": f"/videos{text}"}, "train": {"steps": 30}}, [f"run.dir={run}"]).to_yaml()
    )
    (run / "env.json").write_text(json.dumps({**environment(), "cpu": f"a processor{text}"}))
    with MetricsWriter(run / "damage" / "rank-0.jsonl", 1) as damage:
        for position in (3, 9):
            damage.write("damage", position=position, key=f"left/k1{text}", shard="s.tar", reason="crc", substitute_key="k2")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_whole_run(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    for wanted in (
        "trained and evaluated",
        "94.7 %",  # 18 of 19
        "25 %",  # single frames
        "33.3 %",  # chance
        "Rank 1 was killed by SIGKILL",
        "7 steps",  # 11 to 17 are done again
        "3.5 s",  # seven of 0.5 s
        "left/k1",
        "2 times",
        "left/truncated.mp4",
        "17 of 40 frames",
        "posmlp-video",
        "global_batch",
        "train 3, val 3",
    ):
        assert wanted in page.text, wanted
    assert page.tags["svg"] == 7  # six curves and the reliability diagram
    assert page.tags["main"] == page.tags["h1"] == 1


def test_the_page_loads_nothing_and_runs_nothing(run: Path) -> None:
    text = render(run)
    page = Page(text)
    assert page.tags["script"] == page.tags["iframe"] == page.tags["img"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "action", "poster")]
    assert all(value.startswith(("#", "data:")) for _, name, value in page.attributes if name == "href")
    assert not re.search(r"(?i)https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_the_page_can_be_used_without_sight_and_on_paper(run: Path) -> None:
    text = render(run)
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = [value for _, name, value in page.attributes if name == "aria-labelledby"]
    referred += [value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert set(referred) <= set(ids)
    assert ("html", "lang", "en") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "width=device-width" in text


def test_what_files_contain_is_text(tmp_path: Path) -> None:
    write_run(tmp_path / "run", classes=[f"{name}{EVIL}" for name in CLASSES], text=EVIL)
    page = Page(render(tmp_path / "run"))
    assert page.tags["script"] == page.tags["img"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = " ".join(EVIL.split())
    for where in ("killed by SIGKILL", "up/k9", "single frames", "/videos", "a processor", "left/k1", "right"):
        assert f"{where}{shown}" in page.text, where


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part(run: Path, part: str) -> None:
    (run / part).unlink()
    page = Page(render(run))
    assert page.tags["h2"] == (6 if part == "eval.json" else 7)


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '{"event": "step"}\n{"event": "step", "step": "x", "loss": {}}', "\0\udcff", "null", '{"split": 3}']
)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part(run: Path, part: str, content: str) -> None:
    (run / part).write_bytes(content.encode("utf-8", "surrogateescape"))
    page = Page(render(run))
    if (
        part in ("recipe.yaml", "env.json", "eval.json", "dataset/dataset.json")
        and content not in ('{"split": 3}',)
        and "event" not in content
    ):
        assert "cannot be" in page.text


def test_an_empty_folder_and_a_run_that_still_trains(tmp_path: Path) -> None:
    assert "not trained yet" in Page(render(tmp_path)).text
    write_steps(tmp_path / "metrics.jsonl", [(1, 0, 9, None)])
    (tmp_path / "recipe.yaml").write_text(parse_overrides({"train": {"epochs": 3.0}}, [f"run.dir={tmp_path}"]).to_yaml())
    page = Page(render(tmp_path))
    assert "not finished: step 9, 30 % of the way" in page.text
    assert "Not evaluated yet" in page.text
    assert "Nothing interrupted this run" in page.text


def test_every_stop_and_its_cost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [(1, 0, 17, "rank 1 died"), (2, 10, 12, None), (3, 10, 10, "rank 0 died"), (4, 10, 20, None)])
    first, second, third = stops(read_history(path))
    assert (first.what, first.reached, first.resumed, first.redone, first.redone_s) == ("Rank 1 died", 17, 10, 7, 3.5)
    assert first.pause_s == pytest.approx(10.5)
    assert (second.what, second.reached, second.redone) == ("The run was stopped and started again", 12, 2)
    assert second.pause_s == pytest.approx(20.5)  # past an attempt that finished no step
    assert (third.what, third.reached, third.redone) == ("Rank 0 died", 10, 0)
    assert math.isnan(third.pause_s)
    assert kills(tmp_path)[0] == (
        "Rank 1 died after step 17: resumed from step 10, 7 steps (3.5 s of work) done again, 10 s from its last step to the next"
    )


def test_a_kill_not_yet_made_good(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", [(1, 0, 17, "rank 1 died"), (2, 10, 13, None)])
    assert "3 steps (1.5 s of work) done again, 4 steps to do again" in kills(tmp_path)[0]


@given(starts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_curves_are_the_merged_steps(tmp_path_factory: pytest.TempPathFactory, starts: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    reached, attempts = 0, []
    for number, (start, length) in enumerate(starts, 1):
        begin = min(start, reached)
        attempts.append((number, begin, begin + length, None))
        reached = max(reached, begin + length)
    write_steps(path, attempts)
    history, merged = read_history(path), merge_steps(read_metrics(path))
    assert history.curves["loss"].x == [event["step"] for event in merged]
    assert history.curves["loss"].mean == [event["loss"] for event in merged]
    assert history.last_step == merged[-1]["step"]
    all_steps = sum(last - begin for _, begin, last, _ in attempts)
    assert sum(attempt.redone for attempt in history.attempts) == all_steps - len(merged)
    assert history.busy_s == pytest.approx(0.5 * len(merged))


def test_a_long_run_stays_small_and_keeps_its_outliers(tmp_path: Path) -> None:
    num = 50_000
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, num + 1):
            loss = 55.5 if step == 31_337 else -7.5 if step == 44_444 else 1.0
            file.write(
                f'{{"event": "step", "time": {1.7e9 + step}, "attempt": 1, "step": {step}, "loss": {loss}, "step_s": 1.0, "epoch": 1.0}}\n'
            )
    tracemalloc.start()
    text = render(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    curve = read_history(tmp_path / "metrics.jsonl").curves["loss"]
    assert (max(curve.high), min(curve.low), len(curve.x)) == (55.5, -7.5, MAX_BINS)
    assert "55.5" in text
    assert len(text) < 400_000
    assert peak < 16 << 20  # the events alone would be 50 MB


def test_losses_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl", 1) as metrics:
        for step in range(1, 5):
            metrics.write("step", step=step, loss=math.nan if step == 3 else 1.0, epoch=1.0, step_s=1.0)
    assert "of 1 step(s) was no finite number" in Page(render(tmp_path)).text
    assert read_history(tmp_path / "metrics.jsonl").curves["loss"].x == [1, 2, 4]


@pytest.mark.parametrize(("num", "matrix"), [(2, True), (40, True), (41, False), (400, False)])
def test_many_classes_become_pairs(tmp_path: Path, num: int, matrix: bool) -> None:
    names = [f"class {i}" for i in range(num)]
    confusion = [[9 if i == j else 0 for j in range(num)] for i in range(num)]
    confusion[0][1] = 3
    write_eval(tmp_path / "eval.json", names, confusion)
    page = Page(render(tmp_path))
    assert ("rows are the truth" in page.text) == matrix
    assert ("Most often confused" in page.text) != matrix
    assert matrix or "class 0 class 1 3 25 %" in page.text
    bars = page.text[page.text.index("worst first") :]
    assert bars.index("75 %") < bars.index("100 %")


def test_the_report_is_replaced_as_a_whole(run: Path) -> None:
    (run / "report.html").write_text("old")
    write_report(run)
    assert (run / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert not list(run.glob(".report*"))


def test_notes_on_what_does_not_fit(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')
    result = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps({**result, "step": 20, "dataset_fingerprint": "other"}))
    text = Page(render(run)).text
    assert "1 torn line" in text
    assert "The evaluation is of step 20, training has reached step 30" in text
    assert "of another dataset" in text


def test_intervals_and_texts() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)  # a textbook value
    assert wilson(1.0, 28)[1] == 1.0
    assert [short(value) for value in (0, 4.2e-4, 0.0123, 12.345, 1234, 12345, 999_999, -3.5)] == [
        "0", "4.2e-4", "0.0123", "12.3", "1234", "12.3k", "1M", "-3.5"
    ]  # fmt: skip
    assert [duration(value) for value in (0, 8.24, 75, 200, 7300, 90_000)] == [
        "0 s",
        "8.2 s",
        "75 s",
        "3 min 20 s",
        "2 h 2 min",
        "1 days 1 h",
    ]


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.integers(3, 6))
def test_ticks_enclose_their_values(low: float, span: float, num: int) -> None:
    values = ticks(low, low + span, num)
    slack = 1e-6 * max(abs(low), span, 1.0)
    assert values[0] <= low + slack
    assert values[-1] >= low + span - slack
    assert values == sorted(set(values))
    assert 2 <= len(values) <= num + 3
