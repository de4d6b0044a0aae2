"""What is submitted is checked before anything is sent: the command, the recipe, and what both need of a cluster."""

import re
import socket
import sys
from pathlib import Path

import click
import pytest

from cluster.errors import SubmitError
from cluster.submit import Jobs
from jobs import preflight_node
from jobs.errors import RecipeError
from jobs.recipe import parse_recipe
from jobs.submission import Work, base_id, number_of
from jobs.submit import write_files
from pipeline.remote import RemoteFolder


def work(*words: str) -> Work:
    return Work.of(words, timeout_s=7)


def test_a_training_carries_its_resolved_recipe_and_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = work("train", "weizmann", "data.dir=data", "run.dir=/s/run", "train.init_from=/s/w.pth", "launch.workers=2")
    assert (found.verb, found.folder, found.command) == ("train", "/s/run", ["train", "recipe.yaml"])
    assert found.needs.read == {"data.dir": f"{tmp_path}/data/dataset.json", "train.init_from": "/s/w.pth"}
    assert found.needs.shared == {"run.dir": "/s/run"}
    assert (found.needs.num_micro_batches, found.needs.launch["workers"], found.needs.timeout_s) == (2, 2, 7)
    assert "torch" in found.needs.libraries
    import yaml

    sent = parse_recipe(yaml.safe_load(found.files["recipe.yaml"]), where="the file")
    assert (sent.dataset_dir, sent.launch.workers) == (tmp_path / "data", 2)


def test_build_run_and_eval_need_other_things() -> None:
    built = work("data", "build", "--videos", "/s/v", "--out", "/s/d", "encode.gop=16")
    assert built.command == ["data", "build", "--videos", "/s/v", "--out", "/s/d", "encode.gop=16"]
    assert (built.needs.read, built.needs.shared, built.needs.num_micro_batches) == ({"--videos": "/s/v"}, {"--out": "/s/d"}, None)
    whole = work("run", "weizmann", "data.videos=/s/v", "data.dir=/s/d", "run.dir=/s/run")
    assert (whole.needs.read, whole.needs.shared) == ({"data.videos": "/s/v"}, {"run.dir": "/s/run", "data.dir": "/s/d"})
    judged = work("eval", "/s/run", "--average", "2", "eval.clips=4")
    assert judged.command == ["eval", "/s/run", "--average", "2", "eval.clips=4"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "What shall be submitted"),
        (["doctor"], "'doctor' cannot be submitted; possible: train, eval, run, data build"),
        (["data", "build", "--videos", "/v", "--out", "/o", "--dry-run"], "type it on a node"),
        (["train", "weizmann", "--launcher", "local"], r"launch\.launcher=local trains without Ray"),
        (["train", "weizmann", "train.epoch=1"], r"train\.epoch .*: unknown key"),
        (["trian", "weizmann"], "No such command 'trian'"),
    ],
)
def test_what_cannot_be_submitted_is_refused_here(words: list[str], said: str) -> None:
    with pytest.raises((click.UsageError, RecipeError), match=said):
        work(*words)


def test_ids_are_of_verb_and_folder() -> None:
    assert base_id("data build", "/s/my data!") == base_id("data build", "/s/my data!")
    assert base_id("train", "/a/run") != base_id("train", "/b/run")
    assert base_id("train", "/a/run") != base_id("eval", "/a/run")
    assert base_id("data build", "/s/my data!").startswith("posmlp-data-build-my-data-")
    assert number_of(base_id("train", "/a/run") + "-12") == 12


def test_the_files_are_our_four_packages_the_recipe_and_no_data(tmp_path: Path) -> None:
    write_files(tmp_path, work("train", "weizmann", "run.dir=/s/run"))
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {
        "pipeline",
        "model",
        "cluster",
        "jobs",
        "recipe.yaml",
        "submission.json",
    }
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".py", ".j2", ".yaml", ".json", ""}
    assert (tmp_path / "cluster" / "manifests" / "slurm.sh.j2").is_file()


def test_an_address_where_nothing_listens_is_told_in_a_word() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SubmitError, match=re.escape(f"{address}: no Ray dashboard answers there ([Errno 111] Connection refused). Is")):
        Jobs(address)


def test_label_files_in_parts_are_sent_as_they_were_given_and_looked_for() -> None:
    parts = ["--labels", "train=/s/a.csv", "--labels", "val=/s/b.csv", "--format", "kinetics"]
    built = work("data", "build", "--videos", "/s/v", *parts, "--out", "/s/d")
    assert built.command == ["data", "build", "--videos", "/s/v", *parts, "--out", "/s/d"]
    assert built.needs.read == {"--videos": "/s/v", "data.labels.train": "/s/a.csv", "data.labels.val": "/s/b.csv"}


def test_urls_stay_as_they_are_and_are_read_not_shared() -> None:
    built = work("data", "build", "--videos", "s3://b/videos", "--out", "s3://b/d")
    assert built.command == ["data", "build", "--videos", "s3://b/videos", "--out", "s3://b/d"]
    assert (built.folder, built.needs.read, built.needs.shared) == ("s3://b/d", {"--videos": "s3://b/videos"}, {})
    whole = work("run", "weizmann", "data.videos=s3://b/videos", "data.dir=s3://b/d", "run.dir=/s/run")
    assert (whole.needs.read, whole.needs.shared) == ({"data.videos": "s3://b/videos"}, {"run.dir": "/s/run"})
    mix = "data.mix=[{dir: s3://b/more}, {dir: /s/more}]"
    trained = work("train", "weizmann", "data.dir=s3://b/d", mix, "run.dir=/s/run")
    assert trained.needs.read == {
        "data.dir": "s3://b/d/dataset.json",
        "data.mix[0].dir": "s3://b/more/dataset.json",
        "data.mix[1].dir": "/s/more/dataset.json",
    }


def test_a_node_says_what_it_sees_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the memory of this process, and of a kind of store whose package it lacks."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    RemoteFolder("memory://node").create("d/dataset.json", b"{}")
    urls = {"file": "memory://node/d/dataset.json", "folder": "memory://node/d", "none": "memory://node/none", "gs": "gs://bucket/x"}
    nothing = {"packages": [], "mark": "", "libraries": [], "shared": {}, "nonce": "", "me": "", "address": "127.0.0.1"}
    found = preflight_node.look({**nothing, "read": urls})["read"]
    assert (found["file"], found["folder"]) == ("2", "0")
    assert found["none"] == "missing: there is nothing at this URL. Correct it, or build what it names first."
    assert re.fullmatch(r"missing: gs://bucket/x: .* pip install 'posmlp-video\[gs\]'", found["gs"])
