"""posmlp data info --html: a dataset as one page that is complete in itself, with histograms, shares and a few of its videos.

Everything comes from the index's columns and the quarantine list; only the videos that play are read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jobs import quarantine_list
from jobs.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick, duration, num_bytes, short, ticks
from jobs.inline_video import InlineVideo, inline_videos
from jobs.page import sections, template
from pipeline.durable import committed
from pipeline.index import SPLIT_PREFIX, Dataset
from pipeline.location import Location
from pipeline.order import Order

BINS = 24  # about so many bars
MAX_BARS = 24  # classes that are shown at once; the rest unfolds
NUM_VIDEOS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar in pixels of the viewBox, with a text for the pointer."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """One chart. latest: the median, for the caption. summary: in words."""

    title: str
    x_label: str
    latest: str
    summary: str
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One row of a list of bars. share: of the longest, 0 to 1. text: what it means, "" where the name says it."""

    name: str
    num: int
    share: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A video that plays on the page."""

    key: str
    label: str
    video: InlineVideo


def write_card(root: Location, out: Path) -> Path:
    """Writes the page, whole or not at all, and returns its path. Raises DatasetError when there is no finished dataset."""
    page = render(root).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed(out) as file:
        file.write(page)
    return out


def render(root: Location) -> str:
    """The page. Raises DatasetError when there is no finished dataset."""
    dataset = Dataset.open(root)
    info = dataset.info
    out = quarantine_list.causes(quarantine_list.read(dataset))
    kept = dataset.kept()
    labels = np.bincount(dataset.column("label")[kept], minlength=len(info.classes)).tolist()
    splits = {}
    for column, names in info.splits.items():
        codes = dataset.column(SPLIT_PREFIX + column)[kept]
        counts = [(name, int((codes == code).sum())) for code, name in [*enumerate(names), (-1, "in none")]]
        splits[column] = _shares([(name, num) for name, num in counts if num])
    seconds = _seconds(dataset)[dataset.videos()]
    return template("data_card.html.j2").render(
        name=Path(root).resolve().name,
        info=info,
        num_items=dataset.num_kept,
        overlay=dataset.overlay,
        hours=float(seconds.sum()) / 3600,
        num_bytes=sum(shard.size for shard in info.shards),
        classes=sorted(_shares(list(zip(info.classes, labels, strict=True))), key=lambda each: (-each.num, each.name)),
        max_bars=MAX_BARS,
        splits=splits,
        causes=_shares([(cause.reason, cause.num) for cause in out], {cause.reason: cause.text for cause in out}),
        charts=_charts(dataset, seconds),
        samples=_samples(dataset),
        build=sections(info.build),
        libraries=info.libraries,
    )


def _seconds(dataset: Dataset) -> npt.NDArray[np.float64]:
    frames = dataset.column("end").astype(np.float64) - dataset.column("begin").astype(np.float64)
    rates = dataset.column("fps").astype(np.float64)
    return np.divide(frames, rates, out=np.zeros_like(frames), where=rates > 0)


def _charts(dataset: Dataset, seconds: npt.NDArray[np.float64]) -> list[Histogram]:
    def column(name: str) -> npt.NDArray[np.float64]:
        return dataset.column(name)[videos].astype(np.float64)

    videos = dataset.videos()
    sides = np.minimum(column("width"), column("height"))
    found = [
        histogram(column("end") - column("begin"), title="Length in frames", x_label="frames", whole=True),
        histogram(seconds, title="Length in time", x_label="seconds", write=duration),
        histogram(column("fps"), title="Frame rate", x_label="frames per second"),
        histogram(sides, title="Shorter side", x_label="pixels", whole=True),
        histogram(np.maximum(column("width"), column("height")) / np.maximum(sides, 1), title="Longer by shorter side", x_label="ratio"),
        histogram(column("size"), title="Stored bytes", x_label="bytes", whole=True, write=num_bytes),
    ]
    return [chart for chart in found if chart is not None]


def histogram(
    values: npt.NDArray[np.float64], *, title: str, x_label: str, whole: bool = False, write: Callable[[float], str] = short
) -> Histogram | None:
    """A histogram of (n,) values over round bins; None without a value. whole: the values are integers, and so are the bins' edges."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    edges = np.array(ticks(low, high, BINS))
    if whole and edges[1] - edges[0] < 1:
        edges = np.arange(np.floor(low), np.floor(high) + 2)
    if edges[-1] <= high:  # a bin holds [its lower edge, its upper edge)
        edges = np.append(edges, 2 * edges[-1] - edges[-2])
    counts, _ = np.histogram(values, edges)
    y_values = [value for value in ticks(0, float(counts.max()), 4) if not value % 1]
    floor, room = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT
    tall = (floor - TOP) / max(y_values[-1], float(counts.max()))
    wide = room / (edges[-1] - edges[0])
    bars = [
        Bar(
            x=round(LEFT + float(begin - edges[0]) * wide + 0.5, 2),
            y=round(floor - num * tall, 2),
            width=round(max(float(end - begin) * wide - 1, 0.5), 2),
            height=round(num * tall, 2),
            text=f"{write(float(begin))} to {write(float(end))}: {num:,}",
        )
        for begin, end, num in zip(edges, edges[1:], counts.tolist(), strict=False)
        if num
    ]
    shown = [value for value in ticks(float(edges[0]), float(edges[-1]), 5) if edges[0] <= value <= edges[-1]]
    middle = float(np.median(values))
    return Histogram(
        title=title,
        x_label=x_label,
        latest=f"median {write(middle)}",
        summary=f"{title}: {write(low)} to {write(high)}, median {write(middle)}, of {len(values):,} items",
        bars=bars,
        x_ticks=[Tick(at=round(LEFT + float(value - edges[0]) * wide, 1), label=short(value)) for value in shown],
        y_ticks=[Tick(at=round(floor - value * tall, 1), label=short(value)) for value in y_values],
    )


def _shares(counts: list[tuple[str, int]], texts: dict[str, str] | None = None) -> list[Share]:
    most = max((num for _, num in counts), default=0)
    return [Share(name=name, num=num, share=num / most if most else 0.0, text=(texts or {}).get(name, "")) for name, num in counts]


def _samples(dataset: Dataset) -> list[Sample]:
    """A few items, the same ones each time: in a keyed order, of as many classes as there are."""
    if not len(dataset):
        return []
    drawn = Order(0, len(dataset)).locate(np.arange(min(len(dataset), 16 * NUM_VIDEOS)))[1].astype(np.int64)
    rows = drawn[~np.isin(drawn, dataset.overlay.excluded)].tolist()
    labels = dataset.column("label")
    first = {int(labels[row]): row for row in reversed(rows)}
    chosen = sorted(rows, key=lambda row: first[int(labels[row])] != row)  # stable: one of every class before the second of any
    videos = inline_videos(dataset, chosen[: 2 * NUM_VIDEOS], num=NUM_VIDEOS)
    return [
        Sample(key=dataset.text("key", row), label=dataset.info.classes[int(labels[row])], video=video) for row, video in videos.items()
    ]
