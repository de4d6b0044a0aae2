"""Draws of all that happens to a clip after its crop: RandAugment, colour jitter, erasing, and which clips are mixed and how.

As in `keyed`, everything depends on (seed, position, purpose, view) alone and is known before a byte is read; the pixels follow in
`augment_frames`, `augment_clip` and `augment_mix`. Each draw takes its words from a fixed place in its stream, whatever was drawn
before it, so that changing one key of a recipe moves nothing that it does not name.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.errors import PipelineError
from pipeline.keyed import Augmentation, Purpose, to_float, to_int, words
from pipeline.options import AugmentOptions, EraseOptions, JitterOptions, MixOptions, RandAugmentOptions

# The video set of timm and PySlowFast, in its order: the place of a name is part of the stream.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
MAX_MAGNITUDE = 10.0
ERASE_ATTEMPTS = 10

Box: TypeAlias = tuple[int, int, int, int]  # y0, x0, y1, x1, half-open


def draw_augmentation(augment: AugmentOptions, num_frames: int, *, seed: int, position: int, view: int) -> Augmentation | None:
    """What the recipe does to the view of `position` after its crop, with `num_frames` frames; None if the recipe has none of it."""
    if augment.randaugment is None and augment.jitter is None and augment.erase is None:
        return None
    key = (seed, position, view)
    erased = draw_boxes(augment.erase, augment.size, num_frames, key) if augment.erase else ()
    return Augmentation(
        operations=draw_operations(augment.randaugment, key) if augment.randaugment else (),
        colour=draw_colour(augment.jitter, key) if augment.jitter else None,
        erased=erased,
        noise=key if augment.erase and erased and augment.erase.fill == "pixel" else None,
    )


def draw_operations(options: RandAugmentOptions, key: tuple[int, int, int]) -> tuple[tuple[str, float], ...]:
    """RandAugment's operations, at most `n`, each with its argument. key: (seed, position, view).

    Degrees of a rotation, slope of a shear, share of the frame's side of a translation, bits kept, the threshold of solarize, levels
    that SolarizeAdd adds, the factor of an enhancement; 0 where there is nothing to say. Ranges are those of timm and PySlowFast.
    """
    seed, position, view = key
    drawn = words(seed, position, Purpose.RANDAUGMENT, view, count=5 * options.n)
    chosen = []
    for i in range(options.n):
        which, applied, first, second, sign = drawn[5 * i : 5 * i + 5]
        if to_float(applied) < options.probability:
            name = OPERATIONS[to_int(which, len(OPERATIONS))]
            magnitude = min(max(options.m + options.std * _normal(first, second), 0.0), MAX_MAGNITUDE)
            negative = to_float(sign) < 0.5
            chosen.append((name, operation_argument(name, magnitude, negative=negative, increasing=options.increasing)))
    return tuple(chosen)


def operation_argument(name: str, magnitude: float, *, negative: bool, increasing: bool) -> float:
    """The argument of one of OPERATIONS at a magnitude in [0, 10]; negative: of the two directions it may take, the other one."""
    share = magnitude / MAX_MAGNITUDE
    sign = -1.0 if negative else 1.0
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return 1 + sign * 0.9 * share if increasing else 0.1 + 1.8 * share
    if name == "Posterize":
        return float(4 - int(4 * share) if increasing else int(4 * share))
    if name == "Solarize":
        return float(256 - int(256 * share) if increasing else int(256 * share))
    if name == "SolarizeAdd":
        return float(int(110 * share))
    signed = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
    return sign * share * signed[name] if name in signed else 0.0


def draw_colour(options: JitterOptions, key: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """Factors of brightness, contrast and saturation, and the turn of the hue (of 1). key: (seed, position, view)."""
    seed, position, view = key
    drawn = words(seed, position, Purpose.JITTER, view, count=5)
    ranges = (options.brightness, options.contrast, options.saturation)
    brightness, contrast, saturation = (to_float(word, 1 - v, 1 + v) for word, v in zip(drawn[:3], ranges, strict=True))
    if to_float(drawn[4]) < options.grey:
        saturation = 0.0
    return brightness, contrast, saturation, to_float(drawn[3], -options.hue, options.hue)


def draw_boxes(
    options: EraseOptions, size: int, num_frames: int, key: tuple[int, int, int]
) -> tuple[tuple[int, int, int, int, int, int], ...]:
    """Boxes (t0, y0, x0, t1, y1, x1) to erase in a clip of `num_frames` frames of size x size. key: (seed, position, view).

    Each has its share of the area; one that does not fit the frame in ten attempts is left out.
    """
    seed, position, view = key
    groups = [(0, num_frames)] if options.cube else [(t, t + 1) for t in range(num_frames)]
    per_box = 2 * ERASE_ATTEMPTS + 2
    drawn = words(seed, position, Purpose.ERASE, view, count=1 + per_box * options.count * len(groups))
    if to_float(drawn[0]) >= options.probability:
        return ()
    boxes = []
    for i in range(options.count * len(groups)):
        t0, t1 = groups[i // options.count]
        box = _box(options, size, drawn[1 + per_box * i : 1 + per_box * (i + 1)])
        if box is not None:
            boxes.append((t0, box[0], box[1], t1, box[2], box[3]))
    return tuple(boxes)


def _box(options: EraseOptions, size: int, drawn: Sequence[int]) -> Box | None:
    log_low, log_high = math.log(options.aspect[0]), math.log(options.aspect[1])
    for attempt in range(ERASE_ATTEMPTS):
        area = size * size * to_float(drawn[2 * attempt], *options.area) / options.count
        aspect = math.exp(to_float(drawn[2 * attempt + 1], log_low, log_high))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width < size and 0 < height < size:
            y0, x0 = to_int(drawn[-2], size - height + 1), to_int(drawn[-1], size - width + 1)
            return y0, x0, y0 + height, x0 + width
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mix:
    """How the B clips of a micro-batch are mixed.

    partners: int64 (B,), slot of the clip that each is mixed with, never of its own sample. shares: float64 (B,), each clip's own
    share of its label, 1 where it stays as it is. boxes: B, what cutmix takes from the partner; None: mixup, by the share.
    """

    partners: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float64]
    boxes: tuple[Box | None, ...]


def draw_mix(options: MixOptions, size: int, positions: npt.NDArray[np.int64], *, views: int, seed: int) -> Mix:
    """The mix of a micro-batch of clips of size x size pixels. positions: (B,), each `views` times in a row; at least two of them.

    Partners are given by a random cyclic permutation of the samples (Sattolo, 1986), keyed by the micro-batch's first position; the
    rest by each clip's own position and view, so that clips of a micro-batch differ in kind and share. The released code, like timm's
    default, flips the batch and draws one kind and one share for all of it.
    """
    samples = positions[::views].tolist()
    if len(samples) < 2:
        raise ValueError(f"mix: got a micro-batch of {len(samples)} sample, expected at least 2")
    cycle = list(range(len(samples)))
    for i, word in zip(range(len(cycle) - 1, 0, -1), words(seed, samples[0], Purpose.PARTNER, count=len(cycle) - 1), strict=True):
        j = to_int(word, i)
        cycle[i], cycle[j] = cycle[j], cycle[i]
    drawn = [_share(options, size, words(seed, position, Purpose.MIX, view, count=6)) for position in samples for view in range(views)]
    return Mix(
        partners=np.array([views * partner + view for partner in cycle for view in range(views)], dtype=np.int64),
        shares=np.array([share for share, _ in drawn]),
        boxes=tuple(box for _, box in drawn),
    )


def _share(options: MixOptions, size: int, drawn: Sequence[int]) -> tuple[float, Box | None]:
    """A clip's own share, and the box that cutmix takes from its partner."""
    if to_float(drawn[0]) >= options.probability:
        return 1.0, None
    cut = options.cutmix > 0 and (options.mixup == 0 or to_float(drawn[1]) < options.switch)
    share = symmetric_beta(options.cutmix if cut else options.mixup, drawn[2], drawn[3])
    if not cut:
        return share, None
    side = int(size * math.sqrt(1 - share))
    y, x = to_int(drawn[4], size), to_int(drawn[5], size)
    y0, x0, y1, x1 = (min(max(edge, 0), size) for edge in (y - side // 2, x - side // 2, y + side - side // 2, x + side - side // 2))
    return 1 - (y1 - y0) * (x1 - x0) / size**2, (y0, x0, y1, x1)  # the share that the clipped box leaves


def symmetric_beta(alpha: float, first: int, second: int) -> float:
    """A Beta(alpha, alpha) number in [0, 1] of two words, exactly distributed: Student's t with 2 alpha degrees of freedom by the polar
    method (Bailey, "Polar generation of random variates with the t-distribution", 1994), mapped to where its square meets the beta's.
    """
    radius = math.expm1(min(-math.log(1 - to_float(first)) / alpha, 700.0))  # beyond 700 the result is 0 or 1 to the last bit
    t = math.sqrt(radius) * math.cos(2 * math.pi * to_float(second))
    return 0.5 + 0.5 * t / math.sqrt(1 + t * t)


def _normal(first: int, second: int) -> float:
    """A standard normal number of two words (Box and Muller, 1958)."""
    return math.sqrt(-2 * math.log(1 - to_float(first))) * math.cos(2 * math.pi * to_float(second))


def swapped_labels(classes: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[int, int]:
    """Label -> label of the same clip when it is flipped, for `augment.flip_labels`. Raises PipelineError for an unknown class."""
    numbers = {name: label for label, name in enumerate(classes)}
    swapped: dict[int, int] = {}
    for one, other in pairs:
        for name in (one, other):
            if name not in numbers:
                near = difflib.get_close_matches(name, classes, 1)
                hint = f"did you mean '{near[0]}'?" if near else "see 'posmlp data info'."
                raise PipelineError(f"augment.flip_labels: got '{name}', expected one of the dataset's {len(classes)} classes; {hint}")
        swapped |= {numbers[one]: numbers[other], numbers[other]: numbers[one]}
    return swapped
