"""From resized frames to normalised clips where a recipe augments them: RandAugment, colour jitter, normalisation, erasing.

Torch on the clips' device; all that is random comes as an `Augmentation`. Levels after RandAugment are whole; jitter and what follows
is float32, where CPU and GPU may differ by 1e-3 of a level (a test that needs a GPU holds it).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augment_frames import apply_operations
from pipeline.keyed import Augmentation, Purpose, raw_words
from pipeline.options import AugmentOptions

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
TO_YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])  # NTSC, 1953
NOISE_LEVELS = 1 << 16


def works_on_levels(augment: AugmentOptions) -> bool:
    """Whether the recipe changes frames before they are normalised, so that the graph must not normalise them."""
    return augment.randaugment is not None or augment.jitter is not None


def augment_levels(clips: Tensor, augmentations: Sequence[Augmentation], augment: AugmentOptions) -> None:
    """Changes N clips of whole levels 0 to 255, float32 (N, 3, T, H, W), in place to augmented and normalised ones.

    In place, because the pages of a fresh batch cost a CPU more than most augmentations.
    """
    mean, std = (torch.tensor(values, device=clips.device).view(3, 1, 1, 1) for values in (augment.mean, augment.std))
    for clip, augmentation in zip(clips, augmentations, strict=True):
        if augmentation.operations:
            clip.copy_(apply_operations(clip.to(torch.uint8), augmentation.operations))
        if augmentation.colour is not None:
            jitter(clip, augmentation.colour)
        clip.sub_(255 * mean).mul_(1 / (255 * std))


def jitter(clip: Tensor, colour: tuple[float, float, float, float]) -> None:
    """Jitters a clip of levels 0 to 255, float32 (3, T, H, W), in place.

    Brightness is a factor, contrast one around the frame's mean luma, saturation one around the pixel's luma, hue a turn of the chroma
    plane of YIQ. These four are linear and commute, so together they are a matrix and, per frame, an offset; levels are cut off once,
    at the end. (Pillow and torchvision cut off and round between the four, and turn the hue of HSV.)
    """
    brightness, contrast, saturation, turn = colour
    luma = np.array(LUMA)
    hue = np.linalg.inv(TO_YIQ) @ _rotation(2 * math.pi * turn) @ TO_YIQ
    matrix = brightness * contrast * (saturation * hue + (1 - saturation) * luma[None, :])
    means = clip.sum(dim=(2, 3), dtype=torch.float64) / (clip.shape[2] * clip.shape[3])  # (3, T), of whole numbers
    offset = (brightness * (1 - contrast) * (torch.tensor(luma, device=clip.device) @ means)).float()  # (T,)
    weights = torch.tensor(matrix, dtype=torch.float32, device=clip.device)
    for t in range(clip.shape[1]) if not clip.is_cuda else [slice(None)]:  # frames that stay in a core's cache, as in `augment_frames`
        part = clip[:, t]
        changed = (weights @ part.reshape(3, -1)).view(part.shape)
        part.copy_(changed.add_(offset[t].view(-1, 1, 1)).clamp_(0.0, 255.0))


def _rotation(angle: float) -> npt.NDArray[np.float64]:
    """Of the chroma plane, leaving luma alone."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([(1, 0, 0), (0, cosine, -sine), (0, sine, cosine)])


def erase(clips: Tensor, augmentations: Sequence[Augmentation | None]) -> None:
    """Overwrites the erased boxes of N normalised clips, float32 (N, 3, T, H, W), with zeros (the mean colour) or keyed normal noise."""
    for clip, augmentation in zip(clips, augmentations, strict=True):
        if augmentation is None or not augmentation.erased:
            continue
        boxes = [clip[:, t0:t1, y0:y1, x0:x1] for t0, y0, x0, t1, y1, x1 in augmentation.erased]
        if augmentation.noise is None:
            for box in boxes:
                box.zero_()
            continue
        ends = list(accumulate(box.numel() for box in boxes))
        values = torch.from_numpy(noise(augmentation.noise, ends[-1])).to(clips.device)
        for box, end in zip(boxes, ends, strict=True):
            box.copy_(values[end - box.numel() : end].view(box.shape))


def noise(key: tuple[int, int, int], count: int) -> npt.NDArray[np.float32]:
    """`count` standard normal values, float32, of (seed, position, view): equally likely quantiles, 65,536 of them, within ±4.33."""
    seed, position, view = key
    drawn = raw_words(seed, position, Purpose.NOISE, view, count=-(-count // 4)).astype("<u8", copy=False).view("<u2")
    values: npt.NDArray[np.float32] = np.take(_quantiles(), drawn[:count])
    return values


@lru_cache(maxsize=1)
def _quantiles() -> npt.NDArray[np.float32]:
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((i + 0.5) / NOISE_LEVELS) for i in range(NOISE_LEVELS // 2, NOISE_LEVELS)], dtype=np.float32)
    return np.concatenate([-upper[::-1], upper])
