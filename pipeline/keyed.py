"""Randomness that depends on nothing but its key: which frames, which crop, which substitute, known before any byte is read.

Every draw takes words from a fresh Philox-4x64-10 stream (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) whose
key is (seed, position) and whose counter starts at (0, purpose, view, 0). Words become numbers by the rules written here, because
NumPy promises stable raw words of a bit generator but no stable `Generator` methods. Frames are drawn per position, crop and flip
per view of it, so one decode serves several views.
"""

import math
import threading
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.options import BASE_STEP, AugmentOptions, ClipOptions

KEYED_VERSION = 1  # a run may only resume under the version it started with
CROP_ATTEMPTS = 10

Roi: TypeAlias = tuple[float, float, float, float]


class Purpose(IntEnum):
    """What a stream of words is for. Values are part of the stream's key: append, never renumber."""

    FRAMES = 1
    CROP = 2
    SUBSTITUTE = 3
    RANDAUGMENT = 4
    JITTER = 5
    ERASE = 6
    NOISE = 7
    MIX = 8
    PARTNER = 9


class _Generator(threading.local):
    """One Philox object per thread, re-keyed in place for each use: building one costs ten times as much."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)


_generator = _Generator()


def words(seed: int, position: int, purpose: Purpose, view: int = 0, *, count: int) -> list[int]:
    """`count` random words, each an int in [0, 2^64). seed, position and view are in [0, 2^64)."""
    drawn: list[int] = raw_words(seed, position, purpose, view, count=count).tolist()
    return drawn


def raw_words(seed: int, position: int, purpose: Purpose, view: int = 0, *, count: int) -> npt.NDArray[np.uint64]:
    """The same as an array, uint64 (count,): where there are many."""
    philox = _generator.philox
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.array([0, purpose, view, 0], dtype=np.uint64), "key": np.array([seed, position], dtype=np.uint64)},
        "buffer": np.zeros(4, dtype=np.uint64),
        "buffer_pos": 4,  # nothing is left in the buffer
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.asarray(philox.random_raw(count), dtype=np.uint64)


def to_int(word: int, bound: int) -> int:
    """An integer in [0, bound), by multiply and shift; no value's probability is off by more than 2^-64."""
    return (word * bound) >> 64


def to_float(word: int, low: float = 0.0, high: float = 1.0) -> float:
    """A float64 in [low, high), from the word's upper 53 bits."""
    return low + (high - low) * ((word >> 11) * 2.0**-53)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What is done to one view after crop, flip and resize, in this order; drawn in `augmentation`, applied in `augment_clip`.

    operations: RandAugment's (name, argument). colour: factors of brightness, contrast and saturation, and the turn of the hue; None:
    untouched. erased: boxes (t0, y0, x0, t1, y1, x1) of the input, half-open. noise: (seed, position, view) of the values in the
    boxes; None: the mean colour.
    """

    operations: tuple[tuple[str, float], ...] = ()
    colour: tuple[float, float, float, float] | None = None
    erased: tuple[tuple[int, int, int, int, int, int], ...] = ()
    noise: tuple[int, int, int] | None = None

    def as_lists(self) -> dict[str, object]:
        """Plain values, as those of `ClipParameters`."""
        return {
            "operations": [list(operation) for operation in self.operations],
            "colour": None if self.colour is None else list(self.colour),
            "erased": [list(box) for box in self.erased],
            "noise": None if self.noise is None else list(self.noise),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClipParameters:
    """All that decides a clip besides the video itself.

    frames: int32 (T,), relative to the item's first frame. roi: (y0, x0, y1, x1) in stored pixels, the box that becomes the input.
    flip: mirror it horizontally. augmentation: None where the recipe asks for none, and in evaluation.
    """

    frames: npt.NDArray[np.int32]
    roi: Roi
    flip: bool
    augmentation: Augmentation | None = None

    def as_lists(self) -> dict[str, object]:
        """Plain values, equal exactly when the parameters are: for logs and digests of the stream."""
        plain: dict[str, object] = {"frames": self.frames.tolist(), "roi": list(self.roi), "flip": self.flip}
        return plain if self.augmentation is None else {**plain, **self.augmentation.as_lists()}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One of the fixed looks that evaluation takes at an item: clip `clip` of `num_clips`, crop `crop` of `num_crops`, mirrored or not."""

    clip: int = 0
    num_clips: int = 1
    crop: int = 0
    num_crops: int = 1
    flip: bool = False


MIDDLE = View()


def eval_views(num_clips: int, num_crops: int, flip: bool) -> list[View]:
    """All views of an item, those of one clip side by side: clips, of each its crops, of each the plain and (`flip`) the mirrored one."""
    flips = (False, True) if flip else (False,)
    return [
        View(clip=clip, num_clips=num_clips, crop=crop, num_crops=num_crops, flip=mirrored)
        for clip in range(num_clips)
        for crop in range(num_crops)
        for mirrored in flips
    ]


def view_parameters(
    view: View,
    *,
    num_frames: int,
    fps: float,
    width: int,
    height: int,
    clip: ClipOptions,
    augment: AugmentOptions,
    begin: int = 0,
    keyframe: int | None = None,
) -> ClipParameters:
    """One view of an item with `num_frames` frames of `width` x `height` pixels, from frame `begin` of its video; nothing is random.

    keyframe: of the item, around which all its clips are.
    """
    if keyframe is None:
        frames = clip_frames(num_frames, fps, clip, key=None, view=view, begin=begin)
    else:
        frames = keyframe_frames(keyframe, num_frames, fps, clip)
    return ClipParameters(frames=frames, roi=view_crop(height, width, augment, view), flip=view.flip)


def clip_parameters(
    seed: int,
    position: int,
    *,
    num_frames: int,
    fps: float,
    width: int,
    height: int,
    clip: ClipOptions,
    augment: AugmentOptions,
    training: bool,
    view: int = 0,
    begin: int = 0,
    keyframe: int | None = None,
) -> ClipParameters:
    """The clip of an item with `num_frames` frames of `width` x `height` pixels at `position`; without `training` nothing is random.

    begin: the item's first frame in its video. keyframe: of the item, around which the clip is.
    """
    if keyframe is None:
        frames = clip_frames(num_frames, fps, clip, key=(seed, position) if training else None, begin=begin)
    else:
        frames = keyframe_frames(keyframe, num_frames, fps, clip)
    if training:
        roi, flip = crop_parameters(height, width, augment, seed=seed, position=position, view=view)
    else:
        roi, flip = centre_crop(height, width, augment), False
    return ClipParameters(frames=frames, roi=roi, flip=flip)


def clip_frames(
    num_frames: int, fps: float, clip: ClipOptions, *, key: tuple[int, int] | None, view: View = MIDDLE, begin: int = 0
) -> npt.NDArray[np.int32]:
    """Frame numbers of a clip, int32 (T,), ascending, each in [0, num_frames).

    num_frames: of the item, at least 1. key: (seed, position) in training; None in evaluation, for clip c of C as `view` says:
    dense clips start evenly spaced from the first start that fits to the last (a single one in the middle); a segment clip takes the
    frame (2c + 1) / 2C of the way through each segment; uniform has no second clip: every one is the same.
    A dense clip that is longer than the item repeats its last frame. begin: the item's first frame in its video, which tells base frames
    (`clip.starts`): of the starts that fit only those are drawn from, or spaced over, unless there is none.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: got {num_frames}, expected at least 1")
    length = clip.num_frames
    if clip.sampling == "uniform":
        if length == 1:
            return np.array([(num_frames - 1) // 2], dtype=np.int32)
        gaps = length - 1  # frame i is i/gaps of the way to the last one, rounded half up
        return np.array([(2 * i * (num_frames - 1) + gaps) // (2 * gaps) for i in range(length)], dtype=np.int32)
    if clip.sampling == "segment":
        return _segment_frames(num_frames, length, key, view)
    offsets = _offsets(fps, clip)
    starts = range(max(num_frames - int(offsets[-1]), 1))  # from which the whole clip fits
    if clip.starts == "base":
        starts = starts[-begin % BASE_STEP :: BASE_STEP] or starts
    chosen = _clip_start(len(starts), view) if key is None else to_int(words(*key, Purpose.FRAMES, count=1)[0], len(starts))
    start = starts[chosen]
    return np.asarray(np.minimum(start + offsets, num_frames - 1), dtype=np.int32)


def keyframe_frames(keyframe: int, num_frames: int, fps: float, clip: ClipOptions) -> npt.NDArray[np.int32]:
    """Frame numbers of the dense clip around a keyframe, which is its frame T div 2; int32 (T,), ascending, each in [0, num_frames).

    Nothing is random. Where the item begins or ends within the clip, its first or last frame repeats.
    """
    offsets = _offsets(fps, clip)
    return np.asarray(np.clip(keyframe + offsets - offsets[len(offsets) // 2], 0, num_frames - 1), dtype=np.int32)


def _offsets(fps: float, clip: ClipOptions) -> npt.NDArray[np.int64]:
    """Where the frames of a dense clip lie from its first, (T,)."""
    stride = clip.stride if clip.stride_s is None else clip.stride_s * fps
    return np.asarray(np.floor(np.arange(clip.num_frames) * stride + 0.5), dtype=np.int64)


def _clip_start(free: int, view: View) -> int:
    """Of `free` starts 0 to free-1, the one of the view's clip: c/(C-1) of the way to the last, rounded half up; the middle of one."""
    gaps = view.num_clips - 1
    return (2 * view.clip * (free - 1) + gaps) // (2 * gaps) if gaps else (free - 1) // 2


def _segment_frames(num_frames: int, length: int, key: tuple[int, int] | None, view: View) -> npt.NDArray[np.int32]:
    """Segment i of T in V frames: uniform in [round(s*i), round(s*(i+1))] with s = (V-1)/T, ends included; evaluation takes the middle.

    Clip c of C takes (2c + 1) / 2C of the way through each segment, rounded down: the middle again for one clip.

    The released recipe for Something-Something; rounding is half to even, as `numpy.round` does there.
    """
    edges = np.round(np.arange(length + 1) * ((num_frames - 1) / length)).astype(np.int64)
    if key is None:
        steps = (edges[1:] - edges[:-1]) * (2 * view.clip + 1) // (2 * view.num_clips)
        return (edges[:-1] + steps).astype(np.int32)
    sizes = (edges[1:] - edges[:-1] + 1).tolist()
    drawn = words(*key, Purpose.FRAMES, count=length)
    offsets = [to_int(word, size) for word, size in zip(drawn, sizes, strict=True)]
    return (edges[:-1] + np.array(offsets, dtype=np.int64)).astype(np.int32)


def crop_parameters(height: int, width: int, augment: AugmentOptions, *, seed: int, position: int, view: int = 0) -> tuple[Roi, bool]:
    """A random resized crop inside height x width pixels, with whole-pixel edges, and whether it is flipped.

    Area is uniform in `augment.area`, aspect log-uniform in `augment.aspect`; after ten boxes that do not fit, the largest centred
    box whose aspect is in range (Szegedy et al., "Going deeper with convolutions", 2015; constants as in torchvision).
    """
    drawn = words(seed, position, Purpose.CROP, view, count=2 * CROP_ATTEMPTS + 3)
    flip = to_float(drawn[-1]) < augment.flip
    log_low, log_high = math.log(augment.aspect[0]), math.log(augment.aspect[1])
    for attempt in range(CROP_ATTEMPTS):
        area = height * width * to_float(drawn[2 * attempt], *augment.area)
        aspect = math.exp(to_float(drawn[2 * attempt + 1], log_low, log_high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            y0, x0 = to_int(drawn[-3], height - box_height + 1), to_int(drawn[-2], width - box_width + 1)
            return (float(y0), float(x0), float(y0 + box_height), float(x0 + box_width)), flip
    aspect = min(max(width / height, augment.aspect[0]), augment.aspect[1])
    return _centred(height, width, max(min(height, round(width / aspect)), 1), max(min(width, round(height * aspect)), 1)), flip


def centre_crop(height: int, width: int, augment: AugmentOptions) -> Roi:
    """The box that equals resizing the shorter side to `augment.eval_resize` and cutting the central `augment.size` square."""
    return view_crop(height, width, augment, MIDDLE)


def view_crop(height: int, width: int, augment: AugmentOptions, view: View) -> Roi:
    """The view's square, of the size that `centre_crop` has: crops lie evenly along the longer side, from its one end to the other.

    Three crops are left, centre, right, of upright videos top, centre, bottom; a single one is the centre.
    """
    side = min(height, width) * augment.size / (augment.eval_resize or augment.size)
    place = view.crop / (view.num_crops - 1) if view.num_crops > 1 else 0.5
    along_height, along_width = (0.5, place) if width >= height else (place, 0.5)
    return _placed((height - side) * along_height, (width - side) * along_width, side, side)


def _centred(height: int, width: int, box_height: float, box_width: float) -> Roi:
    return _placed((height - box_height) / 2, (width - box_width) / 2, box_height, box_width)


def _placed(y0: float, x0: float, box_height: float, box_width: float) -> Roi:
    """Edges are exactly representable in float32, so that what is logged is what the graph receives."""
    y0, x0, y1, x1 = np.array([y0, x0, y0 + box_height, x0 + box_width], dtype=np.float32).tolist()
    return y0, x0, y1, x1


def substitute(seed: int, position: int, attempt: int, num_rows: int) -> int:
    """Which of `num_rows` samples replaces the damaged one at `position`, on the given attempt (from 0): an int in [0, num_rows)."""
    return to_int(words(seed, position, Purpose.SUBSTITUTE, attempt, count=1)[0], num_rows)
