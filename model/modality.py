"""What of a clip the network looks at: its colours, or only what changes from frame to frame. No parameters.

Colours show the scene, and a small dataset is soon learnt by its scenes. Differences of frames hide what stands still, so that little
is left to recognise but the motion (the idea of the RGB-difference inputs of temporal segment networks, Wang et al. 2016).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.presets import LAGS


def see(clips: Tensor, modality: str) -> Tensor:
    """(B, C, T, H, W) normalised pixels to what the stem reads: unchanged for ``rgb``, (B, len(LAGS), T, H, W) differences otherwise.

    Channel i is g[t + LAGS[i]] - g[t] of the channels' mean g, and 0 for the last LAGS[i] frames.
    """
    if modality == "rgb":
        return clips
    grey = clips.mean(dim=1)
    frames = grey.shape[1]
    changes = [F.pad(grey[:, lag:] - grey[:, :-lag], (0, 0, 0, 0, 0, min(lag, frames))) for lag in LAGS[modality]]
    return torch.stack(changes, dim=1)
