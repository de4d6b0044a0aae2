"""The gating units: PoTGU over time, PoSGU over a spatial window, PoSTGU over both.

All compute ``G(z) = pos(u) * v`` where z holds 2C channels, u its first half and v its second; they differ in the tokens
that ``pos`` relates. Called as a module, a unit takes what the equations show, (..., n, 2C) channels-last tokens. The
network calls :func:`gelu_gate`, G(GELU(z)) on *grouped* tokens (g, C/g, R, T, n): g channel groups first, the n tokens of
each frame of each of R tubes last, in which each map is g matrix products on contiguous memory. blocks.py arranges for z to
come out of its linear layer like that.

[paper] names the units; PoTGU and PoSGU are [released]; the arithmetic of PoSTGU is [inferred].
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.errors import ModelError
from model.lrpe import LRPE
from model.presets import DictionaryInit


class Relations(NamedTuple):
    """One unit's map spelled out for a grid: matrices W_s (g, n, n), token bias b (n,), and whether tokens are frames."""

    matrices: Tensor
    bias: Tensor
    over_time: bool


class GatingUnit(nn.Module):
    """What the three units share: an LRPE over ``extents``, and the gate.

    channels: C, the channels of u and of v. groups: g, a divisor of C. extents: the tokens one map relates.
    """

    over_time: ClassVar[bool] = False

    def __init__(self, channels: int, groups: int, extents: tuple[int, ...], init: DictionaryInit = "zeros") -> None:
        super().__init__()
        if channels % groups:
            raise ModelError(f"groups: got {groups} for {channels} channels, expected a divisor of {channels}")
        self.channels = channels
        self.pos = LRPE(extents, groups, init)

    def forward(self, z: Tensor) -> Tensor:
        """Channels-last tokens (..., n, 2C), floating, to (..., n, C); each run of n tokens is mapped by itself."""
        groups, tokens = self.pos.groups, math.prod(self.pos.extents)
        if not z.is_floating_point():
            raise ModelError(f"{type(self).__name__}: got {z.dtype}, expected floating point")
        if z.ndim < 2 or z.shape[-2:] != (tokens, 2 * self.channels):
            raise ModelError(f"{type(self).__name__}: got {tuple(z.shape)}, expected (..., {tokens}, {2 * self.channels})")
        grouped = z.reshape(-1, tokens, 2, self.channels // groups, groups).permute(2, 4, 3, 0, 1)  # (2, g, C/g, R, n)
        u, v = grouped[..., None] if self.over_time else grouped[..., None, :]
        relations = Relations(self.pos.matrices(kind=z.dtype), self.pos.bias().to(z.dtype), self.over_time)
        gated: Tensor = pos(u.contiguous(), relations) * v
        gated = gated.reshape(groups, -1, *grouped.shape[3:]).permute(2, 3, 1, 0)  # (R, n, C/g, g)
        return gated.reshape(*z.shape[:-1], self.channels)

    def relations(self, frames: int, sides: tuple[int, int], kind: torch.dtype) -> Relations:
        """The map for tubes of ``frames`` frames and windows of ``sides``, in the type ``kind``."""
        used = self._tokens(frames, sides)
        if len(used) != 2 and frames != self.pos.extents[0]:
            raise ModelError(
                f"{type(self).__name__}: got {frames} frames, expected {self.pos.extents[0]}; build the model with that "
                "number of frames and load the weights into it (model.weights), which resizes the temporal dictionaries"
            )
        return Relations(self.pos.matrices(used, kind), self.pos.bias(used).to(kind), self.over_time)

    def _tokens(self, frames: int, sides: tuple[int, int]) -> tuple[int, ...]:
        """The token grid of one map."""
        raise NotImplementedError


class PoTGU(GatingUnit):
    """Temporal unit: each spatial site is a sequence of T tokens. [paper, released]"""

    over_time = True

    def __init__(self, channels: int, groups: int, num_frames: int, init: DictionaryInit = "zeros") -> None:
        super().__init__(channels, groups, (num_frames,), init)

    def _tokens(self, frames: int, sides: tuple[int, int]) -> tuple[int, ...]:
        return (frames,)


class PoSGU(GatingUnit):
    """Spatial unit: each window of each frame is a square of tokens. [paper, released]"""

    def __init__(self, channels: int, groups: int, window: int, init: DictionaryInit = "zeros") -> None:
        super().__init__(channels, groups, (window, window), init)

    def _tokens(self, frames: int, sides: tuple[int, int]) -> tuple[int, ...]:
        return sides


class PoSTGU(GatingUnit):
    """Joint unit: each tube, a window through all T frames, is a grid of tokens. [paper names it; arithmetic inferred]"""

    def __init__(self, channels: int, groups: int, num_frames: int, window: int, init: DictionaryInit = "zeros") -> None:
        super().__init__(channels, groups, (num_frames, window, window), init)

    def _tokens(self, frames: int, sides: tuple[int, int]) -> tuple[int, ...]:
        return (frames, *sides)


def pos(u: Tensor, relations: Relations) -> Tensor:
    """pos(u) on contiguous grouped tokens (g, C/g, R, T, n), a new tensor of the same shape."""
    bias = relations.bias[:, None] if relations.over_time else relations.bias
    mixed = _mix(relations.matrices, u, relations.over_time)
    return mixed.add_(bias).view(u.shape)


def _mix(matrices: Tensor, u: Tensor, over_time: bool, out: Tensor | None = None) -> Tensor:
    """sum_k W_s[m, k] u[k]: for frames W_s times all sites as columns, for tokens of windows and tubes all rows times W_s^T."""
    tokens, runs = _runs(u, matrices, over_time), None if out is None else _runs(out, matrices, over_time)
    if not over_time:
        return torch.bmm(tokens, matrices.transpose(1, 2), out=runs)
    each = matrices[:, None].expand(*tokens.shape[:2], -1, -1).flatten(0, 1)
    # Not matmul, which with a given result makes its own first and copies.
    return torch.bmm(each, tokens.flatten(0, 1), out=None if runs is None else runs.flatten(0, 1)).view(tokens.shape)


def _runs(u: Tensor, matrices: Tensor, over_time: bool) -> Tensor:
    """Grouped tokens as the matrices take them: (g, C/g * R, T, n) for frames, else (g, rows, n)."""
    return u.view(len(u), -1, *u.shape[-2:]) if over_time else u.view(len(u), -1, matrices.shape[-1])


def gate_activated(h: Tensor, relations: Relations, real: Tensor | None = None) -> Tensor:
    """G(h) on grouped tokens: h (2, g, C/g, R, T, n), u then v, contiguous, to (g, C/g, R, T, n). For inference.

    real: (R, 1, n) of 1 and 0 where a token is padding and counts as zero in u, or None.
    """
    return pos(h[0] if real is None else h[0] * real, relations).mul_(h[1])


def gelu_gate(z: Tensor, relations: Relations, real: Tensor | None = None) -> Tensor:
    """G(GELU(z)), shapes as for :func:`gate_activated`, with gradients."""
    gated: Tensor = _GeluGate.apply(z, *relations, real)  # type: ignore[no-untyped-call]
    return gated


class _GeluGate(torch.autograd.Function):
    """GELU and gate in one, for what autograd would keep and copy: GELU(z) is made again in backward instead of being kept,
    and the gradients of u and v are written side by side instead of being joined afterwards."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, matrices: Tensor, bias: Tensor, over_time: bool, real: Tensor | None) -> Tensor:
        u, v = F.gelu(z)
        mixed = pos(u if real is None else u.mul_(real), Relations(matrices, bias, over_time))
        ctx.over_time = over_time
        ctx.save_for_backward(z, matrices, mixed, real)
        return mixed * v if any(ctx.needs_input_grad) else mixed.mul_(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, matrices, mixed, real = ctx.saved_tensors
        u, v = F.gelu(z)
        grad_z = torch.empty_like(z)
        torch.mul(grad, mixed, out=grad_z[1])
        grad_mixed = v.mul_(grad)
        _mix(matrices.transpose(1, 2), grad_mixed, ctx.over_time, out=grad_z[0])
        if real is not None:
            u.mul_(real)
            grad_z[0].mul_(real)
        torch.ops.aten.gelu_backward.grad_input(grad_z, z, grad_input=grad_z)
        rows, columns = (_runs(t, matrices, ctx.over_time) for t in (grad_mixed, u))
        if ctx.over_time:
            # One axis after the other: torch sums bfloat16 over first and last axes at once five times slower.
            return grad_z, torch.matmul(rows, columns.transpose(2, 3)).sum(dim=1), rows.sum(dim=3).sum(dim=(0, 1)), None, None
        return grad_z, torch.bmm(rows.transpose(1, 2), columns), rows.sum(dim=(0, 1)), None, None
