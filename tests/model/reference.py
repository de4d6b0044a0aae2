"""What the model must equal: the equations as plain loops in float64, and the released formulation on whole networks."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.bench_model import plain_logits as plain_logits
from model.posmlp import PosMLPVideo


def loop_map(u: Tensor, table: Tensor, bias: Tensor, extents: tuple[int, ...]) -> Tensor:
    """pos(u)[m, c] = sum_k P[index(m, k), c mod g] u[k, c] + b[m] for one run of tokens u (n, C), token by token."""
    tokens = list(itertools.product(*(range(extent) for extent in extents)))
    groups = table.shape[1]
    rows = []
    for m, out_token in enumerate(tokens):
        row = []
        for c in range(u.shape[1]):
            total = bias.flatten()[m]
            for k, in_token in enumerate(tokens):
                index = 0
                for a, b, extent in zip(out_token, in_token, extents, strict=True):
                    index = index * (2 * extent - 1) + (a - b + extent - 1)
                total = total + table[index, c % groups] * u[k, c]
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def loop_gate(z: Tensor, table: Tensor, bias: Tensor, extents: tuple[int, ...]) -> Tensor:
    """G(z) = pos(u) * v on (R, n, 2C), run by run."""
    half = z.shape[-1] // 2
    return torch.stack([loop_map(run[:, :half], table, bias, extents) * run[:, half:] for run in z])


def loop_layer(x: Tensor, layer: nn.Module, extents: tuple[int, ...]) -> Tensor:
    """fc2(G(GELU(fc1(LN(x))))) on (R, n, D), with a layer's own modules applied one after the other."""
    state = dict(layer.named_parameters())
    z = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], eps=1e-5)
    z = F.gelu(F.linear(z, state["fc1.weight"], state["fc1.bias"]))
    pos = "gate_unit.pos."
    gated = loop_gate(z, state[pos + "window_relative_position_bias_table"], state[pos + "token_proj_n_bias"], extents)
    return F.linear(gated, state["fc2.weight"], state["fc2.bias"])


def randomise(module: nn.Module, seed: int) -> None:
    """Fills every parameter and running statistic with values of order one, so that a structural mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            scale = 1 / math.sqrt(tensor[0].numel()) if tensor.ndim > 1 and not name.endswith("n_bias") else 0.3
            offset = 1.0 if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")) else 0.0
            tensor.data.copy_(offset + scale * (values.abs() if name.endswith("running_var") else values))


def state_of(model: PosMLPVideo) -> dict[str, Tensor]:
    """Live weights and buffers by name: gradients of :func:`plain_logits` land in the model's parameters."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max|difference| / max|expected|."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
