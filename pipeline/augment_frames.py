"""RandAugment's fifteen operations on resized frames, in torch: one implementation for CPU and GPU.

Frames are uint8 (3, T, H, W), planar because that is how the model reads them. Every operation is the same for all frames of a clip
in what it does (angle, factor, threshold); what Pillow takes from a picture's content (extremes, histogram, mean grey) is taken of each
frame. Arithmetic is in whole levels, or in float32 in separate steps that no device contracts, so that a CPU and a GPU should give
the same levels; only rotation, shear and translation interpolate, and may differ by one level (tests that need a GPU hold both).
What lies outside a frame is mid-grey.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 128  # of what comes from outside a frame
GREY_WEIGHTS = (19595.0, 38470.0, 7471.0)  # ITU-R BT.601 luma, of 65536; sums stay below 2^24, so float32 is exact
SOLARIZE_ADD_BELOW = 128
CHUNK_PIXELS = 1 << 17  # of the frames that are worked on together on a CPU

Operation: TypeAlias = Callable[[Tensor, float], Tensor]


def apply_operations(frames: Tensor, operations: Sequence[tuple[str, float]]) -> Tensor:
    """Applies (name, argument) one after the other; see `augmentation.draw_operations` for both. frames: uint8 (3, T, H, W)."""
    if not operations:
        return frames
    height, width = frames.shape[2:]
    # A few frames at a time stay in a core's cache, which is a third cheaper at 224 pixels; a GPU has fewer kernels to start with all.
    num = frames.shape[1] if frames.is_cuda else max(1, CHUNK_PIXELS // (height * width))
    changed = torch.empty_like(frames, memory_format=torch.contiguous_format)
    for t in range(0, frames.shape[1], num):
        part = frames[:, t : t + num]
        for name, argument in operations:
            part = _OPERATIONS[name](part, argument)
        changed[:, t : t + num] = part
    return changed


def grey(frames: Tensor) -> Tensor:
    """Luma of (3, T, H, W) frames, rounded: float32 (T, H, W) of whole levels."""
    red, green, blue = (frames[c] * weight for c, weight in enumerate(GREY_WEIGHTS))
    return red.add_(green).add_(blue).add_(32768.0).mul_(2.0**-16).floor_()


def _auto_contrast(frames: Tensor, argument: float) -> Tensor:
    """Stretches every channel of a frame to 0..255; a flat one stays."""
    low = frames.amin(dim=(2, 3), keepdim=True).float()
    span = frames.amax(dim=(2, 3), keepdim=True).float() - low
    # A quotient of whole numbers below 2^16 rounds to a whole number only if it is one: truncation is exact.
    stretched = frames.float().sub_(low).mul_(255.0).div_(span.clamp(min=1.0)).to(torch.uint8)
    return torch.where(span > 0, stretched, frames)


def _equalize(frames: Tensor, argument: float) -> Tensor:
    """Spreads the levels of every channel of a frame evenly, by Pillow's rule."""
    planes = frames.flatten(0, 1).flatten(1)
    places = planes.long() + torch.arange(len(planes), device=frames.device)[:, None] * 256
    counts = torch.bincount(places.flatten(), minlength=256 * len(planes)).view(-1, 256)
    highest = planes.amax(dim=1, keepdim=True).long()
    step = (planes.shape[1] - counts.gather(1, highest)) // 255  # the brightest level's pixels are not spread
    before = counts.cumsum(dim=1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    same = torch.arange(256, device=frames.device)
    return torch.where(step > 0, table, same).to(torch.uint8).take(places).view(frames.shape)


def _invert(frames: Tensor, argument: float) -> Tensor:
    return 255 - frames


def _posterize(frames: Tensor, bits: float) -> Tensor:
    return frames & (256 - (1 << (8 - int(bits))))


def _solarize(frames: Tensor, threshold: float) -> Tensor:
    return frames ^ (frames >= threshold).to(torch.uint8).mul_(255)


def _solarize_add(frames: Tensor, levels: float) -> Tensor:
    """Brightens dark pixels; 127 + 110, the most there is, fits a byte."""
    return frames + (frames < SOLARIZE_ADD_BELOW).to(torch.uint8).mul_(int(levels))


def _blend(other: Tensor | float, frames: Tensor, factor: float) -> Tensor:
    """other + factor * (frames - other), cut off to whole levels of 0..255."""
    return (frames - other).mul_(factor).add_(other).clamp_(0.0, 255.0).to(torch.uint8)


def _color(frames: Tensor, factor: float) -> Tensor:
    return _blend(grey(frames), frames, factor)


def _contrast(frames: Tensor, factor: float) -> Tensor:
    """Around each frame's mean grey, rounded to a level."""
    total = grey(frames).sum(dim=(1, 2), dtype=torch.float64, keepdim=True)  # of whole numbers: exact in any order
    mean = (total / (frames.shape[2] * frames.shape[3]) + 0.5).floor().float()
    return _blend(mean, frames, factor)


def _brightness(frames: Tensor, factor: float) -> Tensor:
    return _blend(0.0, frames, factor)


def _sharpness(frames: Tensor, factor: float) -> Tensor:
    """Away from, or towards, the frame smoothed with weights 1 around 5, of 13; a frame's border has no such mean and stays."""
    if min(frames.shape[2:]) < 3:
        return frames
    inner = frames[:, :, 1:-1, 1:-1]
    levels = frames.float()
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).add_(levels[:, :, 1:-1, 1:-1], alpha=4.0)
    smooth = smooth.add_(6.5).div_(13.0).floor_()
    sharpened = frames.clone()
    sharpened[:, :, 1:-1, 1:-1] = _blend(smooth, inner, factor)
    return sharpened


def _warp(kind: str, frames: Tensor, argument: float) -> Tensor:
    """Bilinear, with pixel centres at halves; grey flows in from outside."""
    grid = torch.from_numpy(_grid(kind, argument, frames.shape[2], frames.shape[3])).to(frames.device)
    planes = frames.flatten(0, 1).float().sub_(float(FILL))[None]
    warped = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    return warped.add_(FILL + 0.5).clamp_(0.0, 255.0).to(torch.uint8).view(frames.shape)


@lru_cache(maxsize=4)
def _grid(kind: str, argument: float, height: int, width: int) -> npt.NDArray[np.float32]:
    """Where each pixel comes from, float32 (1, H, W, 2) of (x, y) in [-1, 1]; made on the CPU for all devices."""
    angle = math.radians(argument)
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    from_x, from_y = {
        # Counter-clockwise around the centre, as Pillow turns; shears and translations say where a pixel is taken from.
        "Rotate": lambda: (
            math.cos(angle) * (x - width / 2) - math.sin(angle) * (y - height / 2) + width / 2,
            math.sin(angle) * (x - width / 2) + math.cos(angle) * (y - height / 2) + height / 2,
        ),
        "ShearX": lambda: (x + argument * y, y),
        "ShearY": lambda: (x, y + argument * x),
        "TranslateXRel": lambda: (x + argument * width, y),
        "TranslateYRel": lambda: (x, y + argument * height),
    }[kind]()
    return np.stack([2 * from_x / width - 1, 2 * from_y / height - 1], axis=-1, dtype=np.float32)[None]


_OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    **{kind: partial(_warp, kind) for kind in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")},
}
