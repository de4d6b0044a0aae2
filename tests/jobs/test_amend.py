"""data exclude and data relabel: what a dataset's owner says of its items holds everywhere, without touching a byte of what was built."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs import amend, data_card, diff, info, validate
from jobs.cli import posmlp
from jobs.errors import JobError
from jobs.view_items import Filter, Items
from jobs.view_pages import DatasetPages
from pipeline.errors import DatasetError, PipelineError
from pipeline.index import Dataset
from pipeline.overlay import FOLDER, Kind


@pytest.fixture
def root(motion_dataset: Path, tmp_path: Path) -> Path:
    shutil.copytree(motion_dataset, tmp_path / "dataset")
    return tmp_path / "dataset"


def posmlp_data(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(posmlp, ["data", *map(str, arguments)], input=stdin)


def built_files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file() and FOLDER not in path.parts and path.name[0] != "."}


def test_everything_knows_what_was_changed(motion_dataset: Path, root: Path) -> None:
    before, built = built_files(root), Dataset.open(root)
    out, other = built.text("key", 2), built.text("key", 5)
    was, new = (built.info.classes[label] for label in (built.item(5).label, (built.item(5).label + 1) % len(built.info.classes)))
    assert posmlp_data("exclude", root, out, "--reason", "two people <b>").exit_code == 0
    assert posmlp_data("relabel", root, f"{other}={new}").exit_code == 0

    assert built_files(root) == before
    dataset = Dataset.open(root)
    assert dataset.num_kept == len(built) - 1
    assert dataset.info.classes[dataset.item(5).label] == new
    assert validate.run(root) == []

    card = info.run(root)
    assert (card["items"], card["left_out"], card["relabelled"]) == (len(built) - 1, 1, 1)
    assert sum(card["classes"].values()) == len(built) - 1  # type: ignore[attr-defined]
    assert sum(card["splits"]["split"].values()) == len(built) - 1  # type: ignore[index]
    shown = posmlp_data("info", root).output
    assert "two people <b>" in shown.replace("\n", " ") or "two people" in shown

    found = diff.run(motion_dataset, root)
    items = found["items"]
    assert isinstance(items, dict)
    assert items["only_a"]["keys"] == [out]
    assert (items["label"]["keys"], items["label"]["values"]) == ([other], [[was, new]])
    assert posmlp_data("diff", motion_dataset, root).exit_code == 3
    assert posmlp_data("diff", root, root).exit_code == 0

    page = data_card.render(root)
    assert "two people &lt;b&gt;" in page
    assert dataset.info.fingerprint in page


def test_the_viewer_shows_and_filters_them(root: Path) -> None:
    built = Dataset.open(root)
    split = built.info.splits["split"].index("train")
    row = int(built.rows("split", "train")[0])
    other = int(built.rows("split", "val")[0])
    amend.exclude(root, [built.text("key", row)], "blurred")
    amend.relabel(root, {built.text("key", other): built.info.classes[built.item(other).label - 1]})
    items = Items(root)
    try:
        assert items.page(Filter(overlay="exclude"), 0) == (1, [row])
        assert items.page(Filter(overlay="relabel"), 0) == (1, [other])
        assert row not in items.page(Filter(split=("split", split)), 0)[1]
        assert items.row(row).changed.startswith("left out: blurred (overlays/000001-exclude-")
        assert items.row(other).changed.startswith(f"built as {built.info.classes[built.item(other).label]}")
        assert items.row(other).label == built.info.classes[built.item(other).label - 1]
        pages = DatasetPages(items, None, "name")
        assert "left out: blurred" in pages.answer("/", {"overlay": "exclude"}).body.decode()
        assert pages.answer("/", {"overlay": "other"}).status == 400
    finally:
        items.close()


def test_undo_takes_the_newest_of_its_kind_back(root: Path) -> None:
    keys = [Dataset.open(root).text("key", row) for row in range(4)]
    prints = [Dataset.open(root).info.fingerprint]
    for key in keys[:2]:
        prints.append(amend.exclude(root, [key]).dataset.info.fingerprint)
    classes = Dataset.open(root).info.classes
    amend.relabel(root, {keys[3]: classes[Dataset.open(root).item(3).label - 1]})
    assert posmlp_data("relabel", root, "--undo").exit_code == 0
    assert Dataset.open(root).info.fingerprint == prints[2]
    assert amend.undo(root, Kind.EXCLUDE).dataset.info.fingerprint == prints[1]
    (root / amend.exclude(root, [keys[2]]).file).unlink()  # the documented way
    assert amend.undo(root, Kind.EXCLUDE).dataset.info.fingerprint == prints[0]
    assert posmlp_data("exclude", root, "--undo").exit_code == 1
    assert posmlp_data("exclude", root, "--undo", keys[0]).exit_code == 2


def test_keys_and_labels_come_from_files(root: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(root)
    keys = [dataset.text("key", row) for row in range(4)]
    plain, table, labels = (tmp_path / name for name in ("keys.txt", "keys.csv", "labels.csv"))
    plain.write_text(f"{keys[0]}\n\n{keys[0]}\n")
    table.write_text(f"reason,key\nx,{keys[1]}\n")
    assert posmlp_data("exclude", root, "--from", plain).exit_code == 0
    assert posmlp_data("exclude", root, "--from", table, keys[0]).exit_code == 0  # what is out already stays out
    assert posmlp_data("exclude", root, "--from", "-", stdin=f"{keys[2]}\n").exit_code == 0
    opened = Dataset.open(root)
    assert opened.overlay.excluded.tolist() == [0, 1, 2]
    assert [len(each.rows) for each in opened.overlay.files] == [1, 1, 1]
    assert "nothing to do" in posmlp_data("exclude", root, "--from", plain).output

    label = dataset.info.classes[dataset.item(3).label - 1]
    labels.write_text(f"key,label\n{keys[3]},{label}\n")
    assert posmlp_data("relabel", root, "--from", labels).exit_code == 0
    assert Dataset.open(root).overlay.relabelled.tolist() == [3]


def test_mistakes_change_nothing(root: Path, tmp_path: Path) -> None:
    key = Dataset.open(root).text("key", 0)
    bad = tmp_path / "bad.csv"
    bad.write_text("key,label\nx\n")
    (tmp_path / "two.csv").write_text(f"key,label\n{key},a\n{key},b\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    calls = [
        (lambda: amend.exclude(root, [key, "nobody/1"]), DatasetError, "no item 'nobody/1'"),
        (lambda: amend.exclude(root, []), JobError, "No key is named"),
        (lambda: amend.exclude(root, [key], "a\nb"), JobError, "--reason"),
        (lambda: amend.relabel(root, {key: "flying"}), DatasetError, "no class 'flying'"),
        (lambda: amend.exclude(tmp_path / "nothing", [key]), DatasetError, "no dataset"),
        (lambda: amend.split_label("x"), JobError, "KEY=CLASS"),
        (lambda: amend.read_labels(bad), JobError, "line 2"),
        (lambda: amend.read_labels(tmp_path / "two.csv"), JobError, "two classes"),
        (lambda: amend.read_keys(tmp_path / "binary"), JobError, "not text"),
        (lambda: amend.read_keys(tmp_path / "none"), JobError, "Give a file of keys"),
    ]
    for call, kind, text in calls:
        with pytest.raises(kind, match=text):
            call()
    with amend.only_builder(root), pytest.raises(PipelineError, match="is being built by"):
        amend.exclude(root, [key])
    assert not (root / FOLDER).exists()


def test_validate_names_a_bad_overlay(root: Path) -> None:
    path = root / amend.exclude(root, [Dataset.open(root).text("key", 0)]).file
    path.write_bytes(path.read_bytes()[:-1])
    (root / FOLDER / "notes.txt").write_text("what is this?")
    assert [problem.file for problem in validate.run(root)] == [f"{FOLDER}/{path.name}", f"{FOLDER}/notes.txt"]
    shown = posmlp_data("info", root)
    assert isinstance(shown.exception, DatasetError)
    assert "was altered" in str(shown.exception)


def test_json_is_plain(root: Path) -> None:
    amend.exclude(root, [Dataset.open(root).text("key", 0)], "blurred")
    card = json.loads(posmlp_data("info", root, "--json").output)
    assert card["overlays"][0].endswith(": 1 items, blurred")
