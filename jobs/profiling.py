"""A profiler trace of some steps (`train.profile`), for chrome://tracing, Perfetto or TensorBoard: which operator took which time."""

import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cluster.topology import Worker
from jobs.recipe import Recipe

if TYPE_CHECKING:
    from torch.profiler import profile


class StepProfiler:
    """Records the steps [first, last] of `train.profile`, counted from 1, into `profile/` in the run folder, a file for each rank."""

    def __init__(self, recipe: Recipe, worker: Worker) -> None:
        self._span, self._device = recipe.train.profile, worker.device
        self._path = recipe.run_dir / "profile" / f"attempt-{worker.attempt:06d}-rank-{worker.rank}.json"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Step `step` (from 1) is about to begin."""
        if self._span is None or self._profile is not None or not self._span[0] <= step <= self._span[1]:
            return
        from torch.profiler import ProfilerActivity, profile

        on_gpu = [ProfilerActivity.CUDA] if self._device != "cpu" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
        self._profile.start()

    def after(self, step: int) -> None:
        """Step `step` has ended; the last one writes the trace."""
        if self._span is not None and step >= self._span[1]:
            self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        ended, self._profile, self._span = self._profile, None, None
        ended.stop()
        self._path.parent.mkdir(exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}")
        ended.export_chrome_trace(str(temporary))
        os.replace(temporary, self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A run that ends or is stopped in the middle leaves what it has."""
        self._write()
