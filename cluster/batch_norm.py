"""Batch-norm running statistics that do not depend on the world size.

Torch updates them at every forward, in each process for itself. Here they are updated once a step, from the mean over all A
micro-batches of the global batch: torch is made to leave each micro-batch's own statistics in the buffers (momentum 1), these are
summed in float64, averaged over the gang by the caller's all-reduce, and blended in with the momentum that the model asked for.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNormStatistics:
    """Owns the running statistics of every batch norm in `model` that tracks them. Sets their momentum to 1.

    Per step: `begin`, then `add` after each forward, then `finish` with the mean of `total` over the global batch, or `discard`.
    A module that runs several times in one forward counts its last run. Modules in evaluation mode are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
        self._momenta = [module.momentum for module in self._modules]  # None: the average over all steps
        for module in self._modules:
            module.momentum = 1.0
        self._active: list[int] = []

    def begin(self) -> None:
        """Remembers the statistics before the step."""
        self._active = [index for index, module in enumerate(self._modules) if module.training]
        self._before = self._flat()
        self._tracked = [self._tracked_of(index).clone() for index in self._active]
        self.total = torch.zeros_like(self._before)

    def add(self) -> None:
        """Adds the statistics of the micro-batch whose forward has just run to `total`, a flat float64 tensor."""
        self.total += self._flat()

    def finish(self, mean: Tensor) -> None:
        """Blends `mean` (shape of `total`: the mean over all A micro-batches) into the running statistics; counts one batch."""
        self._blend(mean, 1)

    def discard(self) -> None:
        """Puts the statistics back as they were before the step."""
        self._blend(self._before, 0)

    def _blend(self, mean: Tensor, counted: int) -> None:
        offset = 0
        for index, tracked in zip(self._active, self._tracked, strict=True):
            momentum = self._momenta[index]
            share = 1.0 / (int(tracked) + 1) if momentum is None else momentum
            for buffer in self._buffers(index):
                part = slice(offset, offset + buffer.numel())
                buffer.copy_(torch.lerp(self._before[part], mean[part], share))
                offset += buffer.numel()
            self._tracked_of(index).copy_(tracked + counted)

    def _buffers(self, index: int) -> tuple[Tensor, Tensor]:
        module = self._modules[index]
        assert module.running_mean is not None
        assert module.running_var is not None
        return module.running_mean, module.running_var

    def _tracked_of(self, index: int) -> Tensor:
        tracked = self._modules[index].num_batches_tracked
        assert tracked is not None
        return tracked

    def _flat(self) -> Tensor:
        parts = [buffer for index in self._active for buffer in self._buffers(index)]
        return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)
