"""Blocks: how the gating units, their linear layers and the residual make one layer of the network.

Tokens of a stage travel as (N, D) channels-last rows in *window order*, (B, T, windows, tokens of a window): put into that
order once per stage (:class:`WindowGrid`), so that no unit has to partition anything. A layer is

    f(x) = fc2(G(GELU(fc1(LN(x)))))                                                                        [released]

and a block adds one, two or a combination of them to x. Three things are arranged for speed, none changes the result beyond
rounding: fc1 writes hidden channels as rows, sorted by channel group, which is what the units' matrix products want;
LayerNorm's scale and shift are folded into fc1, so layers that read the same x share one normalisation; and fc2 adds to the
sum of the layers before it instead of making its own.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.presets import ResolvedConfig, Version
from model.units import GatingUnit, PoSGU, PoSTGU, PoTGU
from model.windows import WindowGrid

NORM_EPS = 1e-5


class GatedLayer(nn.Module):
    """LN, fc1, GELU, the gate of one or two units, fc2. [released with one unit; the placement with two is inferred]

    width: D. expansion: r_e; fc1 makes r_e*D hidden channels, the halves u and v of one unit. With two units (PoTGU, PoSGU)
    ``version`` says how they share them: ``v2`` gives each unit half of the channels and concatenates, ``v3`` gives the
    whole to both and concatenates, ``v4`` gives the whole to both and adds. [paper figure 5]
    """

    def __init__(self, width: int, expansion: int, units: Sequence[GatingUnit], version: Version = "v1") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, expansion * width)
        if version == "v1":
            (self.gate_unit,) = units
        else:
            self.gate_unit_t, self.gate_unit_s = units
        self.fc2 = nn.Linear(expansion * width // (1 if version == "v3" else 2), width)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.version = version
        self.groups = units[0].pos.groups

    def fc1_rows(self) -> tuple[Tensor, Tensor]:
        """fc1 with LN's scale and shift folded in, rows sorted by (piece, group, channel of the group): (r_e*D, D), (r_e*D,)."""
        weight = self.fc1.weight * self.norm.weight
        bias = self.fc1.bias + (self.fc1.weight * self.norm.bias).sum(dim=1)
        pieces = 4 if self.version == "v2" else 2
        # Hidden channel c of a piece belongs to group c mod g, so (C/g, g) is the order of its rows.
        weight = weight.view(pieces, -1, self.groups, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        return weight, bias.view(pieces, -1, self.groups).transpose(1, 2).reshape(-1)

    def fc2_rows(self) -> Tensor:
        """fc2's weight transposed, rows sorted like the gated channels: (gated channels, D)."""
        weight = self.fc2.weight
        pieces = 2 if self.version in ("v2", "v3") else 1
        return weight.view(weight.shape[0], pieces, -1, self.groups).transpose(2, 3).reshape(weight.shape).t()

    def gate(self, hidden: Tensor, windows: WindowGrid) -> Tensor:
        """Hidden channels (r_e*D, B, T, W, n), sorted as :meth:`fc1_rows`, to the gated channels, sorted as fc2 reads them."""
        pieces = hidden.view(4 if self.version == "v2" else 2, self.groups, -1, *hidden.shape[1:]).unbind(0)
        if self.version == "v1":
            return self.gate_unit.gate(pieces[0], pieces[1], windows).flatten(0, 1)
        # The first two pieces go through time, the last two through space: other ones in V2, the same ones in V3 and V4.
        temporal = self.gate_unit_t.gate(pieces[0], pieces[1], windows).flatten(0, 1)
        spatial = self.gate_unit_s.gate(pieces[-2], pieces[-1], windows).flatten(0, 1)
        return temporal + spatial if self.version == "v4" else torch.cat([temporal, spatial])


def sum_of_layers(x: Tensor, layers: Sequence[GatedLayer], windows: WindowGrid) -> Tensor:
    """The sum of f(x) over ``layers`` that read the same x: (B, T, W, n, D) window-ordered tokens to the same shape."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS).flatten(0, 3).t()  # (D, N), without a copy
    # Added one by one: through stack().sum() autograd would hand all biases gradients that share one memory, and accumulating
    # over micro-batches would count them twice.
    out: Tensor = layers[0].fc2.bias
    for layer in layers[1:]:
        out = out + layer.fc2.bias
    for layer in layers:
        weight, bias = layer.fc1_rows()
        hidden = F.gelu(torch.addmm(bias[:, None], weight, normed))  # (r_e*D, N)
        gated = layer.gate(hidden.view(-1, *x.shape[:-1]), windows)
        out = torch.addmm(out, gated.flatten(1).t(), layer.fc2_rows())  # (N, D), the product adds to what is there
    return out.view(x.shape)


class DropPath(nn.Module):
    """Stochastic depth: in training each sample's branch is dropped with probability ``rate``, else scaled by 1/(1 - rate).

    Draws from torch's default generator of the device and nothing else, so a seed set before a micro-batch fixes it.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...) floating to the same."""
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        kept = torch.rand(branch.shape[0], device=branch.device) < keep
        scale = kept.to(branch.dtype) / max(keep, torch.finfo(branch.dtype).tiny)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Branch(nn.Module):
    """One level of nesting that the released names have (``t_fc.encoder.fc1``), kept so that checkpoints fit by name."""

    def __init__(self, encoder: GatedLayer) -> None:
        super().__init__()
        self.encoder = encoder


class Block(nn.Module):
    """One block of a stage: residual steps, each the sum of the layers that read the same x.

    ``parallel`` V1 is one step of a temporal and a spatial layer [released]; V2-V4 one step of one layer with both units;
    ``temporal_spatial`` and ``spatial_temporal`` two steps with a residual each, ``joint`` one step with PoSTGU [inferred].
    """

    def __init__(self, config: ResolvedConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width, channels, groups = config.widths[stage], config.unit_channels[stage], config.groups[stage]
        frames, window, init = config.num_token_frames, config.windows[stage], config.dictionary_init

        def branch(*units: GatingUnit) -> Branch:
            return Branch(GatedLayer(width, config.expansion, units, config.version))

        if config.block == "joint":
            self.st_fc = branch(PoSTGU(channels, groups, frames, window, init))
            self.order: tuple[tuple[str, ...], ...] = (("st_fc",),)
        elif config.version != "v1":
            self.mix = branch(PoTGU(channels, groups, frames, init), PoSGU(channels, groups, window, init))
            self.order = (("mix",),)
        else:
            self.t_fc = branch(PoTGU(channels, groups, frames, init))
            self.fc = branch(PoSGU(channels, groups, window, init))
            self.order = {
                "parallel": (("t_fc", "fc"),),
                "temporal_spatial": (("t_fc",), ("fc",)),
                "spatial_temporal": (("fc",), ("t_fc",)),
            }[config.block]
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, windows: WindowGrid) -> Tensor:
        """Window-ordered tokens (B, T, W, n, D), floating, to the same shape."""
        for names in self.order:
            layers = [cast(Branch, self.get_submodule(name)).encoder for name in names]
            x = x + self.drop_path(sum_of_layers(x, layers, windows))
        return x


class Stage(nn.ModuleList):
    """The blocks of one stage, around which tokens are put into window order and back."""

    def __init__(self, blocks: Sequence[Block], window: int, recompute: bool = False) -> None:
        super().__init__(blocks)
        self.window = window
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last (B, T, H, W, D), floating, to the same shape."""
        windows = WindowGrid.of(x.shape[2], x.shape[3], self.window, x.device)
        x = windows.partition(x)
        for block in self:
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, windows, use_reentrant=False) if recompute else block(x, windows)
        return windows.merge(x)
