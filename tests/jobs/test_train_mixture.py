"""Training on a mixture of datasets: shares as the recipe says, resumed exactly, refused when one of the datasets is another by now."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cluster.errors import CheckpointError
from jobs import amend, train
from jobs.errors import RecipeError
from jobs.recipe import Recipe, load_recipe, parse_overrides
from jobs.run_folder import newest_checkpoint
from jobs.view_tensor import Training
from pipeline.errors import DatasetError
from pipeline.index import Dataset
from pipeline.overlay import Kind
from tests.jobs.soak_train import RECIPE


@pytest.fixture
def recipe(motion_dataset: Path, tmp_path: Path) -> Recipe:
    other = tmp_path / "other"
    shutil.copytree(motion_dataset, other)
    path = tmp_path / "mixed.yaml"
    text = RECIPE.replace("workers: 2", "workers: 1") + f"data: {{dir: {motion_dataset}, weight: 3, mix: [{{dir: {other}}}]}}\n"
    path.write_text(text)
    return load_recipe(str(path), ["train.steps=4", "checkpoint.every=2", f"run.dir={tmp_path / 'run'}"])


def test_a_mixture_trains_resumes_and_is_held_to_its_datasets(recipe: Recipe) -> None:
    other = recipe.data.mix[0].dir
    assert train.run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 4})})) == 4
    lines = [line for path in (recipe.run_dir / "trace").glob("*.jsonl") for line in path.read_text().splitlines()]
    keys = [key for line in lines for key in json.loads(line)["keys"]]
    assert (len(keys), sum(key.startswith("other:") for key in keys)) == (32, 8)

    dataset = Dataset.open(recipe.dataset_dir)
    built = Dataset.open(other).info.fingerprint
    overlaid = amend.exclude(other, [dataset.text("key", int(Dataset.open(other).rows("split", "train")[0]))]).dataset.info.fingerprint
    with pytest.raises(CheckpointError) as refused:
        newest_checkpoint(recipe, dataset)
    assert all(text in str(refused.value) for text in ("data.mix[0]", built, overlaid))
    amend.undo(other, Kind.EXCLUDE)
    assert newest_checkpoint(recipe, dataset) is not None
    for data in ({"weight": 2}, {"mix": ()}):
        with pytest.raises(CheckpointError, match=r"data\.(weight|mix)"):
            newest_checkpoint(recipe.model_copy(update={"data": recipe.data.model_copy(update=data)}), dataset)

    # The viewer sees the same stream.
    training = Training(recipe, dataset)
    row = int(training.rows[0])
    use = training.uses(row, 0, 1)[0]
    assert dataset.text("key", row) == training.seen(use.step, use.micro).slots[use.slot].key


def test_what_cannot_be_mixed_is_refused(recipe: Recipe, motion_dataset: Path) -> None:
    mixed = recipe.data.mix[0]
    for change, text in (({"train_split": "nowhere"}, "not 'nowhere'"), ({"dir": Path("/nowhere")}, "holds no dataset")):
        data = recipe.data.model_copy(update={"mix": (mixed.model_copy(update=change),)})
        with pytest.raises(DatasetError, match=text):
            train.run(recipe.model_copy(update={"data": data}))
    wrong = [
        ({"weight": 1}, r"data\.mix\.0\.dir"),
        ({"dir": "x", "weight": 0}, r"data\.mix\.0\.weight"),
        ({"dir": "x", "colour": 1}, "colour"),
    ]
    for entry, text in wrong:
        with pytest.raises(RecipeError, match=text):
            parse_overrides({"data": {"mix": [entry]}}, [])
    resolved = yaml.safe_load(recipe.to_yaml())
    assert resolved["data"]["mix"][0]["dir"] == str(mixed.dir)
