"""Mixup and cutmix of a micro-batch, in torch on its device; which clips, how much and where comes as a `Mix`.

Each clip is mixed with the clip of another sample of its own micro-batch, so the result does not depend on ranks.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.augmentation import Box, Mix


def mix_clips(clips: Tensor, mix: Mix) -> None:
    """Mixes (B, C, T, H, W) in place: `share` of the own clip and the rest of the partner's, or the partner's box in all frames."""
    partners, waiting = mix.partners.tolist(), set(range(len(clips)))
    while waiting:  # along each cycle of partners, a clip is overwritten when the one before has taken from it
        slot = first = min(waiting)
        kept = clips[first].clone()
        while slot in waiting:
            waiting.remove(slot)
            partner = partners[slot]
            _mix(clips[slot], kept if partner == first else clips[partner], float(mix.shares[slot]), mix.boxes[slot])
            slot = partner


def _mix(clip: Tensor, other: Tensor, share: float, box: Box | None) -> None:
    if box is not None:
        y0, x0, y1, x1 = box
        clip[:, :, y0:y1, x0:x1] = other[:, :, y0:y1, x0:x1]
    elif share < 1:
        clip.mul_(share).add_(other, alpha=1 - share)


def mixed_targets(labels: Tensor, mix: Mix, num_classes: int) -> Tensor:
    """Float32 (B, K) of int64 (B,) labels: `share` for the own class and the rest for the partner's. Smoothing is the loss's."""
    shares = torch.from_numpy(mix.shares.astype(np.float32)).to(labels.device)[:, None]
    own = torch.nn.functional.one_hot(labels, num_classes).float()
    return own * shares + own[torch.from_numpy(mix.partners).to(labels.device)] * (1 - shares)
