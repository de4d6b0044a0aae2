"""What is not in a dataset: counts first, every video with its reason, for people and for programs."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from jobs import quarantine_list
from jobs.cli import posmlp
from pipeline.errors import DatasetError
from pipeline.quarantine import Reason


def test_every_video_is_listed_with_its_reason(motion_dataset: Path) -> None:
    found = json.loads(CliRunner().invoke(posmlp, ["data", "quarantine", str(motion_dataset), "--json"], catch_exceptions=False).output)
    assert found["num"] == len(found["videos"]) == sum(cause["num"] for cause in found["reasons"]) == 1
    cause, video = found["reasons"][0], found["videos"][0]
    assert video["reason"] == cause["reason"]
    assert cause["text"] == Reason(cause["reason"]).text
    shown = CliRunner().invoke(posmlp, ["data", "quarantine", str(motion_dataset)], catch_exceptions=False).output
    assert shown.index(cause["reason"]) < shown.index(video["path"])


def test_counts_come_in_order_and_an_unknown_reason_keeps_its_text() -> None:
    rows = [("truncated", "an older text")] * 2 + [("from_the_future", "stored text")] * 3 + [("no_frames", "x")] * 2
    table = pa.table({"reason": [reason for reason, _ in rows], "explanation": [text for _, text in rows]})
    causes = quarantine_list.causes(table)
    assert [(cause.reason, cause.num) for cause in causes] == [("from_the_future", 3), ("no_frames", 2), ("truncated", 2)]
    assert [cause.text for cause in causes] == ["stored text", Reason.NO_FRAMES.text, Reason.TRUNCATED.text]


def test_what_is_wanted_of_a_video_is_shown() -> None:
    assert quarantine_list.window({"start_s": None, "end_s": None}) == ""
    assert quarantine_list.window({"start_s": 1.5, "end_s": None}) == " [1.5 s to the end]"


def test_without_a_dataset_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no dataset"):
        quarantine_list.run(tmp_path)


def test_every_reason_is_documented() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    part = page.partition("### Reasons in the quarantine list")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", part, flags=re.MULTILINE))
    assert listed == {reason.value: reason.text for reason in Reason}
