"""Events survive kills, and replayed steps do not show."""

import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cluster.metrics import MetricsWriter, merge_steps, read_metrics


def test_events_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    assert read_metrics(path) == []
    with MetricsWriter(path, 3) as metrics:
        metrics.write("step", step=1, loss=0.5, name="Ü", nested={"rate": [1.0, math.inf]}, nothing=math.nan)
        assert len(read_metrics(path)) == 1  # visible at once
        metrics.write("end")
    first, last = read_metrics(path)
    assert (first["event"], first["attempt"], first["name"], first["nested"]) == ("step", 3, "Ü", {"rate": [1.0, None]})
    assert first["nothing"] is None
    assert last["event"] == "end"


def test_a_line_torn_anywhere_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, 1) as metrics:
        metrics.write("step", step=0)
        metrics.write("step", step=1, name="größer")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        assert [event["step"] for event in read_metrics(path)] in ([0], [0, 1])  # the newline alone may be missing
        with MetricsWriter(path, 2) as metrics:
            metrics.write("step", step=2)
        assert [event["step"] for event in read_metrics(path)] in ([0, 2], [0, 1, 2])
        assert path.read_bytes().endswith(b"\n")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 99)), max_size=40))
def test_the_newest_attempt_wins(rows: list[tuple[int, int, int]]) -> None:
    events: list[dict[str, object]] = [{"event": "step", "step": step, "attempt": attempt, "loss": loss} for step, attempt, loss in rows]
    merged = merge_steps([*events, {"event": "checkpoint", "step": 1, "attempt": 9}])
    assert [event["step"] for event in merged] == sorted({step for step, _, _ in rows})
    for event in merged:
        same = [(attempt, loss) for step, attempt, loss in rows if step == event["step"]]
        newest = max(attempt for attempt, _ in same)
        assert (event["attempt"], event["loss"]) == (newest, [loss for attempt, loss in same if attempt == newest][-1])


def test_other_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\nnot json\n{"no": "event"}\n' + json.dumps({"event": "end"}) + "\n")
    assert read_metrics(path) == [{"event": "end"}]
