"""Learnable relative position encoding (LRPE): a small dictionary of offsets that stands in for a dense token mixing.

    W_s[m, k] = P[index(m, k), s]          m the output token, k the input token, s the channel group
    pos(u)[m, c] = sum_k W_{c mod g}[m, k] * u[k, c] + b[m]

One class serves the three units: tokens on an axis (T,), in a window (w, w) or in a tube (T, w, w) differ only in how many
axes an offset has. No softmax, no scaling, no query-key product [paper, released]; the joint case is [inferred].

The order of axes is the whole speed of it. The released code keeps groups innermost, as channel c belongs to group c mod g;
here groups are outermost, (g, C/g, tokens), so that a map is g large matrix products on contiguous memory.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn

from model.errors import ModelError
from model.presets import DictionaryInit


def dictionary_size(extents: tuple[int, ...]) -> int:
    """Number of offsets between tokens of a grid: the product of 2e - 1 over its axes. [released]"""
    return math.prod(2 * extent - 1 for extent in extents)


def offset_index(extents: tuple[int, ...], used: tuple[int, ...] | None = None) -> Tensor:
    """index(m, k) of the dictionary over ``extents``, for the tokens of a grid ``used`` no larger: (n, n) int64.

    Tokens are row-major. Along each axis the offset is (m - k) + e - 1, and the axes combine row-major with 2e - 1 entries
    each [released for one and two axes, inferred for three]. A smaller grid uses the central offsets of the dictionary.
    """
    used = extents if used is None else used
    index = torch.zeros((), dtype=torch.int64)
    for extent, length in zip(extents, used, strict=True):
        position = torch.arange(length)
        offset = position[:, None] - position[None, :] + extent - 1  # (length, length)
        rows, columns = index.shape if index.ndim else (1, 1)
        index = index.reshape(rows, 1, columns, 1) * (2 * extent - 1) + offset[None, :, None, :]
        index = index.reshape(rows * length, columns * length)
    return index


class LRPE(nn.Module):
    """The dictionary and token bias of one positional map, and the matrices they spell out.

    extents: the token grid, (T,), (w, w) or (T, w, w); n is its product, M its number of offsets.
    groups: g, the number of dictionaries; channel c of a unit uses number c mod g.
    init: ``zeros`` or ``trunc_normal`` (std .02), for dictionary and token bias alike.

    Parameters, under the released names: ``window_relative_position_bias_table`` (M, g), the dictionary P, and
    ``token_proj_n_bias`` (1, n, 1), the token bias b shared by all channels.
    """

    def __init__(self, extents: tuple[int, ...], groups: int, init: DictionaryInit = "zeros") -> None:
        super().__init__()
        if not extents or min(*extents, groups) < 1:
            raise ModelError(f"LRPE: got extents {extents}, groups {groups}; expected positive numbers")
        self.extents = extents
        self.groups = groups
        self.window_relative_position_bias_table = nn.Parameter(torch.zeros(dictionary_size(extents), groups))
        self.token_proj_n_bias = nn.Parameter(torch.zeros(1, math.prod(extents), 1))
        if init == "trunc_normal":
            nn.init.trunc_normal_(self.window_relative_position_bias_table, std=0.02)
            nn.init.trunc_normal_(self.token_proj_n_bias, std=0.02)
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._spelled: tuple[Tensor, tuple[int, ...], Tensor] | None = None  # dictionary, grid, matrices

    def extra_repr(self) -> str:
        return f"extents={self.extents}, groups={self.groups}"

    def matrices(self, used: tuple[int, ...] | None = None, kind: torch.dtype | None = None) -> Tensor:
        """All W_s over a grid ``used`` (default: the dictionary's own) in the type ``kind`` (the dictionary's): (g, n, n).

        In evaluation on a CPU, without gradients, the matrices are kept and given again while the dictionary holds the very
        values they were made from. Comparing its M*g numbers costs a fraction of gathering g*n*n and notices every kind of change:
        steps, loads, edits of ``.data`` (which version counters miss), casts and moves. They take g*n*n elements until
        :meth:`train` is called.
        """
        used = self._check(used)
        table = self.window_relative_position_bias_table
        kind = table.dtype if kind is None else kind
        keep = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()) and table.device.type == "cpu"
        if keep and self._spelled is not None:
            source, grid, matrices = self._spelled
            if grid == used and matrices.dtype == kind and source.dtype == table.dtype and torch.equal(source, table):
                return matrices
        # With groups as rows, index_select copies and its backward adds along contiguous memory: on CPU three to four
        # times faster than P[index], whose backward is a general index_put.
        rows = table.t().contiguous().index_select(1, self._index(used))
        matrices = rows.view(self.groups, math.prod(used), math.prod(used)).to(kind)
        self._spelled = (table.detach().clone(), used, matrices) if keep else None
        return matrices

    def train(self, mode: bool = True) -> Self:
        """As for every module; kept matrices are let go."""
        self._spelled = None
        return super().train(mode)

    def bias(self, used: tuple[int, ...] | None = None) -> Tensor:
        """The token bias over a grid ``used``: (n,). A smaller grid takes the first tokens along each axis."""
        used = self._check(used)
        bias = self.token_proj_n_bias.view(self.extents)
        for axis, length in enumerate(used):
            bias = bias.narrow(axis, 0, length)
        return bias.reshape(-1)

    def _check(self, used: tuple[int, ...] | None) -> tuple[int, ...]:
        used = self.extents if used is None else used
        if len(used) != len(self.extents) or any(not 1 <= u <= e for u, e in zip(used, self.extents, strict=True)):
            raise ModelError(
                f"LRPE: got a token grid {used}, expected at most {self.extents}; resize the dictionary with "
                "model.weights.resize to use it on a larger grid"
            )
        return used

    def _index(self, used: tuple[int, ...]) -> Tensor:
        device = self.window_relative_position_bias_table.device
        index = self._indices.get((used, device))
        if index is None:
            # Made outside inference mode even when first met inside it: training may use the same tensor later.
            with torch.inference_mode(False):
                index = offset_index(self.extents, used).flatten().to(device)
            self._indices[used, device] = index
        return index
