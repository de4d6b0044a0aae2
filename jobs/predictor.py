"""What a trained model sees in any video file.

The videos become a small dataset of their own in a temporary folder: read in the limited child process of the build, brought to the
form that the model was trained on; its items are whole videos and, of long ones, windows. Then `evaluate.worker` judges them. So a
prediction is what evaluation would say of the same file, by construction.
"""

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import click
import numpy as np

from cluster.checkpoint import Checkpoint
from cluster.options import LaunchOptions
from jobs.beside import beside
from jobs.errors import JobError, user_errors
from jobs.evaluate import POLL_S
from jobs.loose_videos import SPLIT, SPLIT_COLUMN, LooseVideo, gather
from jobs.predictions import DIGITS, Prediction, finished_parts, merge
from jobs.progress import Progress
from jobs.recipe import Recipe
from jobs.run_folder import checkpoints, recipe_of
from jobs.sliding import Sliding, clip_seconds
from pipeline.errors import DatasetError
from pipeline.index import Dataset
from pipeline.keyed import KEYED_VERSION
from pipeline.options import EncodeOptions

GROUP = 64  # videos that are judged together: bounds the temporary folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A class and its share of the model's belief, 0 to 1."""

    name: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What is seen in [start_s, end_s) seconds: the best classes, best first."""

    start_s: float
    end_s: float
    top: list[Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoPrediction:
    """One video: its best classes, best first, as evaluation judges the whole of it, and its timeline; or the error why not.

    num_frames, fps, duration_s: of the form in which the model sees it. windows: none where one look is enough.
    """

    path: str
    error: str | None = None
    num_frames: int = 0
    fps: float = 0.0
    duration_s: float = 0.0
    top: list[Score] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """A run's newest whole checkpoint, its classes, and how it wants to see videos.

    typical_s: median seconds of the videos that it learned from, None where they are not there any more.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    classes: list[str]
    encode: EncodeOptions
    typical_s: float | None

    def seconds_seen(self, fps: float) -> float | None:
        """Seconds of a video of this rate that one look was trained to see."""
        return clip_seconds(self.recipe.clip, fps) or self.typical_s


def load(run_dir: Path) -> Predictor:
    """What a run has learned so far. Raises RecipeError (no run folder), CheckpointError, JobError (no checkpoint yet)."""
    recipe = recipe_of(run_dir)
    expect = {"version.keyed": KEYED_VERSION, **recipe.numerics()}
    checkpoint = checkpoints(recipe).newest(expect, warn=lambda text: click.echo(f"warning: {text}", err=True))
    if checkpoint is None:
        raise JobError(f"{run_dir} has no checkpoint yet. Train first: posmlp train {run_dir / 'recipe.yaml'}")
    classes = checkpoint.meta["classes"]
    assert isinstance(classes, list)
    dataset = _trained_on(recipe, checkpoint)
    if dataset is None:
        click.echo(
            f"warning: {recipe.dataset_dir} does not hold the dataset of this run any more; "
            "videos are brought to the form that the recipe's data.encode says.",
            err=True,
        )
        return Predictor(recipe=recipe, checkpoint=checkpoint, classes=classes, encode=recipe.data.encode, typical_s=None)
    options = {name.removeprefix("encode."): value for name, value in dataset.info.build.items() if name.startswith("encode.")}
    encode = EncodeOptions(**options)  # type: ignore[arg-type]  # as the build wrote them
    return Predictor(recipe=recipe, checkpoint=checkpoint, classes=classes, encode=encode, typical_s=_median_seconds(dataset))


def _trained_on(recipe: Recipe, checkpoint: Checkpoint) -> Dataset | None:
    try:
        dataset = Dataset.open(recipe.dataset_dir)
    except DatasetError:
        return None
    return dataset if dataset.info.fingerprint == checkpoint.meta["dataset"] else None


def _median_seconds(dataset: Dataset) -> float:
    frames = dataset.column("end").astype(np.int64) - dataset.column("begin").astype(np.int64)
    return float(np.median((frames / dataset.column("fps").astype(np.float64))[dataset.kept()]))


def predictions(predictor: Predictor, videos: Sequence[Path], sliding: Sliding) -> Iterator[VideoPrediction]:
    """One prediction per video, in their order, as they are made; one that cannot be judged has an error, the others go on.

    Raises PipelineError, ClusterError or OSError where nothing can be judged: damaged weights, no room for temporary files.
    """
    for first in range(0, len(videos), GROUP):
        with tempfile.TemporaryDirectory(prefix="posmlp-predict-") as folder:
            yield from _judge_group(predictor, videos[first : first + GROUP], sliding, Path(folder))


def _judge_group(predictor: Predictor, paths: Sequence[Path], sliding: Sliding, folder: Path) -> list[VideoPrediction]:
    read = gather(
        paths,
        folder,
        classes=predictor.classes,
        encode=predictor.encode,
        limits=predictor.recipe.data.limits,
        min_frames=min(2, predictor.recipe.clip.num_frames),
        windows=lambda report: sliding.over(report.num_frames, report.fps, predictor.seconds_seen(report.fps)),
    )
    num_items = sum(1 + len(video.windows) for video in read if isinstance(video, LooseVideo))
    judged = _judge(predictor, folder, num_items) if num_items else iter(())
    return [
        _prediction(path, video, next(judged), list(islice(judged, len(video.windows))), predictor.classes)
        if isinstance(video, LooseVideo)
        else VideoPrediction(path=click.format_filename(path), error=video)
        for path, video in zip(paths, read, strict=True)
    ]


def _judge(predictor: Predictor, folder: Path, num_items: int) -> Iterator[Prediction]:
    """What evaluation says of each of the `num_items` items in `folder`, in their order."""
    from cluster.launch import launch

    recipe, parts = predictor.recipe, folder / "parts"
    parts.mkdir()
    num_views = recipe.eval.num_views
    data = recipe.data.model_copy(update={"dir": folder, "split_column": SPLIT_COLUMN, "val_split": SPLIT})
    judging = recipe.eval.model_copy(update={"micro_batch": min(recipe.eval.micro_batch, num_items * num_views)})
    asked = recipe.model_copy(update={"data": data, "eval": judging})
    total = -(-num_items * num_views // judging.micro_batch)
    dataset = Dataset.open(folder)
    with Progress("predicting", total=total, unit="batches") as progress, _follow(parts, progress):
        launch(
            "jobs.evaluate:worker",
            {
                "recipe": asked.model_dump(mode="json"),
                "checkpoints": [predictor.checkpoint.number],
                "parts": str(parts),
                "dataset": dataset.info.fingerprint,
            },
            run_dir=folder / "gang",
            num_micro_batches=1,
            options=LaunchOptions(launcher="local", workers=1),
            on_event=lambda event: None,
            user_errors=user_errors(),
        )
    keys = [dataset.text("key", row) for row in range(num_items)]
    return iter(merge(parts, keys, num_views=num_views, fusion=recipe.eval.fusion))


def _follow(parts: Path, progress: Progress) -> AbstractContextManager[None]:
    """Shows batches on `progress` as they are finished."""

    def watch(stop: threading.Event) -> None:
        shown = 0
        while True:
            last = stop.wait(POLL_S)
            now = len(finished_parts(parts))
            progress.advance(now - shown)
            shown = now
            if last:
                return

    return beside(watch)


def _prediction(path: Path, video: LooseVideo, whole: Prediction, windows: list[Prediction], classes: list[str]) -> VideoPrediction:
    name = click.format_filename(path)
    failed = next((judged.failed for judged in (whole, *windows) if judged.failed is not None), None)
    if failed is not None:
        return VideoPrediction(path=name, error=f"{name}: {failed}.")
    timeline = [
        Window(start_s=video.seconds(begin), end_s=video.seconds(end), top=_scores(judged, classes))
        for (begin, end), judged in zip(video.windows, windows, strict=True)
    ]
    return VideoPrediction(
        path=name,
        num_frames=video.report.num_frames,
        fps=video.report.fps,
        duration_s=video.seconds(video.report.num_frames),
        top=_scores(whole, classes),
        windows=timeline,
    )


def _scores(judged: Prediction, classes: list[str]) -> list[Score]:
    return [Score(name=classes[place], score=round(score, DIGITS)) for place, score in zip(judged.top, judged.scores, strict=True)]
