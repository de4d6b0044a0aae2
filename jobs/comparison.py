"""Several runs side by side in one HTML file: results, what is different in their recipes, curves, classes, and where they disagree.

The first run is the one that the others are compared with. Runs judged on the same videos are compared video by video: of two accuracies
that share their videos only the videos on which they differ say anything, and of those the exact sign test (McNemar's) says how easily
chance would split them as unevenly.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.charts import Chart, overlay_chart, percent
from jobs.curves import History, read_history
from jobs.errors import JobError
from jobs.inline_video import inline_videos
from jobs.page import Card, Verdict, flat, read_mapping, template
from jobs.report import NUM_VIDEOS, dataset_folder, rows_of, split_source
from jobs.results import Evaluation, read_evaluation, same_videos, sign_test, wilson
from jobs.run_folder import write_text
from pipeline.errors import PipelineError
from pipeline.index import Dataset

MAX_RUNS = 8  # as many as there are colours
MAX_CLASSES = 40  # shown in the table of classes, those that differ most
ABSENT = "–"  # noqa: RUF001 - a dash for people: the key is not in this run's recipe
NOT_COMPARED = frozenset({"run.dir", "version"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run of the page. file: of its evaluation. evaluation: None where there is none that can be shown."""

    name: str
    folder: Path
    file: str
    recipe: Mapping[str, object]
    history: History
    evaluation: Evaluation | None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of its top-1."""
        return wilson(self.evaluation.top1, self.evaluation.num_videos) if self.evaluation else (0.0, 1.0)

    @property
    def clips_per_s(self) -> float:
        return self.history.clips / self.history.busy_s if self.history.busy_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The run at place `other` against the first one, over the videos both judged: how many are right in both, in one only, in neither.

    chance: how often a split of the differing videos as uneven as this one comes by chance (exact sign test, two-sided).
    """

    other: int
    both: int
    first_only: int
    other_only: int
    neither: int
    chance: float

    @property
    def num(self) -> int:
        return self.both + self.first_only + self.other_only + self.neither

    @property
    def gain(self) -> float:
        """Of the other in top-1, -1 to 1."""
        return (self.other_only - self.first_only) / self.num


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """One class: its videos, each run's recall, and per other run (gain in recall, right only in the first, only in the other)."""

    name: str
    num: int
    recalls: list[float | None]
    against: list[tuple[float, int, int]]


def write_comparison(sources: Sequence[Path], out: Path, *, num_videos: int = NUM_VIDEOS) -> Path:
    """Writes the page for 2 to MAX_RUNS sources, each a run folder or an evaluation's JSON file in one, and returns its path.

    Raises JobError for a source that is neither.
    """
    if not 2 <= len(sources) <= MAX_RUNS:
        raise JobError(f"A comparison has 2 to {MAX_RUNS} runs, got {len(sources)}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(sources, num_videos=num_videos))
    return out


def render(sources: Sequence[Path], *, num_videos: int = NUM_VIDEOS) -> str:
    """The page as text, with up to `num_videos` videos playing on it."""
    notes: list[str] = []
    runs = [_read_run(source, name, notes) for source, name in zip(sources, names(sources), strict=True)]
    judged = [run.evaluation for run in runs if run.evaluation is not None]
    comparable = len(judged) == len(runs) and same_videos(judged)
    if judged and not comparable:
        notes.append("The runs were not all judged on the same videos, so they are not compared video by video.")
    if len({(e.eval.clips, e.eval.crops, e.eval.flip) for e in judged}) > 1:
        notes.append("The runs were judged in different views; part of the difference may come from that.")
    return template("comparison.html.j2").render(
        names=[run.name for run in runs],
        runs=runs,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        notes=notes,
        comparable=comparable,
        best=best(runs),
        pairs=[paired(judged[0], judged[i], i) for i in range(1, len(judged))] if comparable else [],
        differences=differences([run.recipe for run in runs]),
        charts=charts(runs),
        classes=class_rows(judged) if comparable else [],
        max_classes=MAX_CLASSES,
        cards=_cards(runs, num_videos) if comparable else [],
    )


def names(sources: Sequence[Path]) -> list[str]:
    """A name for each source: its folder's, with as many of the folders above as it takes to tell all apart; then the evaluation's file."""
    folders = [(source.parent if source.suffix == ".json" else source).resolve() for source in sources]
    suffixes = [
        f" · {source.stem.removeprefix('eval-')}" if source.suffix == ".json" and source.stem != "eval" else "" for source in sources
    ]
    depth = 1
    while depth < max(len(folder.parts) for folder in folders):
        found = ["/".join(folder.parts[-depth:]) + suffix for folder, suffix in zip(folders, suffixes, strict=True)]
        if len(set(found)) == len(set(zip(folders, suffixes, strict=True))):
            return found
        depth += 1
    return [f"{folder}{suffix}" for folder, suffix in zip(folders, suffixes, strict=True)]


def _read_run(source: Path, name: str, notes: list[str]) -> RunFacts:
    folder, file = split_source(source)
    evaluation = None
    try:
        evaluation = read_evaluation(folder / file)
    except FileNotFoundError:
        notes.append(f"{name} is not evaluated yet. Run: posmlp eval {folder}")
    except JobError as error:
        notes.append(f"{name}: {error}")
    recipe = read_mapping(folder / "recipe.yaml", notes)
    return RunFacts(
        name=name, folder=folder, file=file, recipe=recipe, history=read_history(folder / "metrics.jsonl"), evaluation=evaluation
    )


def best(runs: Sequence[RunFacts]) -> dict[str, float]:
    """Column -> the best value in it, to be marked; columns that are the same in all runs are left out."""
    columns: dict[str, tuple[list[float | None], bool]] = {
        "top1": ([run.evaluation.top1 if run.evaluation else None for run in runs], True),
        "top5": ([run.evaluation.top5 if run.evaluation else None for run in runs], True),
        "mean_recall": ([run.evaluation.mean_recall if run.evaluation else None for run in runs], True),
        "ece": ([run.evaluation.calibration.ece if run.evaluation else None for run in runs], False),
        "nll": ([run.evaluation.calibration.nll if run.evaluation else None for run in runs], False),
    }
    found = {}
    for name, (values, high) in columns.items():
        known = [value for value in values if value is not None]
        if len(set(known)) > 1:
            found[name] = max(known) if high else min(known)
    return found


def paired(first: Evaluation, other: Evaluation, place: int) -> Paired:
    """Counts over the same videos."""
    rights = [(a.right, b.right) for a, b in zip(first.videos, other.videos, strict=True)]
    first_only, other_only = rights.count((True, False)), rights.count((False, True))
    return Paired(
        other=place,
        both=rights.count((True, True)),
        first_only=first_only,
        other_only=other_only,
        neither=rights.count((False, False)),
        chance=sign_test(first_only, other_only),
    )


def differences(recipes: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values are not the same in all recipes, with each recipe's value."""
    plain = [dict(flat(recipe)) for recipe in recipes]
    keys = dict.fromkeys(key for values in plain for key in values if key not in NOT_COMPARED)
    rows = [(key, [values.get(key, ABSENT) for values in plain]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """The curves that have points, of all runs in one chart each; a run that is there with several evaluations is drawn once."""
    folders = [run.folder.resolve() for run in runs]
    curves = {
        name: [(place, run.name, run.history.curves[name]) for place, run in enumerate(runs) if folders.index(folders[place]) == place]
        for name in ("loss", "lr", "clips_per_s", "data_wait")
    }
    drawn = [
        overlay_chart(curves["loss"], title="Training loss"),
        overlay_chart(curves["lr"], title="Learning rate", zero=True),
        overlay_chart(curves["clips_per_s"], title="Throughput", unit="clips/s", zero=True),
        overlay_chart(curves["data_wait"], title="Waiting for data", zero=True, text=percent),
    ]
    return [chart for chart in drawn if chart is not None]


def class_rows(judged: Sequence[Evaluation]) -> list[ClassRow]:
    """Classes with videos; those on which the runs differ most come first."""
    first, rows = judged[0], []
    for label, name in enumerate(first.classes):
        places = [place for place, video in enumerate(first.videos) if video.label == label]
        rights = [[evaluation.videos[place].right for place in places] for evaluation in judged]
        if not places:
            continue
        counts = [
            (sum(a > b for a, b in zip(rights[0], right, strict=True)), sum(a < b for a, b in zip(rights[0], right, strict=True)))
            for right in rights[1:]
        ]
        against = [((won - lost) / len(places), lost, won) for lost, won in counts]
        rows.append(ClassRow(name=name, num=len(places), recalls=[sum(right) / len(places) for right in rights], against=against))
    return sorted(rows, key=lambda row: (-max(abs(gain) for gain, _, _ in row.against), -row.num, row.name))


def _cards(runs: Sequence[RunFacts], num: int) -> list[Card]:
    """Videos that some runs have right and others wrong, the surest of the mistakes first."""
    judged = [run.evaluation for run in runs if run.evaluation is not None]
    try:
        dataset = Dataset.open(dataset_folder(runs[0].folder, runs[0].recipe))
    except (PipelineError, OSError):
        return []
    rows = rows_of(dataset, runs[0].recipe, judged[0])
    if rows is None:
        return []

    def surest(place: int) -> float:
        return max(evaluation.videos[place].confidence for evaluation in judged if not evaluation.videos[place].right)

    split = [place for place in range(len(rows)) if len({evaluation.videos[place].right for evaluation in judged}) > 1]
    places = {rows[place]: place for place in sorted(split, key=lambda place: (-surest(place), place))}
    return [
        Card(
            key=judged[0].videos[places[row]].key,
            truth=judged[0].name(judged[0].videos[places[row]].label),
            video=shown,
            verdicts=[_verdict(i, evaluation, places[row]) for i, evaluation in enumerate(judged)],
        )
        for row, shown in inline_videos(dataset, list(places), num=num).items()
    ]


def _verdict(run: int, evaluation: Evaluation, place: int) -> Verdict:
    video = evaluation.videos[place]
    predicted = evaluation.name(video.top[0]) if video.top else "not judged"
    return Verdict(run=run, predicted=predicted, confidence=video.confidence, truth=video.truth, right=video.right)
