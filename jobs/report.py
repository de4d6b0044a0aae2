"""posmlp report: one HTML file that shows a run, whole in itself: no script, no request, nothing to install.

Every part of a run folder may be missing or half-written (the run still trains, nothing is evaluated yet): the page then says so.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs import info
from jobs.charts import Chart, Span, line_chart, percent, time_unit
from jobs.curves import History, read_events, read_history
from jobs.errors import JobError
from jobs.inline_video import inline_videos
from jobs.page import Card, Verdict, read_mapping, sections, template
from jobs.results import Evaluation, confused_pairs, read_evaluation, wilson, worst_first, worst_videos
from jobs.run_folder import write_text
from jobs.stops import Stop, stops
from pipeline.errors import PipelineError
from pipeline.index import Dataset
from pipeline.location import Location, location

NUM_VIDEOS = 12  # that play on a page
MAX_MATRIX = 40  # classes; above, the most confused pairs say more than a matrix
MAX_ROWS = 40  # of a list of videos
MAX_BARS = 24  # classes shown before the rest is folded away


def write_report(source: Path, *, out: Path | None = None, num_videos: int = NUM_VIDEOS) -> Path:
    """Writes the page about a run, replacing an old one as a whole, and returns its path: `out`, or `report.html` in the run folder.

    source: the run folder, or an evaluation's JSON file in it, which is then shown instead of `eval.json`.
    Raises JobError where `source` is neither.
    """
    run_dir, file = split_source(source)
    path = out or run_dir / ("report.html" if file == "eval.json" else f"report-{Path(file).stem.removeprefix('eval-')}.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(run_dir, file=file, num_videos=num_videos))
    return path


def split_source(source: Path) -> tuple[Path, str]:
    """(run folder, name of the evaluation's file) of a run folder or of an evaluation in one. Raises JobError for anything else."""
    if source.suffix == ".json" and not source.is_dir():
        if not source.is_file():
            raise JobError(f"{source}: there is no such evaluation. Make it first: posmlp eval {source.parent}")
        source, file = source.parent, source.name
    else:
        file = "eval.json"
    if not any((source / name).is_file() for name in ("recipe.yaml", "metrics.jsonl", file)):
        raise JobError(f"{source} is not a run folder: it has no recipe.yaml. Train first: posmlp train RECIPE run.dir={source}")
    return source, file


def kills(run_dir: Path) -> list[str]:
    """A sentence for each time the run was stopped and resumed: where, and what it cost."""
    return [str(stop) for stop in stops(read_history(run_dir / "metrics.jsonl"))]


def render(run_dir: Path, *, file: str = "eval.json", num_videos: int = NUM_VIDEOS) -> str:
    """The page as text, about the evaluation in `file`, with up to `num_videos` videos playing on it."""
    notes: list[str] = []
    recipe = read_mapping(run_dir / "recipe.yaml", notes)
    history = read_history(run_dir / "metrics.jsonl")
    evaluation = _evaluation(run_dir / file, notes)
    root = dataset_folder(run_dir, recipe)
    dataset = _dataset(root, notes)
    found = stops(history)
    if history.torn:
        notes.append(f"metrics.jsonl has {history.torn} torn line(s), as a kill leaves them; they are not in the curves.")
    if history.nonfinite:
        notes.append(f"The loss of {history.nonfinite} step(s) was no finite number; they are left out of the curves.")
    if evaluation and history.last_step and evaluation.step != history.last_step:
        notes.append(f"The evaluation is of step {evaluation.step}, training has reached step {history.last_step}.")
    if evaluation and dataset and evaluation.dataset_fingerprint not in ("", dataset["fingerprint"]):
        notes.append("The evaluation is of another dataset than the one there is now. Run 'posmlp eval' again.")
    planned = planned_epochs(recipe, history)
    return template("report.html.j2").render(
        name=run_dir.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        state=state(history, evaluation, planned),
        planned=planned,
        history=history,
        charts=charts(history, found, len(evaluation.classes) if evaluation else 0),
        stops=found,
        evaluation=evaluation,
        file=file,
        others=_others(run_dir, file, notes),
        guess=math.log(len(evaluation.classes)) if evaluation and evaluation.classes else 0.0,
        interval=wilson(evaluation.top1, evaluation.num_videos) if evaluation else None,
        per_class=worst_first(evaluation) if evaluation else [],
        pairs=confused_pairs(evaluation) if evaluation else [],
        cards=_cards(root, recipe, evaluation, num_videos) if evaluation and dataset else [],
        dataset=dataset,
        quarantined=_quarantined(dataset),
        damage=_damage(run_dir),
        recipe=sections(recipe),
        environment=sections(read_mapping(run_dir / "env.json", notes)),
        notes=notes,
        max_matrix=MAX_MATRIX,
        max_rows=MAX_ROWS,
        max_bars=MAX_BARS,
    )


def charts(history: History, found: Sequence[Stop], num_classes: int) -> list[Chart]:
    """The curves that have points."""
    lost = [Span(begin=stop.resumed, end=max(stop.reached, stop.resumed), text=str(stop)) for stop in found if stop.reached]
    pauses = [Span(begin=stop.at, end=stop.at + stop.pause_s, text=str(stop)) for stop in found if not math.isnan(stop.pause_s)]
    guess = (math.log(num_classes), "uniform guess") if num_classes > 1 else None
    scale, unit = time_unit(history.progress.x[-1] if history.progress.x else 0.0)
    curves = history.curves
    drawn = [
        line_chart(curves["loss"], title="Training loss", spans=lost, reference=guess),
        line_chart(history.choice, title="Top-1 while training", spans=lost, zero=True, smooth=False, text=percent),
        line_chart(history.choice_loss, title="Validation loss while training", spans=lost, smooth=False),
        line_chart(curves["lr"], title="Learning rate", spans=lost, zero=True, smooth=False),
        line_chart(curves["grad_norm"], title="Gradient norm", spans=lost, zero=True),
        line_chart(curves["clips_per_s"], title="Throughput", unit="clips/s", spans=lost, zero=True),
        line_chart(curves["data_wait"], title="Waiting for data", spans=lost, zero=True, text=percent),
        line_chart(curves["flops_share"], title="Share of the device's operations", spans=lost, zero=True, text=percent),
        line_chart(history.progress, title="Progress", unit="steps", x_label=unit, x_scale=scale, smooth=False, zero=True, spans=pauses),
    ]
    return [chart for chart in drawn if chart is not None]


def planned_epochs(recipe: Mapping[str, object], history: History) -> float | None:
    """Epochs the recipe asks for; from steps where it counts those. None where neither recipe nor metrics say."""
    train = recipe.get("train")
    if not isinstance(train, dict):
        return None
    steps, epochs = train.get("steps"), train.get("epochs")
    if isinstance(steps, int) and history.last_step and history.epoch:
        return steps * history.epoch / history.last_step
    return float(epochs) if isinstance(epochs, int | float) and not isinstance(steps, int) else None


def state(history: History, evaluation: Evaluation | None, planned: float | None) -> str:
    """Where the run is, in a few words."""
    if not history.last_step:
        return "not trained yet"
    if not any(attempt.ended for attempt in history.attempts):
        share = f", {percent(min(1.0, history.epoch / planned))} of the way" if planned else ""
        return f"not finished: step {history.last_step}{share}"
    return "trained and evaluated" if evaluation else "trained, not evaluated yet"


def rows_of(dataset: Dataset, recipe: Mapping[str, object], evaluation: Evaluation) -> list[int] | None:
    """Index row of each of the evaluation's videos; None where the dataset is not the one that was evaluated."""
    data = recipe.get("data")
    column = str(data.get("split_column", "split")) if isinstance(data, dict) else "split"
    if evaluation.dataset_fingerprint != dataset.info.fingerprint or evaluation.split not in dataset.info.splits.get(column, []):
        return None
    rows: list[int] = dataset.rows(column, evaluation.split).tolist()
    return rows if len(rows) == len(evaluation.videos) else None


def _cards(root: Location, recipe: Mapping[str, object], evaluation: Evaluation, num: int) -> list[Card]:
    """The surest mistakes first, then what is right by the narrowest margin."""
    dataset = Dataset.open(root)
    rows = rows_of(dataset, recipe, evaluation)
    if rows is None:
        return []
    places = {rows[place]: place for place in worst_videos(evaluation)}
    cards = []
    for row, shown in inline_videos(dataset, list(places), num=num).items():
        video = evaluation.videos[places[row]]
        verdict = Verdict(run=0, predicted=evaluation.name(video.top[0]), confidence=video.confidence, truth=video.truth, right=video.right)
        cards.append(Card(key=video.key, truth=evaluation.name(video.label), video=shown, verdicts=[verdict]))
    return cards


def _evaluation(path: Path, notes: list[str]) -> Evaluation | None:
    try:
        return read_evaluation(path)
    except FileNotFoundError:
        return None
    except JobError as error:
        notes.append(str(error))
        return None


def _others(run_dir: Path, file: str, notes: list[str]) -> list[tuple[str, Evaluation]]:
    """The run's evaluations beside `file`: in other views, or of averaged checkpoints, each with its file's name."""
    paths = [path for path in sorted(run_dir.glob("eval*.json")) if path.name != file]
    found = [(path.name, _evaluation(path, notes)) for path in paths]
    return [(name, evaluation) for name, evaluation in found if evaluation is not None]


def dataset_folder(run_dir: Path, recipe: Mapping[str, object]) -> Location:
    """Where the recipe says that the dataset is."""
    data = recipe.get("data")
    stated = data.get("dir") if isinstance(data, dict) else None
    return location(str(stated)) if stated else run_dir / "dataset"


def _dataset(root: Location, notes: list[str]) -> dict[str, object]:
    try:
        return info.run(root)
    except (PipelineError, OSError, ValueError, TypeError, KeyError) as error:  # a damaged dataset must not hide the run
        notes.append(f"The dataset cannot be shown: {error}")
        return {}


def _quarantined(dataset: Mapping[str, object]) -> list[dict[str, object]]:
    """Up to MAX_ROWS rows of the dataset's quarantine list."""
    path = Path(str(dataset.get("quarantine_list", "")))
    if not dataset or not path.is_file():
        return []
    import pyarrow.parquet  # only here

    batch = next(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=MAX_ROWS), None)
    return [] if batch is None else [dict(row) for row in batch.to_pylist()]


def _damage(run_dir: Path) -> list[tuple[dict[str, object], int]]:
    """Damaged samples that training met, each with how often, most frequent first."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for path in sorted((run_dir / "damage").glob("rank-*.jsonl")):
        for event in read_events(path):
            if event and event["event"] == "damage":
                counts[str(event.get("key")), str(event.get("shard")), str(event.get("reason"))] += 1
    return [({"key": key, "shard": shard, "reason": reason}, count) for (key, shard, reason), count in counts.most_common()]
