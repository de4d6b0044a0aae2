"""The fifteen operations equal a plain NumPy reference, frame by frame, and do the same to all frames of a clip."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.augment_frames import apply_operations, grey
from pipeline.augmentation import OPERATIONS, draw_operations, operation_argument
from pipeline.options import RandAugmentOptions

Frame = npt.NDArray[np.uint8]  # (H, W, 3)
SHAPE = (20, 28)  # not square: axes must not be exchanged


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores would take a hundred times as long as the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(seed: int, height: int = SHAPE[0], width: int = SHAPE[1]) -> Frame:
    """A gradient with noise of a level range that leaves room for contrast."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 180, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    return (ramp + rng.integers(0, 30, (height, width, 3))).astype(np.uint8)


def luma(frame: Frame) -> npt.NDArray[np.int64]:
    red, green, blue = frame.astype(np.int64).transpose(2, 0, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def blend(other: npt.NDArray[np.generic] | float, frame: Frame, factor: float) -> Frame:
    other, levels, factor = np.float32(other), frame.astype(np.float32), np.float32(factor)
    return np.clip(other + (levels - other) * factor, 0, 255).astype(np.uint8)


def tabled(frame: Frame, table: Callable[[npt.NDArray[np.int64]], list[int]]) -> Frame:
    """Each channel through its own table of 256 levels."""
    planes = [np.array(table(frame[..., c].astype(np.int64)), dtype=np.uint8)[frame[..., c]] for c in range(3)]
    return np.stack(planes, axis=-1)


def stretched(plane: npt.NDArray[np.int64]) -> list[int]:
    low, high = int(plane.min()), int(plane.max())
    return [min(max((i - low) * 255 // (high - low), 0), 255) if high > low else i for i in range(256)]


def equalized(plane: npt.NDArray[np.int64]) -> list[int]:
    counts = [int((plane == i).sum()) for i in range(256)]
    step = (sum(counts) - counts[int(plane.max())]) // 255
    return [min((sum(counts[:i]) + step // 2) // step, 255) if step else i for i in range(256)]


def sharpened(frame: Frame, factor: float) -> Frame:
    height, width = frame.shape[:2]
    smooth = frame.copy()
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            window = frame[y - 1 : y + 2, x - 1 : x + 2].astype(np.int64)
            smooth[y, x] = (2 * (window.sum((0, 1)) + 4 * window[1, 1]) + 13) // 26
    inner = blend(smooth.astype(np.float32), frame, factor)
    result = frame.copy()
    result[1:-1, 1:-1] = inner[1:-1, 1:-1]
    return result


def warped(frame: Frame, source: Callable[[float, float], tuple[float, float]]) -> npt.NDArray[np.float64]:
    """Bilinear in float64; `source` says where the centre (x, y) of a pixel comes from; 128 outside."""
    height, width = frame.shape[:2]
    result = np.empty(frame.shape)
    for row in range(height):
        for column in range(width):
            x, y = source(column + 0.5, row + 0.5)
            x0, y0 = math.floor(x - 0.5), math.floor(y - 0.5)
            total = np.zeros(3)
            for i in (y0, y0 + 1):
                for j in (x0, x0 + 1):
                    level = frame[i, j] if 0 <= i < height and 0 <= j < width else 128
                    total += max(0.0, 1 - abs(y - 0.5 - i)) * max(0.0, 1 - abs(x - 0.5 - j)) * np.asarray(level, dtype=np.float64)
            result[row, column] = np.floor(total + 0.5)
    return result


def turned(frame: Frame, degrees: float) -> npt.NDArray[np.float64]:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y0, x0 = frame.shape[0] / 2, frame.shape[1] / 2
    return warped(frame, lambda x, y: (cosine * (x - x0) - sine * (y - y0) + x0, sine * (x - x0) + cosine * (y - y0) + y0))


REFERENCE: dict[str, Callable[[Frame, float], npt.NDArray[np.generic]]] = {
    "AutoContrast": lambda frame, _: tabled(frame, stretched),
    "Equalize": lambda frame, _: tabled(frame, equalized),
    "Invert": lambda frame, _: 255 - frame,
    "Rotate": turned,
    "Posterize": lambda frame, bits: frame & np.uint8(256 - 2 ** (8 - int(bits)) if bits else 0),
    "Solarize": lambda frame, threshold: np.where(frame < threshold, frame, 255 - frame),
    "SolarizeAdd": lambda frame, levels: np.where(frame < 128, np.minimum(frame.astype(int) + int(levels), 255), frame),
    "Color": lambda frame, factor: blend(luma(frame)[..., None], frame, factor),
    "Contrast": lambda frame, factor: blend(math.floor(luma(frame).mean() + 0.5), frame, factor),
    "Brightness": lambda frame, factor: blend(0.0, frame, factor),
    "Sharpness": sharpened,
    "ShearX": lambda frame, slope: warped(frame, lambda x, y: (x + slope * y, y)),
    "ShearY": lambda frame, slope: warped(frame, lambda x, y: (x, y + slope * x)),
    "TranslateXRel": lambda frame, share: warped(frame, lambda x, y: (x + share * frame.shape[1], y)),
    "TranslateYRel": lambda frame, share: warped(frame, lambda x, y: (x, y + share * frame.shape[0])),
}


def applied(frames: list[Frame], *operations: tuple[str, float]) -> npt.NDArray[np.uint8]:
    """(T, H, W, 3)"""
    planar = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()
    return apply_operations(planar, operations).permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("magnitude", [0.0, 3.7, 7.0, 10.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_the_reference(name: str, magnitude: float) -> None:
    flat = np.full((*SHAPE, 3), 77, dtype=np.uint8)
    extreme = np.where(picture(5) > 110, 255, 0).astype(np.uint8)
    frames = [picture(1), picture(2), flat, extreme]
    for negative in (False, True):
        for increasing in (False, True):
            argument = operation_argument(name, magnitude, negative=negative, increasing=increasing)
            result = applied(frames, (name, argument)).astype(int)
            expected = np.stack([REFERENCE[name](frame, argument) for frame in frames]).astype(int)
            wrong = np.abs(result - expected)
            if "Rotate" in name or "Shear" in name or "Translate" in name:  # coordinates are float32
                assert wrong.max() <= 1
                assert (wrong > 0).mean() < 0.03  # those that lie between two levels
            else:
                assert wrong.max() == 0


def test_luma_is_exact() -> None:
    frame = picture(3)
    assert np.array_equal(grey(torch.from_numpy(frame).permute(2, 0, 1)[:, None])[0].numpy(), luma(frame))


def test_a_clip_does_not_depend_on_how_it_is_cut_into_parts() -> None:
    """Large frames are worked on a few at a time: the same as each alone; and frames of a still clip stay equal."""
    frames = [picture(seed, 300, 260) for seed in range(5)]
    operations = [(name, operation_argument(name, 6.0, negative=False, increasing=True)) for name in OPERATIONS[::-1]]
    together = applied(frames, *operations)
    for frame, result in zip(frames, together, strict=True):
        assert np.array_equal(applied([frame], *operations)[0], result)
    assert (applied([frames[0]] * 3, *operations) == together[0]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CPU and GPU: runs where torch finds a GPU")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gpu_gives_the_levels_of_a_cpu(name: str) -> None:
    frames = torch.from_numpy(np.stack([picture(seed, 120, 112) for seed in range(4)])).permute(3, 0, 1, 2).contiguous()
    operation = (name, operation_argument(name, 7.3, negative=True, increasing=True))
    wrong = (apply_operations(frames.cuda(), [operation]).cpu().int() - apply_operations(frames, [operation]).int()).abs()
    assert wrong.max() <= (1 if name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel") else 0)


def test_the_input_is_left_alone() -> None:
    frames = torch.from_numpy(picture(1)).permute(2, 0, 1)[:, None].contiguous()
    before = frames.clone()
    for name in OPERATIONS:
        apply_operations(frames, [(name, operation_argument(name, 9.0, negative=False, increasing=True))])
    assert torch.equal(frames, before)


@pytest.mark.parametrize(
    ("name", "magnitude", "increasing", "argument"),
    [
        ("Rotate", 10, True, 30),
        ("ShearX", 5, True, 0.15),
        ("TranslateYRel", 10, True, 0.45),
        ("Posterize", 7, True, 2),  # 4 - int(2.8)
        ("Posterize", 7, False, 2),
        ("Posterize", 10, True, 0),
        ("Posterize", 10, False, 4),
        ("Solarize", 7, True, 77),  # 256 - int(179.2)
        ("Solarize", 7, False, 179),
        ("SolarizeAdd", 7, True, 77),
        ("Color", 7, True, 1.63),
        ("Brightness", 7, False, 1.36),
        ("Contrast", 5, False, 1.0),
        ("Invert", 9, True, 0),
    ],
)
def test_arguments(name: str, magnitude: float, increasing: bool, argument: float) -> None:
    assert operation_argument(name, magnitude, negative=False, increasing=increasing) == pytest.approx(argument)


def test_both_directions_are_taken() -> None:
    for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
        assert operation_argument(name, 6, negative=True, increasing=True) == -operation_argument(name, 6, negative=False, increasing=True)
    assert operation_argument("Sharpness", 10, negative=True, increasing=True) == pytest.approx(0.1)


def test_draws_follow_the_options() -> None:
    drawn = [draw_operations(RandAugmentOptions(n=3), (1, position, 0)) for position in range(2000)]
    lengths = np.array([len(operations) for operations in drawn])
    assert lengths.max() == 3
    assert abs(lengths.mean() - 1.5) < 0.07  # half of three
    counts = {name: sum(one == name for operations in drawn for one, _ in operations) for name in OPERATIONS}
    assert min(counts.values()) > 140  # of 200
    assert max(counts.values()) < 260
    degrees = np.array([argument for operations in drawn for name, argument in operations if name == "Rotate"]) / 3
    assert abs(np.abs(degrees).mean() - 7) < 0.15
    assert abs(np.abs(degrees).std() - 0.5) < 0.1
    assert 0.35 < (degrees < 0).mean() < 0.65


def test_draws_are_keyed_and_limited() -> None:
    everything = RandAugmentOptions(m=9, std=8, n=16, probability=1.0)
    one = draw_operations(everything, (1, 2, 0))
    assert len(one) == 16
    assert one == draw_operations(everything, (1, 2, 0))
    assert one != draw_operations(everything, (1, 2, 1))
    assert one != draw_operations(everything, (1, 3, 0))
    assert one[:2] == draw_operations(RandAugmentOptions(m=9, std=8, n=2, probability=1.0), (1, 2, 0))
    arguments = [draw_operations(everything, (1, position, 0)) for position in range(200)]
    assert max(abs(argument) for operations in arguments for name, argument in operations if name == "Rotate") == 30
