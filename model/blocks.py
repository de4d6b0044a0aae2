"""Blocks: how the gating units, their linear layers and the residual make one layer of the network.

Tokens of a stage travel as channels-last *tubes*, (R, T, n, D): a window of n tokens through T frames, of R = B * windows in
all (:class:`WindowGrid`). A layer is

    f(x) = fc2(G(GELU(fc1(LN(x)))))                                                                        [released]

and a block adds one, two or a combination of them to x. Four things are arranged for speed, none changes the result beyond
rounding. Tubes do not see each other, so on a CPU a block takes a few at a time and what it makes of them stays in the
cache. fc1 writes hidden channels as rows, sorted by channel group, which is what the units' matrix products want. LayerNorm's
scale and shift are folded into fc1, so layers that read the same x share one normalisation. And fc2 adds to the residual and
the layers before it instead of making its own.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.presets import ResolvedConfig, Version
from model.products import add_product, gelu_fits, product, product_type
from model.units import GatingUnit, PoSGU, PoSTGU, PoTGU, Relations, gate_activated, gelu_gate
from model.windows import WindowGrid

NORM_EPS = 1e-5
CACHE_BYTES = 8 * 2**20  # hidden channels of the tubes that a block takes at once on a CPU


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

    def weights(self, frames: int, sides: tuple[int, int], kind: torch.dtype) -> "LayerWeights":
        """Everything of this layer that no token decides, for tubes of a grid, in the type ``kind``.

        LN's scale and shift are folded into fc1, for tokens as :func:`normalise` gives them. Hidden channel c of a piece belongs to group
        c mod g, so (C/g, g) is the order of its rows, and they are sorted by (piece, group, channel of the group).
        """
        pieces = 4 if self.version == "v2" else 2
        fc1 = self.fc1.weight * self.norm.weight
        bias = torch.addmv(self.fc1.bias, self.fc1.weight, self.norm.bias)
        fc1 = torch.cat([fc1[:, :-1] - fc1[:, -1:], bias[:, None]], dim=1).to(kind)
        fc1 = fc1.view(pieces, -1, self.groups, fc1.shape[1]).transpose(1, 2).reshape(fc1.shape)
        fc2 = self.fc2.weight.to(kind)
        fc2 = fc2.view(len(fc2), 2 if self.version in ("v2", "v3") else 1, -1, self.groups).transpose(2, 3).reshape(fc2.shape).t()
        units = [self.gate_unit] if self.version == "v1" else [self.gate_unit_t, self.gate_unit_s]
        return LayerWeights(fc1, fc2, tuple(unit.relations(frames, sides, kind) for unit in units))

    def gated(self, normed: Tensor, own: "LayerWeights", tubes: torch.Size, real: Tensor | None) -> Tensor:
        """Normalised tokens (R*T*n, D) of ``tubes``, a shape (R, T, n), to the gated channels (rows, R*T*n) as fc2 reads them."""
        activated = gelu_fits(normed.device, normed.dtype)
        hidden = product(own.fc1, normed, gelu=activated)  # (r_e*D, R*T*n)
        # Through time first, then through space: two pieces each in V2, the same two in V3 and V4.
        both = hidden.view(2, -1, *hidden.shape[1:]).unbind() if self.version == "v2" else [hidden] * len(own.relations)
        gate = gate_activated if activated else gelu_gate
        outs = [
            gate(z.view(2, self.groups, -1, *tubes), way, real).view(-1, len(normed)) for z, way in zip(both, own.relations, strict=True)
        ]
        return outs[0] + outs[1] if self.version == "v4" else torch.cat(outs) if self.version != "v1" else outs[0]


class LayerWeights(NamedTuple):
    """What a layer's parameters come to for a grid: fc1 (r_e*D, D) with its bias in the last column, fc2 (gated rows, D),
    its maps."""

    fc1: Tensor
    fc2: Tensor
    relations: tuple[Relations, ...]


def normalise(x: Tensor, kind: torch.dtype) -> Tensor:
    """LN without scale and shift on (..., D), as (rows, D) in the type ``kind``, with ones for its last channel.

    Normalised channels sum to zero, so the last one is minus the sum of the others: W[:, :-1] - W[:, -1:] on the others is W on all, and
    the free channel carries a bias that no pass over the product has to add.
    """
    scale, shift = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    scale[-1], shift[-1] = 0.0, 1.0
    return F.layer_norm(x, x.shape[-1:], scale, shift, eps=NORM_EPS).view(-1, x.shape[-1]).to(kind)


def add_layers(x: Tensor, layers: Sequence[GatedLayer], windows: WindowGrid, residual: bool = True) -> Tensor:
    """x plus the sum of f(x) over ``layers``, or without ``residual`` that sum alone: tubes (R, T, n, D) to the same shape."""
    tubes, frames, _, width = x.shape
    kind = product_type(x)
    weights = [layer.weights(frames, windows.sides, kind) for layer in layers]
    # Added one by one: through stack().sum() autograd would hand all biases gradients that share one memory, and accumulating
    # over micro-batches would count them twice.
    bias: Tensor = layers[0].fc2.bias
    for layer in layers[1:]:
        bias = bias + layer.fc2.bias
    bias, real = bias.to(x.dtype), windows.real_tokens(tubes)
    hidden_bytes = max(layer.fc1.out_features for layer in layers) * frames * x.shape[2] * kind.itemsize
    at_once = max(1, CACHE_BYTES // hidden_bytes) if x.device.type == "cpu" else tubes
    done = []
    for some, visible in zip(torch.split(x, at_once), [None] * tubes if real is None else torch.split(real, at_once), strict=False):
        normed = normalise(some, kind)
        out = some.reshape(-1, width) + bias if residual else bias.repeat(len(normed), 1)
        for layer, own in zip(layers, weights, strict=True):
            gated = layer.gated(normed, own, some.shape[:-1], visible)
            out = add_product(out, gated, own.fc2)
        done.append(out.view(some.shape))
    return done[0] if len(done) == 1 else torch.cat(done)


class DropPath(nn.Module):
    """Stochastic depth: in training each sample's branch is dropped with probability ``rate``, else scaled by 1/(1 - rate).

    Draws from torch's default generator of the device and nothing else, so a seed set before a micro-batch fixes it.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    @property
    def idle(self) -> bool:
        """Whether branches pass as they are."""
        return self.rate == 0.0 or not self.training

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...) floating to the same."""
        if self.idle:
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
        """Tubes (R, T, n, D) of ``windows``, floating, to the same shape."""
        for names in self.order:
            layers = [cast(Branch, self.get_submodule(name)).encoder for name in names]
            if self.drop_path.idle:
                x = add_layers(x, layers, windows)
            else:
                branch = add_layers(x, layers, windows, residual=False)
                x = x + self.drop_path(branch.view(-1, windows.count, *x.shape[1:])).view(x.shape)  # a sample's tubes share its fate
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
