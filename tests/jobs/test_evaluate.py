"""Every view of every video is judged exactly once, with the same result for any number of workers and after a kill."""

import itertools
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.checkpoint import model_state
from jobs import evaluate
from jobs.accuracy import calibration, summarise
from jobs.errors import JobError, RecipeError
from jobs.predictions import Prediction, ViewOutput, fuse, merge, predict, read_parts, write_part
from jobs.recipe import parse_overrides
from jobs.run_folder import checkpoints, recipe_of
from jobs.trained_model import averaged, load_trained
from pipeline.index import Dataset
from tests.jobs.soak_train import Run
from tests.jobs.test_train import posmlp

VIEWS = ["eval.clips=2", "eval.crops=3", "eval.flip=true"]
TWELVE = "eval-clips2-crops3-fliptrue.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("trained") / "run", motion_dataset, "launch.workers=1", "train.steps=4", "eval.micro_batch=3")
    run.finish()
    return run


@pytest.fixture(scope="module")
def twelve_views(trained: Run) -> dict[str, Any]:
    """Of the trained run by one worker: two clips, three crops, mirrored."""
    return evaluate.run(trained.dir, overrides=VIEWS)


def copy_of(trained: Run, folder: Path, workers: int = 1) -> Path:
    """The run without its evaluations."""
    shutil.copytree(trained.dir, folder)
    for path in folder.glob("eval*.json"):
        path.unlink()
    text = (folder / "recipe.yaml").read_text()
    assert "workers: 1" in text
    (folder / "recipe.yaml").write_text(text.replace("workers: 1", f"workers: {workers}"))
    return folder


def dataset_of(trained: Run) -> Dataset:
    return Dataset.open(recipe_of(trained.dir).dataset_dir)


def output(position: int, logits: Sequence[float], *, key: str = "k", label: int = 0, failed: str | None = None) -> ViewOutput:
    return ViewOutput(position=position, key=key, label=label, logits=np.array(logits, dtype=np.float32), failed=failed)


# Whole evaluations


def test_workers_do_not_change_the_result(trained: Run, twelve_views: dict[str, Any], tmp_path: Path) -> None:
    done = posmlp("eval", str(trained.dir), "--json")
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout)
    assert alone == json.loads((trained.dir / "eval.json").read_text())
    two = copy_of(trained, tmp_path / "two", workers=2)
    assert posmlp("eval", str(two), *VIEWS).returncode == 0
    assert not (two / "eval.json").exists()
    assert json.loads((two / TWELVE).read_text()) == twelve_views
    dataset = dataset_of(trained)
    assert twelve_views["views"] == 12
    for result in (alone, twelve_views):
        keys = [video["key"] for video in result["videos"]]
        assert keys == [dataset.text("key", int(row)) for row in dataset.rows("split", "val")]
        assert sum(sum(row) for row in result["confusion"]) == result["num_videos"] == len(keys)
        assert result["dataset_fingerprint"] == dataset.info.fingerprint
    assert not (trained.dir / "eval").exists()


def test_a_result_is_the_fusion_of_its_views(trained: Run, twelve_views: dict[str, Any]) -> None:
    """Judged again one view at a time, by the model alone."""
    from pipeline.keyed import eval_views
    from pipeline.loader import Loader
    from pipeline.requests import eval_requests

    recipe, dataset = recipe_of(trained.dir), dataset_of(trained)
    rows, views = dataset.rows("split", "val")[:2], eval_views(2, 3, True)
    clips = {"clip": recipe.clip, "augment": recipe.augment}
    requests = eval_requests(dataset, rows, micro_batch=1, rank=0, world_size=1, views=views, **clips)
    newest = checkpoints(recipe).newest(warn=pytest.fail)
    assert newest is not None
    model = load_trained(recipe, len(dataset.info.classes), newest)
    with (
        torch.inference_mode(),
        Loader(dataset, requests, micro_batch=1, options=recipe.loader, threads=1, on_damage="report", **clips) as loader,
    ):
        logits = torch.cat([model(batch.clips) for batch in loader]).reshape(2, 12, -1)
    assert logits[0].std(dim=0).max() > 0  # views differ
    for video, values in zip(twelve_views["videos"], logits, strict=False):
        scores = values.mean(dim=0).softmax(dim=0)
        assert video["scores"] == pytest.approx(scores[video["top"]].tolist(), abs=1e-4)


def test_finished_parts_are_not_judged_again(trained: Run, twelve_views: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """A kill after some parts: they are used as they are, the others judged, and the result is the same."""
    run_dir = copy_of(trained, tmp_path / "again")
    committed: list[int] = []

    def stop_after_five(parts: Path, micro: int, outputs: list[ViewOutput]) -> None:
        if len(committed) == 5:
            raise KeyboardInterrupt
        write_part(parts, micro, outputs)
        committed.append(micro)

    monkeypatch.setattr(evaluate, "write_part", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(run_dir, overrides=VIEWS)
    (parts,) = (run_dir / "eval").glob("parts-*")
    first = json.loads((parts / f"micro-{committed[0]:08d}.json").read_text())
    first[0]["failed"] = "a mark"
    (parts / f"micro-{committed[0]:08d}.json").write_text(json.dumps(first))
    again: list[int] = []
    monkeypatch.setattr(evaluate, "write_part", lambda parts, micro, outputs: (again.append(micro), write_part(parts, micro, outputs)))
    result = evaluate.run(run_dir, overrides=VIEWS)
    assert not set(again) & set(committed)
    marked, *others = result["videos"]  # type: ignore[misc]
    assert marked["failed"] == "a mark"
    assert others == twelve_views["videos"][1:]


def late_worker(payload: dict[str, Any], worker: Any) -> None:
    """A rank that comes to its work when the other one could have finished half of it."""
    looked = evaluate.finished_parts
    evaluate.finished_parts = lambda parts: looked(parts) if worker.rank == 0 else dict.fromkeys(range(5), parts)
    evaluate.worker(payload, worker)


def test_a_rank_that_starts_late_shares_out_like_the_others(trained: Run, tmp_path: Path, monkeypatch: Any) -> None:
    from cluster import launch as cluster_launch

    run_dir = copy_of(trained, tmp_path / "late", workers=2)
    original = cluster_launch.launch
    monkeypatch.setattr(
        cluster_launch, "launch", lambda entry, *rest, **more: original("tests.jobs.test_evaluate:late_worker", *rest, **more)
    )
    result = evaluate.run(run_dir, overrides=["eval.clips=2"])
    assert result["num_videos"] == len(dataset_of(trained).rows("split", "val"))


def test_evaluations_do_not_mix(trained: Run, twelve_views: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    run_dir = copy_of(trained, tmp_path / "run")
    plain = evaluate.run(run_dir)
    other = evaluate.run(run_dir, overrides=["eval.clips=2", "eval.fusion=mean_softmax"])
    assert sorted(path.name for path in run_dir.glob("eval*")) == ["eval-clips2-fusionmean_softmax.json", "eval.json"]
    assert (plain["views"], other["views"]) == (1, 2)
    assert json.loads((run_dir / "eval.json").read_text()) == plain
    monkeypatch.setattr(evaluate, "_judge_missing", lambda *arguments: pytest.fail("judged again"))
    assert evaluate.run(run_dir) == plain  # is there already
    (run_dir / "eval.json").write_text(json.dumps({**plain, "eval": {**plain["eval"], "clips": 2}}))  # type: ignore[dict-item]
    with pytest.raises(pytest.fail.Exception):
        evaluate.run(run_dir)


def test_the_mean_of_several_checkpoints(trained: Run, tmp_path: Path) -> None:
    run_dir = copy_of(trained, tmp_path / "run")
    recipe = recipe_of(run_dir)
    newest, before = checkpoints(recipe).manifests()
    states = [model_state(each.load()) for each in (newest, before)]
    mean = averaged(newest, before)
    assert any("running_var" in name for name in mean)
    assert any(np.issubdtype(value.dtype, np.integer) for value in mean.values())
    for name, value in mean.items():
        assert value.dtype == states[0][name].dtype
        if np.issubdtype(value.dtype, np.integer):
            assert np.array_equal(value, states[0][name])
        else:
            wide = [state[name].astype(np.float64) for state in states]
            assert np.array_equal(value, ((wide[0] + wide[1]) / 2).astype(np.float32))
    done = posmlp("eval", str(run_dir), "--average", "2")
    assert done.returncode == 0, done.stderr
    assert "mean of 2 checkpoints" in done.stdout
    result = json.loads((run_dir / "eval-average2.json").read_text())
    assert result["checkpoints"] == [newest.path.name, before.path.name]
    with pytest.raises(JobError, match=r"keeps 2 whole checkpoint.*checkpoint\.keep=3"):
        evaluate.run(run_dir, average=3)


def test_a_damaged_video_counts_as_wrong(trained: Run, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(dataset_of(trained).root, dataset)
    run_dir = copy_of(trained, tmp_path / "run")
    text = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(text.replace(str(dataset_of(trained).root), str(dataset)))
    opened = Dataset.open(dataset)
    item = opened.item(int(opened.rows("split", "val")[0]))
    with (dataset / item.shard_file).open("r+b") as file:
        file.seek(item.offset + item.size // 2)
        file.write(b"damage")
    result = evaluate.run(run_dir, overrides=["eval.clips=2"])
    assert [entry["key"] for entry in result["failed"]] == [item.key]  # type: ignore[attr-defined]
    assert result["num_failed"] == 1
    assert result["num_videos"] == len(opened.rows("split", "val"))
    assert result["calibration"]["num"] == result["num_videos"] - 1  # type: ignore[index, operator]


# What is refused


@pytest.mark.parametrize(
    ("sections", "overrides", "text"),
    [
        ({"augment": {"flip": 0.0}}, ["eval.flip=true"], "eval.flip: got true, expected false where augment.flip is 0"),
        ({"clip": {"sampling": "uniform"}}, ["eval.clips=2"], "eval.clips: got 2, expected 1 where clip.sampling is uniform"),
        ({}, ["eval.crops=2"], "eval.crops"),
        ({}, ["eval.fusion=mean"], "eval.fusion"),
    ],
)
def test_views_that_there_are_not(sections: dict[str, object], overrides: list[str], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_overrides(sections, overrides)


def test_only_eval_keys_can_be_overridden(trained: Run) -> None:
    done = posmlp("eval", str(trained.dir), "data.val_split=train")
    assert done.returncode == 1
    assert "error: 'data.val_split=train': only keys of the eval section" in done.stderr


def test_missing_double_and_foreign_views_are_errors(tmp_path: Path) -> None:
    write_part(tmp_path, 0, [output(0, [1, 2], key="a"), output(1, [1, 2], key="a"), output(2, [1, 2], key="b")])
    arguments: dict[str, Any] = {"num_views": 2, "fusion": "sum_logits"}
    with pytest.raises(JobError, match=r"1 views missing, 0 foreign, 0 double, first 'b \(view 1\)'"):
        merge(tmp_path, ["a", "b"], **arguments)
    write_part(tmp_path, 1, [output(3, [1, 2], key="b"), output(1, [1, 2], key="a")])
    with pytest.raises(JobError, match=r"1 double, first 'a \(view 1\)'"):
        merge(tmp_path, ["a", "b"], **arguments)
    with pytest.raises(JobError, match="foreign"):
        merge(tmp_path, ["a", "c"], **arguments)


# Fusion


@given(seed=st.integers(0, 2**32 - 1), num_views=st.integers(1, 12), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_fusion_is_exact_in_any_order(seed: int, num_views: int, scale: float) -> None:
    draw = random.Random(seed)
    logits = np.array([[draw.gauss(0, scale) for _ in range(7)] for _ in range(num_views)], dtype=np.float32)
    order = draw.sample(range(num_views), num_views)
    for fusion in ("sum_logits", "mean_softmax"):
        logs = fuse(logits, fusion)  # type: ignore[arg-type]
        assert logs.tobytes() == fuse(logits[order], fusion).tobytes()  # type: ignore[arg-type]
        assert math.fsum(np.exp(logs)) == pytest.approx(1)
    wide = torch.from_numpy(logits.astype(np.float64))
    assert fuse(logits, "sum_logits") == pytest.approx(wide.mean(dim=0).log_softmax(dim=0).numpy(), rel=1e-12, abs=1e-12)
    wanted = wide.log_softmax(dim=1).logsumexp(dim=0) - math.log(num_views)
    assert fuse(logits, "mean_softmax") == pytest.approx(wanted.numpy(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 5, 2), (12,)])
def test_views_may_lie_in_any_parts(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    draw = random.Random(0)
    outputs = [output(p, [draw.gauss(0, 1) for _ in range(9)], key=f"k{p // 4}", label=p // 4) for p in range(12)]
    begins = itertools.accumulate(sizes, initial=0)
    for micro, (begin, size) in enumerate(zip(begins, sizes, strict=False)):
        write_part(tmp_path, micro, outputs[begin : begin + size])
    assert all(np.array_equal(one.logits, two.logits) for one, two in zip(read_parts(tmp_path), outputs, strict=True))
    merged = merge(tmp_path, ["k0", "k1", "k2"], num_views=4, fusion="mean_softmax")
    assert merged == [predict(outputs[i : i + 4], "mean_softmax") for i in (0, 4, 8)]


def test_ties_failures_and_numbers_that_are_none() -> None:
    assert predict([output(0, [1, 3, 3, 0, 3, 2, 1])], "sum_logits").top == (1, 2, 4, 5, 0)
    failed = predict([output(0, [1, 2]), output(1, [0, 0], failed="crc")], "sum_logits")
    assert (failed.failed, failed.top, failed.right) == ("crc", (), False)
    diverged = predict([output(0, [1, math.nan])], "mean_softmax")
    assert "not a finite number" in str(diverged.failed)
    assert json.loads(json.dumps(failed.as_record())) == {"key": "k", "label": 0, "failed": "crc"}


# Figures


def prediction(label: int, top: tuple[int, ...], score: float = 0.5, failed: str | None = None) -> Prediction:
    truth = score if top and top[0] == label else (1 - score) / 2
    return Prediction(key="k", label=label, top=top, scores=(score,), truth_log=math.log(truth), failed=failed)


def test_figures_by_hand() -> None:
    judged = [prediction(0, (0, 1)), prediction(0, (1, 0)), prediction(1, (1, 0)), prediction(1, (1, 2)), prediction(2, (0, 2))]
    result: dict[str, Any] = summarise([*judged, prediction(2, (), failed="crc")], ["a", "b", "c"])
    assert (result["num_videos"], result["num_failed"]) == (6, 1)
    assert result["top1"] == 3 / 6
    assert result["top5"] == 5 / 6
    assert result["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert result["per_class"]["a"] == {"num": 2, "precision": 0.5, "recall": 0.5}
    assert result["per_class"]["b"] == {"num": 2, "precision": 2 / 3, "recall": 1.0}
    assert result["per_class"]["c"] == {"num": 2, "precision": None, "recall": 0.0}
    assert result["mean_recall"] == 0.5
    assert result["failed"] == [{"key": "k", "reason": "crc"}]


def test_calibration_by_hand() -> None:
    """Two videos of confidence 0.9, one right; one right of confidence 1, in the last bin; one wrong of 0.05."""
    judged = [prediction(0, (0,), 0.9), prediction(0, (1,), 0.9), prediction(0, (0,), 1.0), prediction(0, (1,), 0.05)]
    result: dict[str, Any] = calibration(judged)
    bins = result["bins"]
    assert [(place, row["num"]) for place, row in enumerate(bins) if row["num"]] == [(0, 1), (13, 2), (14, 1)]
    assert bins[13]["accuracy"] == 0.5
    assert bins[1]["confidence"] is None
    assert result["ece"] == pytest.approx((2 * 0.4 + 1 * 0.0 + 1 * 0.05) / 4)
    assert result["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.05) + math.log(0.475)) / 4)
    assert calibration([])["ece"] is None
