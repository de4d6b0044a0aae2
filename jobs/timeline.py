"""What a model sees over time: the stretches of a long video, as lines for a terminal and as one page that is whole in itself."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import jinja2

from jobs.charts import percent, short, ticks, time_unit
from jobs.predictor import VideoPrediction
from jobs.run_folder import write_text

WIDTH, HEIGHT = 960, 260  # of the viewBox
LEFT, RIGHT, TOP, BOTTOM, RIBBON = 50, 14, 12, 40, 22
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")  # told apart by colour-blind people too
OTHER = "#8a8f98"
MAX_ROWS = 200  # stretches listed on the page


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """[begin_s, end_s) in which the same class is the best of all windows; score: its mean over them."""

    begin_s: float
    end_s: float
    name: str
    score: float

    def __str__(self) -> str:
        return f"{clock(self.begin_s)} to {clock(self.end_s)}  {self.score:.3f}  {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A class in the chart. path, dots: of its scores where it is among the best; gaps elsewhere."""

    name: str
    colour: str
    path: str
    dots: list[tuple[float, float]]


def owned(video: VideoPrediction) -> list[tuple[float, float]]:
    """[begin, end) in seconds that each window speaks for: up to half-way between its centre and its neighbours'."""
    centres = [(window.start_s + window.end_s) / 2 for window in video.windows]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(centres)), video.duration_s]
    return list(pairwise(edges))


def stretches(video: VideoPrediction) -> list[Stretch]:
    """The timeline with equal neighbours joined; they cover the video without gaps."""
    found = []
    pairs = zip(owned(video), video.windows, strict=True)
    for name, group in groupby(pairs, key=lambda pair: pair[1].top[0].name):
        spans, windows = zip(*group, strict=True)
        score = sum(window.top[0].score for window in windows) / len(windows)
        found.append(Stretch(begin_s=spans[0][0], end_s=spans[-1][1], name=name, score=score))
    return found


def clock(seconds: float) -> str:
    """Seconds as a player shows them: 1:02:03.5."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def as_text(video: VideoPrediction) -> str:
    """A prediction for people: the best classes and, where there are windows, the stretches."""
    lines = [f"{video.path}: {video.duration_s:g} s, {video.num_frames} frames"]
    lines += [f"  {score.score:.3f}  {score.name}" for score in video.top]
    if video.windows:
        lines += [f"  over time ({len(video.windows)} windows):", *(f"    {stretch}" for stretch in stretches(video))]
    return "\n".join(lines)


def write_page(path: Path, videos: Sequence[VideoPrediction], title: str) -> None:
    """One HTML file with a chart and a table per video that has a timeline; no script, no request."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clock"] = clock
    charts = [_chart(video) for video in videos if video.windows]
    page = environment.get_template("timeline.html.j2").render(title=title, charts=charts, other=OTHER)
    write_text(path, page)


def _chart(video: VideoPrediction) -> dict[str, object]:
    """What the template draws of one video; pixels of the viewBox."""
    span = max(video.duration_s, 1e-3)
    scale, unit = time_unit(span)
    begin, end, floor = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM - RIBBON
    levels = ticks(0, max(window.top[0].score for window in video.windows), 4)

    def x(seconds: float) -> float:
        return round(begin + seconds / span * (end - begin), 1)

    def y(score: float) -> float:
        return round(floor - score / levels[-1] * (floor - TOP), 1)

    colours = _colours(video)
    parts = zip(owned(video), video.windows, strict=True)
    ribbon = [
        {
            "x": x(since),
            "width": round(max(x(until) - x(since), 0.5), 1),
            "colour": colours.get(window.top[0].name, OTHER),
            "text": f"{clock(since)} to {clock(until)}: " + ", ".join(f"{score.name} {percent(score.score)}" for score in window.top[:3]),
        }
        for (since, until), window in parts
    ]
    marks = [value for value in ticks(0, span / scale, 8) if value * scale <= span]
    return {
        "video": video,
        "x_ticks": [(x(value * scale), short(value)) for value in marks],
        "y_ticks": [(y(value), percent(value)) for value in levels],
        "unit": unit,
        "lines": [_line(name, colour, _points(video, name, x, y)) for name, colour in colours.items()],
        "ribbon": ribbon,
        "others": any(window.top[0].name not in colours for window in video.windows),
        "stretches": stretches(video)[:MAX_ROWS],
        "more": max(0, len(stretches(video)) - MAX_ROWS),
        "box": {"width": WIDTH, "height": HEIGHT, "left": begin, "right": end, "top": TOP, "floor": floor, "ribbon": RIBBON},
    }


def _colours(video: VideoPrediction) -> dict[str, str]:
    """The classes that are best most often, each with its colour."""
    counts = Counter(window.top[0].name for window in video.windows)
    return dict(zip((name for name, _ in counts.most_common(len(COLOURS))), COLOURS, strict=False))


def _points(
    video: VideoPrediction, name: str, x: Callable[[float], float], y: Callable[[float], float]
) -> list[tuple[float, float] | None]:
    """Where each window's centre shows the class; None where it is not among the best, which says only that its score is low."""
    points: list[tuple[float, float] | None] = []
    for window in video.windows:
        score = next((score.score for score in window.top if score.name == name), None)
        points.append(None if score is None else (x((window.start_s + window.end_s) / 2), y(score)))
    return points


def _line(name: str, colour: str, points: Sequence[tuple[float, float] | None]) -> Line:
    path, drawing = "", False
    for point in points:
        if point is not None:
            path += f"{'L' if drawing else 'M'}{point[0]:g},{point[1]:g}"
        drawing = point is not None
    return Line(name=name, colour=colour, path=path, dots=[point for point in points if point is not None])
