"""The documentation is true: every command in it runs, every link leads somewhere, the recipe reference is that of the types.

Blocks marked `sh` and `python` are run in order, page by page, in a folder with small videos under the names that the pages use. To
fit a test, commands that train get the settings of TINY behind their own.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_session import ensure_ray, ray
from jobs import recipe_reference, synthesize
from pipeline.remote import RemoteFolder
from tests.pipeline.s3 import s3_server
from tests.pipeline.test_pictures import numbered_folder

ROOT = Path(__file__).parent.parent
PAGES = ["tutorial.md", "howto/own-data.md", "howto/fine-tuning.md", "howto/report.md", "howto/kinetics.md", "howto/something-something.md"]
STORE_PAGE = "howto/object-store.md"
SETTINGS = """
    model.preset=posmlp_tiny model.stem=2d model.widths=[8,16,32,64] model.depths=[1,1,1,1] model.groups=[4,8,16,32] model.windows=[2,2,2,2]
    augment.size=32 augment.eval_resize=32 augment.repeats=1 clip.num_frames=4 clip.sampling=segment
    train.global_batch=4 train.micro_batch=2 train.steps=2 launch.launcher=local launch.workers=1 launch.cpus_per_worker=1
"""
TINY = SETTINGS.split()
BOX = {"x1": "0", "y1": "0", "x2": "16", "y2": "16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos under all the names that the pages use."""
    home = tmp_path_factory.mktemp("docs")
    videos = home / "videos"
    synthesize.synthesize(videos, num_clips=18, seed=1)
    os.rename(videos / "labels.csv", home / "labels.csv")
    with (home / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:-1]  # the last one is broken
    copy(videos / rows[0]["path"], home / "new.mp4")
    copy(videos / rows[1]["path"], home / "more" / "left" / "another.mp4")
    official: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
    something: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    lines: dict[str, list[str]] = {"train": [], "val": []}
    keys = [row["path"].removesuffix(".mp4") for row in rows]
    (home / "bad.txt").write_text(f"{keys[0]}\n")
    write_labels(home / "corrected.csv", [{"key": keys[1], "label": rows[2]["label"]}])
    for number, row in enumerate(rows):
        name = f"abcdefgh{number:03d}"
        copy(videos / row["path"], home / "kinetics" / "videos" / row["label"] / f"{name}_000010_000020.mp4")
        copy(videos / row["path"], home / "ssv2" / "videos" / f"{number}.webm")
        times = {"time_start": "10", "time_end": "20"}
        official[row["split"]].append({"label": row["label"], "youtube_id": name, **times, "split": row["split"]})
        something["validation" if row["split"] == "val" else "train"].append({"id": str(number), "template": f"Moving [{row['label']}]"})
        lines[row["split"]].append(f"{row['path']} {len(row['label'])}")
    official["val"].append({"label": "left", "youtube_id": "gone_gone_1", "time_start": "0", "time_end": "10", "split": "val"})
    for name in ("left/a", "left/b", "right/c"):
        numbered_folder(home / "frames" / name, range(1, 13))
    for split, clips in official.items():
        write_labels(home / "kinetics" / f"{split}.csv", clips)
    for split, entries in something.items():
        (home / "ssv2" / f"{split}.json").write_text(json.dumps(entries))
    templates = sorted({entry["template"].translate({91: None, 93: None}) for entries in something.values() for entry in entries})
    (home / "ssv2" / "labels.json").write_text(json.dumps({template: str(number) for number, template in enumerate(templates)}))
    write_labels(home / "boxes.csv", [{"path": row["path"], "frame": "2", "label": row["label"], **BOX} for row in rows])
    for row, split in zip(rows, ("train", "val"), strict=False):
        copy(videos / row["path"], home / "films" / f"film-{split}.mkv")
        (home / f"ava_{split}.csv").write_text(f"film-{split},0000,.1,.2,.3,.4,1,7\n")
    (home / "ava_actions.pbtxt").write_text('item { name: "stand" id: 1 }\n')
    for split, name in (("train", "list-a.txt"), ("val", "list-b.txt")):
        (home / name).write_text("\n".join(lines[split]) + "\n")
    return home


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_labels(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the page's fenced blocks that are to be run."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    yield from re.findall(r"^```(sh|python)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """One for all the commands, which else would each start and end their own; its processes know the way to an S3 server."""
    with s3_server(), pytest.MonkeyPatch.context() as patch:
        ray.shutdown()  # an earlier test's, whose processes do not
        ensure_ray()
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(folder: Path, page: str) -> None:
    """Pages run in the order in which they stand in PAGES; later ones use what earlier ones made, as a reader would."""
    for language, text in blocks(page):
        if language == "python":
            run([sys.executable, "-c", text], folder)
            continue
        for line in text.replace("\\\n", " ").strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "posmlp", f"{page}: '{line}' is not a command that this test can run"
            run([sys.executable, "-m", "jobs", *words[1:], *(TINY if words[1] in ("train", "run") else [])], folder)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_ray")
def test_every_command_of_the_object_store_page_runs(folder: Path) -> None:
    """Before a real S3 server, whose bucket has the videos."""
    store = RemoteFolder("s3://bucket/videos")
    for path in (folder / "videos").rglob("*.mp4"):
        store.upload(path, path.relative_to(folder / "videos").as_posix())
    test_every_command_of_the_page_runs(folder, STORE_PAGE)


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "110"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command[2:])}\n{done.stdout}\n{done.stderr}"


def test_the_recipe_reference_is_that_of_the_types() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").strip() == recipe_reference.markdown().strip(), "run 'make docs'"


def test_every_key_of_a_recipe_has_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", recipe_reference.markdown(), flags=re.MULTILINE)
    assert len(rows) > 80
    nested = {"encode", "limits"}  # explained in sections of their own
    assert not [name for name, meaning in rows if not meaning.strip() and name not in nested]


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
