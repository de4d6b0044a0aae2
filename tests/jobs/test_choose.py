"""Validation while training: it changes nothing else, survives kills, and never sees what is trained on or reported."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.metrics import read_metrics
from jobs import evaluate, train
from jobs.curves import read_history
from jobs.errors import JobError, RecipeError
from jobs.recipe import load_recipe, parse_overrides, parse_recipe
from jobs.report import render
from jobs.run_folder import checkpoints, choice_rows, recipe_of, train_rows
from pipeline.index import Dataset
from tests.jobs.soak_train import Kill, Run, assert_same, trace

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # DeepSpeed's own
CHOICE = ("data.choose_fraction=0.3", "train.steps=9", "launch.workers=1")
EVERY = "eval.every=3 steps"


def validations(run: Run) -> dict[int, dict[str, object]]:
    """Step -> the newest validation of it, without what depends on the clock."""
    events = [event for event in read_metrics(run.dir / "metrics.jsonl") if event["event"] == "validation"]
    return {int(str(event["step"])): {k: v for k, v in event.items() if k not in ("time", "attempt", "seconds")} for event in events}


def finish_here(run: Run) -> Run:
    """The run, trained to its end in this process, which has imported everything."""
    recipe, *overrides = run._command[4:]
    train.run(load_recipe(recipe, overrides))
    return run


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Run:
    return finish_here(Run(tmp_path_factory.mktemp("chosen") / "run", motion_dataset, *CHOICE, EVERY))


def test_training_is_the_same_with_and_without(tmp_path: Path, motion_dataset: Path, chosen: Run) -> None:
    plain = finish_here(Run(tmp_path / "run", motion_dataset, *CHOICE))
    assert_same(chosen, plain)
    assert sorted(validations(chosen)) == [3, 6, 9]
    assert validations(plain) == {}


def test_a_validation_that_was_killed_is_made_again(tmp_path: Path, motion_dataset: Path, chosen: Run) -> None:
    killed = Run(tmp_path / "run", motion_dataset, *CHOICE, EVERY)
    killed.finish([Kill(moment="save", victim="driver", step=0)])  # while a checkpoint is saved, and so before it is judged
    assert_same(killed, chosen)
    assert validations(killed) == validations(chosen)
    # One whose score is lost, as if the kill had come between the save and the score, is judged when the command is given again.
    newest = checkpoints(recipe_of(killed.dir)).manifests()[0]
    before = newest.judgement()
    (newest.path / "score.json").unlink()
    finish_here(killed)
    assert newest.judgement() == before
    assert validations(killed) == validations(chosen)


def test_choice_is_disjoint_from_what_is_trained_on_and_reported(motion_dataset: Path, chosen: Run) -> None:
    recipe, dataset = recipe_of(chosen.dir), Dataset.open(motion_dataset)
    train, choice, val = train_rows(recipe, dataset), choice_rows(recipe, dataset), dataset.rows("split", "val")
    assert len(choice) > 0
    assert not {*choice.tolist()} & {*train.tolist(), *val.tolist()}
    assert sorted([*train, *choice]) == dataset.rows("split", "train").tolist()
    units = [{dataset.text("group", row) or dataset.text("source", row) for row in rows.tolist()} for rows in (train, choice)]
    assert not units[0] & units[1]
    trained = {name for records in trace(chosen.dir).values() for record in records for name in record["keys"]}  # type: ignore[attr-defined]
    assert not trained & {dataset.text("key", row) for row in choice.tolist()}


def test_the_best_stays_and_is_evaluated(chosen: Run, capsys: pytest.CaptureFixture[str]) -> None:
    store = checkpoints(recipe_of(chosen.dir))
    scores = {int(step): (float(str(facts["top1"])), -float(str(facts["loss"]))) for step, facts in validations(chosen).items()}
    best = max(scores, key=lambda step: (scores[step], -step))
    found = store.best()
    assert found is not None
    assert found.step == best
    assert {9, best} <= {checkpoint.step for checkpoint in store.manifests()}
    result = evaluate.run(chosen.dir, checkpoint="best")
    assert (result["step"], result["split"]) == (best, "val")
    assert json.loads((chosen.dir / "eval-best.json").read_text())["step"] == best
    assert evaluate.run(chosen.dir, checkpoint="9")["step"] == 9
    with pytest.raises(JobError, match="no checkpoint of step 4; there are 9"):
        evaluate.run(chosen.dir, checkpoint="4")
    history = read_history(chosen.dir / "metrics.jsonl")
    assert history.choice.x == [3.0, 6.0, 9.0]
    page = render(chosen.dir, num_videos=0)
    assert "Top-1 while training" in page
    capsys.readouterr()


def test_judging_equals_evaluation(chosen: Run, motion_dataset: Path, tmp_path: Path) -> None:
    """The figures of a validation are those that `posmlp eval` gives the same weights on the same videos."""
    recipe, dataset = recipe_of(chosen.dir), Dataset.open(motion_dataset)
    facts = checkpoints(recipe).manifests()[0].judgement()
    assert facts is not None
    keys = {dataset.text("key", row) for row in choice_rows(recipe, dataset).tolist()}
    data = recipe.data.model_copy(update={"val_split": "train", "choose_fraction": 0.0})
    whole = recipe.model_copy(update={"data": data, "eval": recipe.eval.model_copy(update={"every": None})})
    found = checkpoints(recipe).manifests()[0]
    rows = dataset.rows("split", "train")
    evaluate._judge_missing(whole, dataset, [found], tmp_path / "eval" / "parts-x", -(-len(rows) // whole.eval.micro_batch))
    names = [dataset.text("key", row) for row in rows.tolist()]
    judged = [one for one in evaluate.merge(tmp_path / "eval" / "parts-x", names, num_views=1, fusion="sum_logits") if one.key in keys]
    assert facts["num_videos"] == len(judged) == len(keys)
    assert facts["top1"] == pytest.approx(np.mean([one.right for one in judged]))
    assert facts["loss"] == pytest.approx(-np.mean([one.truth_log for one in judged]), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval": {"every": "2 epochs"}}, r"eval\.every: got '2 epochs', expected data\.choose_split or"),
        ({"eval": {"every": "often"}}, "got 'often': expected a number of epochs"),
        ({"eval": {"every": "0.5 steps"}}, "got '0.5 steps': expected a number of epochs"),
        ({"data": {"choose_split": "val"}}, r"data\.choose_split: got 'val', expected a split that is neither"),
        ({"data": {"choose_split": "dev", "choose_fraction": 0.1}}, r"data\.choose_fraction: got 0\.1, expected 0"),
        ({"checkpoint": {"every": 200, "keep_every": 300}}, r"checkpoint\.keep_every: got 300, expected 0 \(off\) or a multiple"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(values, where="x")


def test_intervals_are_steps() -> None:
    recipe = parse_overrides({"data": {"choose_split": "dev"}}, ["eval.every=2 epochs"])
    assert recipe.eval.every_steps(25.5) == 51
    assert parse_overrides({"data": {"choose_split": "dev"}}, ["eval.every=500 steps"]).eval.every_steps(25.5) == 500
    assert parse_overrides({}, []).eval.every_steps(25.5) is None
