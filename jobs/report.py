"""posmlp report: one HTML file that shows a run, whole in itself: no script, no request, nothing to install.

Every part of a run folder may be missing or half-written (the run still trains, nothing is evaluated yet): the page then says so.
Whatever comes from files is text to be escaped, never markup: names of videos and classes are other people's.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pydantic
import yaml

from jobs import info
from jobs.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Span, duration, line_chart, num_bytes, percent, short, time_unit
from jobs.curves import Attempt, History, read_events, read_history
from jobs.run_folder import write_text
from pipeline.errors import PipelineError

MAX_FILE_BYTES = 64 << 20  # of a JSON or YAML file; the confusion matrix of 2000 classes is 20 MB
MAX_MATRIX = 40  # classes; above, the most confused pairs say more than a matrix
MAX_PAIRS = 25
MAX_ROWS = 40  # of a list of videos
MAX_BARS = 24  # classes shown before the rest is folded away


class ClassResult(pydantic.BaseModel):
    """One class in `eval.json`: number of videos, share of them right (None without videos)."""

    num: int
    top1: float | None = None


class Baseline(pydantic.BaseModel):
    """A simpler model to compare with."""

    name: str
    top1: float


class FailedVideo(pydantic.BaseModel):
    """A video that could not be judged."""

    key: str
    reason: str


class Evaluation(pydantic.BaseModel):
    """What the report uses of `eval.json`; shares from 0 to 1. confusion: rows truth, columns prediction."""

    split: str
    num_videos: int
    num_failed: int = 0
    views: int = 1
    top1: float
    top5: float
    chance: float
    step: int
    dataset_fingerprint: str = ""
    classes: list[str] = []
    per_class: dict[str, ClassResult] = {}
    confusion: list[list[int]] = []
    failed: list[FailedVideo] = []
    baseline: Baseline | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A gang that ended before its work was done, and what that cost.

    reached, resumed: the last step it had finished, and the one its successor started after. redone, redone_s: steps done again and
    the seconds they had taken. pause_s: from its last finished step to the next one of the run, NaN while there is none.
    """

    what: str
    reached: int
    resumed: int
    redone: int
    redone_s: float
    pause_s: float
    workers: str
    at: float  # seconds since the run began

    def __str__(self) -> str:
        left = self.reached - self.resumed - self.redone
        cost = f"{self.redone} steps ({duration(self.redone_s)} of work) done again" if self.redone else "no step lost" if left <= 0 else ""
        cost = ", ".join(filter(None, [cost, f"{left} steps to do again" if left > 0 else ""]))
        pause = "" if math.isnan(self.pause_s) else f", {duration(self.pause_s)} from its last step to the next"
        return f"{self.what} after step {self.reached}: resumed from step {self.resumed}, {cost}{pause}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """`count` videos of class `truth` were taken for `predicted`, a `share` of them."""

    truth: str
    predicted: str
    count: int
    share: float


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run folder, replacing an old one as a whole, and returns its path."""
    path = run_dir / "report.html"
    write_text(path, render(run_dir))
    return path


def kills(run_dir: Path) -> list[str]:
    """A sentence for each time the run was stopped and resumed: where, and what it cost."""
    return [str(stop) for stop in stops(read_history(run_dir / "metrics.jsonl"))]


def render(run_dir: Path) -> str:
    """The page as text."""
    notes: list[str] = []
    recipe = _read(run_dir / "recipe.yaml", notes)
    history = read_history(run_dir / "metrics.jsonl")
    evaluation = _evaluation(run_dir / "eval.json", notes)
    dataset = _dataset(run_dir, recipe, notes)
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
    return _template().render(
        name=run_dir.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        state=state(history, evaluation, planned),
        planned=planned,
        history=history,
        charts=charts(history, found, len(evaluation.classes) if evaluation else 0),
        stops=found,
        evaluation=evaluation,
        interval=wilson(evaluation.top1, evaluation.num_videos) if evaluation else None,
        per_class=worst_first(evaluation) if evaluation else [],
        pairs=confused_pairs(evaluation) if evaluation else [],
        dataset=dataset,
        quarantined=_quarantined(dataset),
        damage=_damage(run_dir),
        recipe=_sections(recipe),
        environment=_sections(_read(run_dir / "env.json", notes)),
        notes=notes,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        max_matrix=MAX_MATRIX,
        max_rows=MAX_ROWS,
        max_bars=MAX_BARS,
    )


def stops(history: History) -> list[Stop]:
    """Every end of a gang that another one followed, oldest first."""
    alive = [attempt for attempt in history.attempts if attempt.number]
    return [_stop(history, alive[: i + 1], alive[i + 1 :]) for i in range(len(alive) - 1)]


def _stop(history: History, before: Sequence[Attempt], after: Sequence[Attempt]) -> Stop:
    attempt, successor = before[-1], after[0]
    last_times = [a.last_time for a in before if not math.isnan(a.last_time)]
    next_times = [a.first_time for a in after if not math.isnan(a.first_time)]
    pause = max(0.0, next_times[0] - last_times[-1]) if last_times and next_times and attempt.last else math.nan
    if attempt.reason is not None:
        what = attempt.reason[:1].upper() + attempt.reason[1:]
    else:
        what = "Continued after its end" if attempt.ended else "The run was stopped and started again"
    sizes = [str(a.world_size or "?") for a in (attempt, successor)]
    return Stop(
        what=what,
        reached=attempt.reached,
        resumed=successor.start,
        redone=attempt.redone,
        redone_s=attempt.redone_s,
        pause_s=pause,
        workers=sizes[0] if sizes[0] == sizes[1] else " to ".join(sizes),
        at=(last_times[-1] if last_times else history.began) - history.began,
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
        line_chart(curves["lr"], title="Learning rate", spans=lost, zero=True, smooth=False),
        line_chart(curves["grad_norm"], title="Gradient norm", spans=lost, zero=True),
        line_chart(curves["clips_per_s"], title="Throughput", unit="clips/s", spans=lost, zero=True),
        line_chart(curves["data_wait"], title="Waiting for data", spans=lost, zero=True, text=percent),
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


def wilson(share: float, num: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `num` videos (Wilson 1927): what another draw of videos might show."""
    if num < 1:
        return 0.0, 1.0
    z = 1.96
    centre, half = share + z * z / (2 * num), z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, (centre - half) / (1 + z * z / num)), min(1.0, (centre + half) / (1 + z * z / num))


def worst_first(evaluation: Evaluation) -> list[tuple[str, ClassResult]]:
    """Classes with videos, the least accurate first, of equal ones the larger."""
    judged = [(name, result) for name, result in evaluation.per_class.items() if result.top1 is not None]
    return sorted(judged, key=lambda pair: (pair[1].top1, -pair[1].num, pair[0]))


def confused_pairs(evaluation: Evaluation) -> list[Pair]:
    """The pairs of classes most often taken for each other, most frequent first."""
    names = evaluation.classes
    wrong = [
        Pair(truth=names[i], predicted=names[j], count=count, share=count / sum(row))
        for i, row in enumerate(evaluation.confusion[: len(names)])
        for j, count in enumerate(row[: len(names)])
        if count > 0 and i != j
    ]
    return sorted(wrong, key=lambda pair: (-pair.count, -pair.share, pair.truth, pair.predicted))[:MAX_PAIRS]


def _evaluation(path: Path, notes: list[str]) -> Evaluation | None:
    values = _read(path, notes)
    if not values:
        return None
    try:
        return Evaluation.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        notes.append(f"eval.json cannot be shown: {'.'.join(map(str, first['loc']))}: {first['msg']}. Run 'posmlp eval' again.")
        return None


def _dataset(run_dir: Path, recipe: Mapping[str, object], notes: list[str]) -> dict[str, object]:
    data = recipe.get("data")
    stated = data.get("dir") if isinstance(data, dict) else None
    root = Path(str(stated)) if stated else run_dir / "dataset"
    try:
        return info.run(root)
    except (PipelineError, OSError, ValueError, TypeError, KeyError) as error:  # a damaged dataset must not hide the run
        notes.append(f"The dataset cannot be shown: {error}")
        return {}


def _quarantined(dataset: Mapping[str, object]) -> list[dict[str, object]]:
    """Up to MAX_ROWS rows of the dataset's quarantine list."""
    path = Path(str(dataset.get("folder", ""))) / "quarantine.parquet"
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


def _read(path: Path, notes: list[str]) -> dict[str, object]:
    """A YAML or JSON mapping; empty, with a note, where the file is missing or unreadable."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"got a {type(values).__name__}, expected sections")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    return values


def _sections(values: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """A nested mapping as sections of dotted keys and texts; what is in no section comes first, under ""."""
    sections: dict[str, dict[str, str]] = {"": {}}
    for name, value in values.items():
        if isinstance(value, dict):
            sections[str(name)] = dict(_flat(value))
        else:
            sections[""][str(name)] = _text(value)
    return {name: rows for name, rows in sections.items() if rows}


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", _text(value))]
    return rows


def _text(value: object) -> str:
    if value is None:
        return "–"  # noqa: RUF001 - a dash for people
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"short": short, "percent": percent, "duration": duration, "bytes": num_bytes, "count": lambda n: f"{n:,}"}
    return environment.get_template("report.html.j2")
