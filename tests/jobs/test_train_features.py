"""Fine-tuning, freezing, the average of the weights, checkpoint commands and what a resumed run counts: as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cluster.checkpoint import CheckpointStore, model_state
from cluster.errors import CheckpointError
from cluster.metrics import MetricsWriter, read_metrics
from cluster.topology import Worker
from jobs.checkpoint_tools import chosen, export, inspect, verify
from jobs.errors import RecipeError
from jobs.initial import freeze, initialise, rate_scales
from jobs.recipe import Recipe, parse_recipe
from jobs.run_folder import newest_checkpoint, open_dataset, recipe_of
from jobs.run_log import damage_before
from jobs.train import _counted
from jobs.trained_model import build_model, load_trained
from model.posmlp import PosMLPVideo
from tests.jobs.soak_train import Run

FEATURES = ("optimizer.ema=0.9", "optimizer.layer_decay=0.7", "optimizer.schedule=wsd", "train.steps=4", "launch.workers=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Run:
    """A finished run with an average of its weights."""
    run = Run(tmp_path_factory.mktemp("source") / "run", motion_dataset, *FEATURES)
    run.finish()
    return run


def posmlp(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs", *arguments], capture_output=True, text=True, timeout=240, check=False)


def test_evaluation_sees_the_average(run: Run) -> None:
    recipe = recipe_of(run.dir)
    dataset = open_dataset(recipe, "val")
    found = newest_checkpoint(recipe, dataset)
    assert found is not None
    _, tensors = run.tensors()
    model = load_trained(recipe, len(dataset.info.classes), found)
    assert np.array_equal(model.head.weight.detach().numpy(), tensors["ema.head.weight"])
    assert not np.array_equal(tensors["ema.head.weight"], tensors["model.head.weight"])


def test_fine_tuning_begins_with_another_run_and_keeps_what_is_frozen(run: Run, tmp_path: Path, motion_dataset: Path) -> None:
    more = ("train.steps=3", "launch.workers=1", f"train.init_from={run.dir}", "train.freeze=[patch_embed1, blocks1]", "clip.num_frames=6")
    tuned = Run(tmp_path / "tuned", motion_dataset, *more)
    tuned.finish()
    (event,) = [event for event in read_metrics(tuned.dir / "metrics.jsonl") if event["event"] == "init"]
    assert "fresh 0" in str(event["text"])  # the classes are the same
    assert any("t_fc" in line and "-> (11, " in line for line in event["resized"])  # type: ignore[attr-defined]  # 2 * 6 - 1 offsets
    before, after = model_state(run.tensors()[1]), model_state(tuned.tensors()[1])
    frozen = [name for name in before if name.startswith(("patch_embed1.", "blocks1.")) and before[name].shape == after[name].shape]
    assert any("running_mean" in name for name in frozen)  # a frozen batch norm keeps its statistics
    assert [name for name in frozen if not np.array_equal(before[name], after[name])] == []
    assert not np.array_equal(before["blocks4.0.fc.encoder.fc1.weight"], after["blocks4.0.fc.encoder.fc1.weight"])
    recipe = str(tuned.dir / "recipe.yaml")
    elsewhere = posmlp("train", recipe, f"run.dir={tuned.dir}", "train.init_from=null")
    assert elsewhere.returncode == 1
    assert "train.init_from" in elsewhere.stderr
    assert str(run.dir) in elsewhere.stderr
    again = posmlp("train", recipe, f"run.dir={tuned.dir}", "optimizer.max_skipped=7", "optimizer.max_spike=9")
    assert again.returncode == 0, again.stderr  # what only guards a run may change


@pytest.mark.parametrize("harm", ["missing", "folder", "text", "freeze"])
def test_what_cannot_be_begun_with_is_one_clear_message(run: Run, tmp_path: Path, harm: str) -> None:
    model = build_model(recipe_of(run.dir), 4)
    (tmp_path / "x.pth").write_text("not weights")
    match harm:
        case "missing":
            expected, source = "does not exist", tmp_path / "nothing"
        case "folder":
            expected, source = "neither a checkpoint nor a run folder", tmp_path
        case "text":
            expected, source = "cannot be read as weights", tmp_path / "x.pth"
        case "freeze":
            with pytest.raises(RecipeError, match=r"no parameter's name begins with 'block'; the model's parts are blocks1, "):
                freeze(model, ["block"])
            return
    with pytest.raises(RecipeError, match=f"train.init_from: .*{expected}"):
        initialise(model, source)


def test_an_exported_file_is_the_model_and_can_be_begun_with(run: Run, tmp_path: Path) -> None:
    recipe = recipe_of(run.dir)
    found = chosen(run.dir, None)
    classes = found.meta["classes"]
    assert isinstance(classes, list)
    names = export(found, tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "weights.safetensors"]
    tensors = load_file(tmp_path / "weights.safetensors")
    assert sorted(tensors) == names
    assert np.array_equal(tensors["head.weight"], run.tensors()[1]["ema.head.weight"])
    model: PosMLPVideo = build_model(recipe, len(classes))
    report = initialise(model, tmp_path / "weights.safetensors")
    assert report.resized == report.fresh == report.dropped == ()
    assert torch.equal(model.head.weight, torch.from_numpy(tensors["head.weight"]))
    export(found, tmp_path / "last.safetensors", averaged=False)
    assert np.array_equal(load_file(tmp_path / "last.safetensors")["head.weight"], run.tensors()[1]["model.head.weight"])
    other = build_model(recipe, len(classes) + 1)
    assert initialise(other, found.path).fresh == ("head.weight", "head.bias")  # other classes: a head of its own


def test_checkpoint_commands(run: Run) -> None:
    found = chosen(run.dir, None)
    assert found.step == 4
    told = json.loads(json.dumps(inspect(found)))
    assert told["optimizer.ema"] == 0.9
    assert told["holds"]["model"] == told["holds"]["exp_avg"]
    assert verify(run.dir) == []
    listed = posmlp("checkpoint", "list", str(run.dir))
    assert (listed.returncode, len(listed.stdout.splitlines())) == (0, 2), listed.stderr
    assert listed.stdout.startswith("step        4")
    wrong = posmlp("checkpoint", "inspect", str(run.dir), "--step", "17")
    assert wrong.returncode == 1
    assert "has no checkpoint of step 17; there are 4, 3." in wrong.stderr
    assert posmlp("checkpoint", "list", str(run.dir / "checkpoints")).returncode == 1


def test_a_flipped_byte_is_found(run: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run.dir, tmp_path / "run")
    path = CheckpointStore(tmp_path / "run" / "checkpoints", 1).manifests()[0].path / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (problem,) = verify(tmp_path / "run")
    assert "SHA-256" in problem
    with pytest.raises(CheckpointError, match="damaged"):
        chosen(tmp_path / "run", 4)
    assert posmlp("checkpoint", "verify", str(tmp_path / "run")).returncode == 1


def test_a_checkpoint_from_before_a_key_was_there_means_its_default(run: Run, tmp_path: Path) -> None:
    recipe = recipe_of(run.dir)
    numerics = recipe.numerics()
    assert not {"optimizer.max_skipped", "optimizer.max_spike", "train.time_limit"} & numerics.keys()
    old = {name: value for name, value in Recipe().numerics().items() if name not in ("optimizer.ema", "train.freeze", "train.init_from")}
    store = CheckpointStore(tmp_path, 1, absent=Recipe().numerics())
    store.save(1, {"model.x": np.zeros(2, dtype=np.float32)}, old, fence=lambda: None)
    assert store.newest(Recipe().numerics(), warn=print) is not None
    changed = parse_recipe({"optimizer": {"ema": 0.5}}, where="test").numerics()
    with pytest.raises(CheckpointError, match=r"optimizer\.ema is 0\.0, this run's is 0\.5"):
        store.newest(changed, warn=print)


def test_layers_below_learn_more_slowly(run: Run) -> None:
    model = build_model(recipe_of(run.dir), 4)
    scales = rate_scales(model, 0.5)
    assert scales["head.weight"] == scales["norm.weight"] == 1.0
    assert scales["blocks4.0.fc.encoder.fc1.weight"] == 0.5
    assert scales["patch_embed1.proj1.weight"] == 0.5**5
    assert set(rate_scales(model, 1.0).values()) == {1.0}


def test_damage_counts_on_after_a_resume(tmp_path: Path) -> None:
    """Every rank goes on from what it would have counted alone from the start, whoever wrote the damage down, and how often."""
    recipe = parse_recipe({"run": {"dir": str(tmp_path)}, "train": {"global_batch": 8, "micro_batch": 2}}, where="test")
    for rank, positions in enumerate([(0, 9, 9, 31), (2, 9, 21, 40)]):
        (tmp_path / "damage").mkdir(exist_ok=True)
        with MetricsWriter(tmp_path / "damage" / f"rank-{rank}.jsonl", 1) as writer:
            for position in positions:
                writer.write("damage", position=position, key="x")
    assert damage_before(tmp_path, 32) == {0, 2, 9, 21, 31}

    def counted(rank: int, world_size: int) -> tuple[int, int]:
        worker = Worker(
            rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, device="cpu", threads=1, attempt=1
        )  # fmt: skip
        return _counted(recipe, worker, start=4)

    assert counted(0, 1) == (32, 5)
    assert [counted(rank, 2) for rank in range(2)] == [(16, 3), (16, 2)]  # micro-batches 0 and 2: positions 0, 9, 21; 1 and 3: 2, 31
    assert counted(1, 4) == (8, 1)
