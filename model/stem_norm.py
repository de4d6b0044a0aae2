"""Batch norm and GELU of the stem in one, on channels-last tokens.

The stem's tensors are the largest of the network, and torch's own batch norm is slow or inexact on them on a CPU (2.13): it wants
channels outermost, which costs copies between it and the convolutions, and channels-last it sums statistics in one running float32,
which costs gradients half a digit. In training on a CPU the same formulas run here over rows of channels, a piece that fits the
cache at a time; everywhere else torch's batch norm runs.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIECE = 2**19  # elements of the rows that are taken at once


class StemNorm(nn.BatchNorm3d):
    """``nn.BatchNorm3d``, parameters and running statistics included, followed by GELU if ``gelu``."""

    def __init__(self, channels: int, eps: float, gelu: bool) -> None:
        super().__init__(channels, eps=eps)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) floating to the same."""
        if self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._train_on_rows(x)
        # With one frame strides leave open which layout it is, and torch reads gradients in the wrong one.
        x = super().forward(x.contiguous() if torch.is_grad_enabled() and x.device.type == "cpu" else x)
        return F.gelu(x) if self.gelu else x

    def folded(self, conv: nn.Conv3d) -> tuple[Tensor, Tensor]:
        """Weight and bias of a convolution that does what ``conv`` and this norm do in evaluation."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        assert conv.bias is not None
        return conv.weight * scale.view(-1, 1, 1, 1, 1), (conv.bias - self.running_mean) * scale + self.bias

    def _train_on_rows(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 4, 1)
        rows = tokens.reshape(-1, self.num_features).contiguous()
        out, mean, variance = cast(tuple[Tensor, ...], _NormRows.apply(rows, self.weight, self.bias, self.eps, self.gelu))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance * (len(rows) / max(1, len(rows) - 1))).to(self.running_var.dtype), share)
        return out.view(tokens.shape).permute(0, 4, 1, 2, 3)


class _NormRows(torch.autograd.Function):
    """Rows (N, C) normalised with their own statistics, scaled, shifted, and through GELU: with mean (C,) and variance (C,).

    With d = x - mean, r = 1 / sqrt(variance + eps) and y = w r d + b, a gradient h of y gives

        db = sum h    dw = r sum h d    dx = w r (h - db / N - r dw d / N)           [Ioffe and Szegedy 2015, section 3]
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)
        pieces = _pieces(x)
        mean = _sum([piece.to(exact).sum(0) for piece in pieces], weight) / len(x)
        broad = _broad(mean, pieces)
        variance = _sum([(piece - broad).square_().sum(0) for piece in pieces], weight) / len(x)
        scale = weight * torch.rsqrt(variance + eps)
        by, to = _broad(scale, pieces), _broad(bias - mean * scale, pieces)
        out = torch.empty_like(x)
        for piece, done in zip(pieces, _pieces(out), strict=True):
            y = torch.addcmul(to, piece, by, out=done if done.dtype == exact else None)
            y = torch.ops.aten.gelu.out(y, out=y) if gelu else y
            if y is not done:
                done.copy_(y)
        ctx.gelu = gelu
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance = ctx.saved_tensors
        rate = torch.rsqrt(variance + ctx.eps)
        scale = weight * rate
        pieces, grads = _pieces(x), _pieces(grad.contiguous())
        centre, by, to = (_broad(each, pieces) for each in (mean, scale, bias - mean * scale))

        def through_gelu(piece: Tensor, given: Tensor) -> Tensor:
            h = given.to(mean.dtype, copy=True)
            return torch.ops.aten.gelu_backward.grad_input(h, torch.addcmul(to, piece, by), grad_input=h) if ctx.gelu else h

        sums, products = [], []
        for piece, given in zip(pieces, grads, strict=True):
            h = through_gelu(piece, given)
            sums.append(h.sum(0))
            products.append((piece - centre).mul_(h).sum(0))
        grad_bias, grad_weight = _sum(sums, bias), _sum(products, weight) * rate
        slope = grad_weight * rate / len(x) * scale
        minus, plus = _broad(-slope, pieces), _broad(mean * slope - grad_bias / len(x) * scale, pieces)
        out = torch.empty_like(x)
        for piece, given, done in zip(pieces, grads, _pieces(out), strict=True):
            # Made again: keeping h would take as much memory as the layer's output.
            done.copy_(through_gelu(piece, given).mul_(by).addcmul_(piece.to(mean.dtype), minus).add_(plus))
        return out, grad_weight, grad_bias, None, None


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Contiguous rows (N, C) in pieces of :data:`PIECE` elements, as many rows in one as go: long rows are what torch is fast at."""
    many = math.gcd(len(x), 64)
    return torch.split(x.view(len(x) // many, -1), max(1, PIECE // (many * x.shape[1])))


def _broad(channels: Tensor, pieces: tuple[Tensor, ...]) -> Tensor:
    """(C,) again and again, as long as the rows of ``pieces``."""
    return channels.repeat(pieces[0].shape[1] // len(channels))


def _sum(parts: list[Tensor], channels: Tensor) -> Tensor:
    """The sum over the rows of all pieces, from each piece's own: (C,), like ``channels``."""
    return torch.stack(parts).view(-1, len(channels)).sum(0)
