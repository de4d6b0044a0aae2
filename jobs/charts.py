"""Line charts as plain geometry that a template draws as SVG: scales, ticks, paths, and short readable numbers."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jobs.curves import Curve

WIDTH, HEIGHT = 480, 216  # of the viewBox; narrow, so that text stays readable when a phone shows the chart at 80 %
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 38
HOVERS = 80  # columns that show their values under the pointer
SMOOTH_FROM = 60  # points from which a smoothed line is drawn over the raw one
TIME_UNITS = ((1.0, "s", 120), (60.0, "min", 7200), (3600.0, "h", 48 * 3600), (86400.0, "days", math.inf))  # seconds, name, used below


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of the x axis that is shaded (work done again, a pause); `text` explains it."""

    begin: float
    end: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A grid line at `at` pixels with its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """A rectangle over the whole height from `x`, `width` pixels wide, with a text."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One of several runs in a chart: SVG path data, and the run's place on the page, which decides its colour."""

    run: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Everything the template needs to draw one chart; pixels of the viewBox.

    raw, smooth: SVG path data; smooth is empty where raw is short. lines: instead of both, where several runs share the chart.
    latest: the last value, for the caption. reference: a horizontal line with a label, None where it lies outside.
    """

    title: str
    unit: str
    x_label: str
    latest: str
    summary: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    raw: str
    smooth: str
    spans: list[Area]
    hovers: list[Area]
    reference: Tick | None = None
    lines: list[Line] = field(default_factory=list)


def line_chart(
    curve: Curve,
    *,
    title: str,
    unit: str = "",
    x_label: str = "step",
    x_scale: float = 1.0,
    zero: bool = False,
    smooth: bool = True,
    spans: Sequence[Span] = (),
    reference: tuple[float, str] | None = None,
    text: Callable[[float], str] | None = None,
) -> Chart | None:
    """A chart of a curve; None where it has no point.

    x_scale: x values per unit of the axis (60 shows seconds as minutes). zero: the y axis starts at 0. reference: (y, label).
    text: how a value is written, `short` by default.
    """
    if not curve.x:
        return None
    write = text or short
    drawn = curve.smooth() if smooth and len(curve.x) >= SMOOTH_FROM else []
    x_low, x_high = min([curve.x[0], *(s.begin for s in spans)]), max([curve.x[-1], *(s.end for s in spans)])
    y_low, y_high = 0.0 if zero else min(curve.low), max(curve.high)
    y_values = ticks(y_low, y_high, 4)
    x, y = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(min(y_values[0], y_low), max(y_values[-1], y_high), HEIGHT - BOTTOM, TOP)
    inside = reference is not None and y_values[0] <= reference[0] <= y_values[-1]
    suffix = f" {unit}" if unit else ""
    return Chart(
        title=title,
        unit=unit,
        x_label=x_label,
        latest=write(drawn[-1] if drawn else curve.mean[-1]) + suffix,
        summary=f"{title} from {write(curve.mean[0])} to {write(curve.mean[-1])}{suffix}, range {write(min(curve.low))} to {write(y_high)}",
        x_ticks=[
            Tick(at=x(value * x_scale), label=short(value)) for value in _inside(x_low / x_scale, x_high / x_scale, x_label == "step")
        ],
        y_ticks=[Tick(at=y(value), label=write(value)) for value in y_values],
        raw=_path([(x(a), y(b)) for a, b in curve.path()]),
        smooth=_path([(x(a), y(b)) for a, b in zip(curve.x, drawn, strict=True)]) if drawn else "",
        spans=[Area(x=x(span.begin), width=max(x(span.end) - x(span.begin), 1.5), text=span.text) for span in spans],
        hovers=_hovers(curve, x, x_label, x_scale, lambda value: write(value) + suffix),
        reference=Tick(at=y(reference[0]), label=reference[1]) if reference is not None and inside else None,
    )


def overlay_chart(
    curves: Sequence[tuple[int, str, Curve]],
    *,
    title: str,
    unit: str = "",
    x_label: str = "step",
    zero: bool = False,
    text: Callable[[float], str] | None = None,
) -> Chart | None:
    """Several runs' curves, smoothed, in one chart; None where none has a point. curves: (place on the page, name, curve)."""
    drawn = [(run, name, curve, curve.smooth()) for run, name, curve in curves if curve.x]
    if not drawn:
        return None
    write, suffix = text or short, f" {unit}" if unit else ""
    x_low, x_high = min(curve.x[0] for _, _, curve, _ in drawn), max(curve.x[-1] for _, _, curve, _ in drawn)
    y_low, y_high = 0.0 if zero else min(min(values) for *_, values in drawn), max(max(values) for *_, values in drawn)
    y_values = ticks(y_low, y_high, 4)
    x, y = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(min(y_values[0], y_low), max(y_values[-1], y_high), HEIGHT - BOTTOM, TOP)
    return Chart(
        title=title,
        unit=unit,
        x_label=x_label,
        latest="",
        summary=f"{title}: " + ", ".join(f"{name} ends at {write(values[-1])}{suffix}" for _, name, _, values in drawn),
        x_ticks=[Tick(at=x(value), label=short(value)) for value in _inside(x_low, x_high, x_label == "step")],
        y_ticks=[Tick(at=y(value), label=write(value)) for value in y_values],
        raw="",
        smooth="",
        spans=[],
        hovers=_shared_hovers(drawn, x_low, x_high, x, x_label, lambda value: write(value) + suffix),
        lines=[Line(run=run, path=_path([(x(a), y(b)) for a, b in zip(curve.x, values, strict=True)])) for run, _, curve, values in drawn],
    )


def ticks(low: float, high: float, num: int) -> list[float]:
    """About `num` + 1 round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-200):  # too close to be told apart on an axis
        margin = max(abs(high) * 0.1, 1e-9) if high else 1.0
        low, high = (0.0, high + margin) if low >= 0 else (low - margin, high + margin)
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 0.00042 as 4.2e-4, 12345 as 12.3k."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size < 999.5:
        return f"{value:.3g}"
    if size < 9999.5:
        return f"{value:.0f}"
    value = float(f"{value:.3g}")
    divisor, suffix = next((10.0**power, letter) for power, letter in ((9, "G"), (6, "M"), (3, "k")) if abs(value) >= 10.0**power)
    return f"{value / divisor:.4g}{suffix}"


def percent(share: float) -> str:
    """0.0432 as 4.3 %."""
    return f"{share * 100:.1f}".removesuffix(".0") + " %"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.2 s, 3 min 20 s, 5 h 12 min, 2 days 3 h."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{seconds:.0f} s"
    parts = (60, "min", 60, "s") if seconds < 3600 else (3600, "h", 60, "min") if seconds < 86400 else (86400, "days", 24, "h")
    divisor, large, count, small = parts
    whole, rest = divmod(round(seconds / divisor * count), count)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"


def num_bytes(size: float) -> str:
    """Bytes in binary units: 1.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds per unit, its name) for an axis of this length."""
    return next((scale, name) for scale, name, limit in TIME_UNITS if seconds < limit)


def _inside(low: float, high: float, whole: bool) -> list[float]:
    """About five ticks within [low, high]; `whole`: only whole numbers."""
    values = [value for value in ticks(low, high, 5) if low - 1e-9 <= value <= high + 1e-9 and not (whole and value % 1)]
    return values or [low]


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    span = high - low
    return lambda value: round(begin + (value - low) / span * (end - begin), 1) if span > 0 else (begin + end) / 2


def _path(points: Sequence[tuple[float, float]]) -> str:
    """SVG path data; a single point becomes a dot's worth of line."""
    if len(points) == 1:
        points = [points[0], (points[0][0] + 0.1, points[0][1])]
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def _hovers(curve: Curve, x: Callable[[float], float], x_label: str, x_scale: float, write: Callable[[float], str]) -> list[Area]:
    """Columns that cover the chart; each says what the curve does there."""
    size = -(-len(curve.x) // HOVERS)
    groups = [range(i, min(i + size, len(curve.x))) for i in range(0, len(curve.x), size)]
    edges = [x(curve.x[group[0]]) for group in groups] + [float(WIDTH - RIGHT)]
    areas = []
    for group, begin, end in zip(groups, edges, edges[1:], strict=False):
        low, high = min(curve.low[i] for i in group), max(curve.high[i] for i in group)
        values = write(low) if low == high else f"{write(low)} to {write(high)}"
        areas.append(Area(x=begin, width=max(round(end - begin, 1), 0.5), text=f"{x_label} {short(curve.x[group[0]] / x_scale)}: {values}"))
    return areas


def _shared_hovers(
    drawn: Sequence[tuple[int, str, Curve, list[float]]],
    low: float,
    high: float,
    x: Callable[[float], float],
    x_label: str,
    write: Callable[[float], str],
) -> list[Area]:
    """Columns that cover the chart; each says where every run is at its middle."""
    num = HOVERS if high > low else 1
    areas = []
    for i in range(num):
        middle = low + (i + 0.5) / num * (high - low)
        begin, end = x(low + i / num * (high - low)), x(low + (i + 1) / num * (high - low))
        values = []
        for _, name, curve, smooth in drawn:
            if curve.x[0] <= middle <= curve.x[-1] or num == 1:
                nearest = min(bisect_left(curve.x, middle), len(curve.x) - 1)
                values.append(f"{name} {write(smooth[nearest])}")
        areas.append(Area(x=begin, width=max(round(end - begin, 1), 0.5), text="\n".join([f"{x_label} {short(middle)}", *values])))
    return areas
