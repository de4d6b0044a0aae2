"""Windows: cutting a stage's token grid into the squares that PoSGU relates, for any grid.

No unit looks beyond one window followed through all frames, a *tube*. A stage cuts its tokens into tubes once, (tubes, T,
tokens of a window), and joins them at its end; nothing in between depends on where a window lies. Where the released model
runs, the window divides the grid and this is its partition. Elsewhere windows shrink to be as even as they go and the rest
is padding, which no real token ever sees.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.presets import split_windows


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """The windows of a (height, width) grid, padded below and to the right, cropped on the way back.

    rows, columns: windows down and across; sides: (height, width) of each; real: (windows, tokens of a window) of 1 and 0
    where a token is padding, or None where there is no padding.
    """

    height: int
    width: int
    rows: int
    columns: int
    sides: tuple[int, int]
    real: Tensor | None = None

    @classmethod
    def of(cls, height: int, width: int, window: int, device: torch.device | None = None) -> "WindowGrid":
        """Windows of at most ``window`` tokens a side over a grid, as :func:`model.presets.split_windows` says."""
        (rows, side_y), (columns, side_x) = split_windows(height, window), split_windows(width, window)
        grid = cls(height, width, rows, columns, (side_y, side_x))
        if (rows * side_y, columns * side_x) == (height, width):
            return grid
        real = grid.partition(torch.ones(1, 1, height, width, 1, device=device))[:, 0, :, 0]
        return cls(height, width, rows, columns, (side_y, side_x), real)

    @property
    def count(self) -> int:
        """Windows of the grid, which is tubes of a clip."""
        return self.rows * self.columns

    def partition(self, x: Tensor) -> Tensor:
        """(B, T, H, W, D) to tubes (B * windows, T, tokens of a window, D), contiguous; padding is zero."""
        below, right = self.rows * self.sides[0] - self.height, self.columns * self.sides[1] - self.width
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        batch, frames, _, _, channels = x.shape
        x = x.reshape(batch, frames, self.rows, self.sides[0], self.columns, self.sides[1], channels).permute(0, 2, 4, 1, 3, 5, 6)
        return x.reshape(batch * self.count, frames, self.sides[0] * self.sides[1], channels)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`partition`, padding cropped away; contiguous (B, T, H, W, D)."""
        _, frames, _, channels = x.shape
        x = x.view(-1, self.rows, self.columns, frames, *self.sides, channels).permute(0, 3, 1, 4, 2, 5, 6)
        x = x.reshape(-1, frames, self.rows * self.sides[0], self.columns * self.sides[1], channels)
        return x[:, :, : self.height, : self.width].contiguous()

    def real_tokens(self, tubes: int) -> Tensor | None:
        """:attr:`real` for each of ``tubes`` tubes of a batch, (tubes, 1, tokens of a window), or None."""
        return None if self.real is None else self.real.repeat(tubes // self.count, 1)[:, None]
