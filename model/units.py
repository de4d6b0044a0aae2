"""The gating units: PoTGU over time, PoSGU over a spatial window, PoSTGU over both.

All compute ``G(z) = pos(u) * v`` where z holds 2C channels, u its first half and v its second; they differ in the tokens
that ``pos`` relates. Called as a module, a unit takes what the equations show, (..., n, 2C) channels-last tokens. The
network calls :meth:`GatingUnit.gate`, the same on *grouped* tokens: (g, C/g, B, T, W, n) with g channel groups first and the
n tokens of each of W windows last, in which each map is g matrix products on contiguous memory. blocks.py arranges for z
to come out of its linear layer like that.

[paper] names the units; PoTGU and PoSGU are [released]; the arithmetic of PoSTGU is [inferred].
"""

import math

import torch
from torch import Tensor, nn

from model.errors import ModelError
from model.lrpe import LRPE
from model.presets import DictionaryInit
from model.windows import WindowGrid


class GatingUnit(nn.Module):
    """What the three units share: an LRPE over ``extents``, and the gate.

    channels: C, the channels of u and of v. groups: g, a divisor of C. extents: the tokens one map relates.
    """

    def __init__(self, channels: int, groups: int, extents: tuple[int, ...], init: DictionaryInit = "zeros") -> None:
        super().__init__()
        if channels % groups:
            raise ModelError(f"groups: got {groups} for {channels} channels, expected a divisor of {channels}")
        self.channels = channels
        self.pos = LRPE(extents, groups, init)

    def forward(self, z: Tensor) -> Tensor:
        """Channels-last tokens (..., n, 2C), floating, to (..., n, C); each run of n tokens is mapped by itself."""
        groups, extents = self.pos.groups, self.pos.extents
        tokens = math.prod(extents)
        if z.ndim < 2 or z.shape[-2:] != (tokens, 2 * self.channels):
            raise ModelError(f"{type(self).__name__}: got {tuple(z.shape)}, expected (..., {tokens}, {2 * self.channels})")
        frames = 1 if len(extents) == 2 else extents[0]
        halves = z.reshape(-1, tokens, 2, self.channels // groups, groups).permute(2, 4, 3, 0, 1)
        u, v = halves.reshape(2, groups, self.channels // groups, -1, frames, 1, tokens // frames)
        side_y, side_x = extents[-2:] if len(extents) > 1 else (1, 1)
        gated = self.gate(u, v, WindowGrid(side_y, side_x, 1, 1, (side_y, side_x)))
        gated = gated.reshape(groups, self.channels // groups, -1, tokens).permute(2, 3, 1, 0)  # (R, n, C/g, g)
        return gated.reshape(*z.shape[:-1], self.channels)

    def gate(self, u: Tensor, v: Tensor, windows: WindowGrid) -> Tensor:
        """pos(u) * v on grouped tokens (g, C/g, B, T, W, n) of ``windows``."""
        return self.map(u, windows) * v

    def map(self, u: Tensor, windows: WindowGrid) -> Tensor:
        """pos(u) on grouped tokens (g, C/g, B, T, W, n), same shape. Padding tokens of u count as zero."""
        raise NotImplementedError


class PoTGU(GatingUnit):
    """Temporal unit: each spatial site is a sequence of T tokens. [paper, released]"""

    def __init__(self, channels: int, groups: int, num_frames: int, init: DictionaryInit = "zeros") -> None:
        super().__init__(channels, groups, (num_frames,), init)

    def map(self, u: Tensor, windows: WindowGrid) -> Tensor:
        groups, _, _, frames, _, _ = u.shape
        _check_frames(self, frames)
        # All sites of a frame are the columns: (T, T) by (T, W*n) for every channel and clip.
        columns = u.reshape(groups, -1, frames, u.shape[4] * u.shape[5])
        mixed = torch.matmul(self.pos.matrices()[:, None], columns)
        return mixed.add_(self.pos.bias()[:, None]).view(u.shape)


class PoSGU(GatingUnit):
    """Spatial unit: each window of each frame is a square of tokens. [paper, released]"""

    def __init__(self, channels: int, groups: int, window: int, init: DictionaryInit = "zeros") -> None:
        super().__init__(channels, groups, (window, window), init)

    def map(self, u: Tensor, windows: WindowGrid) -> Tensor:
        # Every window of every frame, clip and channel of the group is a row: (all rows, n) by (n, n).
        rows = _without_padding(u, windows).reshape(u.shape[0], -1, u.shape[-1])
        mixed = torch.bmm(rows, self.pos.matrices(windows.sides).transpose(1, 2))
        return mixed.add_(self.pos.bias(windows.sides)).view(u.shape)


class PoSTGU(GatingUnit):
    """Joint unit: each window through all T frames is a tube of tokens. [paper names it; arithmetic inferred]"""

    def __init__(self, channels: int, groups: int, num_frames: int, window: int, init: DictionaryInit = "zeros") -> None:
        super().__init__(channels, groups, (num_frames, window, window), init)

    def map(self, u: Tensor, windows: WindowGrid) -> Tensor:
        _check_frames(self, u.shape[3])
        tube = (u.shape[3], *windows.sides)
        by_window = _without_padding(u, windows).transpose(3, 4)  # (g, C/g, B, W, T, n)
        rows = by_window.reshape(u.shape[0], -1, math.prod(tube))
        mixed = torch.bmm(rows, self.pos.matrices(tube).transpose(1, 2))
        return mixed.add_(self.pos.bias(tube)).view(by_window.shape).transpose(3, 4)


def _check_frames(unit: GatingUnit, frames: int) -> None:
    if frames != unit.pos.extents[0]:
        raise ModelError(
            f"{type(unit).__name__}: got {frames} frames, expected {unit.pos.extents[0]}; build the model with that "
            "number of frames and load the weights into it (model.weights), which resizes the temporal dictionaries"
        )


def _without_padding(u: Tensor, windows: WindowGrid) -> Tensor:
    return u if windows.real is None else u * windows.real.to(u.dtype)
