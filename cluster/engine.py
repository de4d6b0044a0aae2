"""One optimizer step of a gang, and its whole state.

Parameters and AdamW's moments are float32 at every ZeRO stage; `precision` is that of forward and backward, under autocast, so
gradients and their reduction are float32 too. A step is the mean over the A micro-batches of the global batch however many ranks
share them: torch is seeded by (seed, step, micro-batch) before each forward, batch-norm statistics are averaged (`batch_norm`), the
learning rate is a function of the step. So no random state, scheduler or world size is ever saved.

In fp16, on GPUs, losses are scaled (`loss_scale`); a step whose gradients overflow is passed over and is none of the guard's bad steps.

With `optimizer.ema` a running average of the weights is kept in float32, for evaluation (`checkpoint.model_state`): of the parameters
beside AdamW's moments (`zero`), of floating buffers, batch-norm statistics among them, with the same decay, on every rank.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.batch_norm import BatchNormStatistics
from cluster.errors import CheckpointError
from cluster.guard import Guard
from cluster.loss_scale import LossScale
from cluster.options import EngineOptions, OptimizerOptions
from cluster.precision import DTYPES, compiled, precision_of
from cluster.precision import autocast as autocast
from cluster.schedule import average_decay, learning_rate
from cluster.step_timer import StepTimer
from cluster.topology import Worker, micro_batches_of
from cluster.zero import AVERAGE, PartitionedAdamW, parameter_groups

STEP = "optimizer.step"
LOSSES = "optimizer.losses"  # what the guard remembers; there only if it was asked to
SCALE = "optimizer.scale"  # of the loss, in fp16 only

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Of one optimizer step, equal on all ranks: mean loss over the global batch, gradient norm before clipping, learning rate.

    skipped: why nothing was applied, as in "loss of step 7 is nan". stop: some rank was asked to stop.
    parts: of this rank alone, where the step's seconds went: "data", "forward", "backward", "collective" (waiting for the slowest rank
    included; at ZeRO 1 to 3 what of the reduction does not overlap with backward), "optimizer" (at ZeRO 1 to 3 gathering weights too).
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: str | None = None
    stop: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)


def _nobody_asks() -> bool:
    return False


class _Objective(nn.Module):
    """What DeepSpeed runs: the loss of one micro-batch. `batch` is bound beforehand, so that no hook inspects it."""

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self._autocast = (device_type, dtype)
        self.bound: Callable[[nn.Module], Tensor] | None = None

    def forward(self) -> Tensor:
        assert self.bound is not None
        device_type, dtype = self._autocast
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            return self.bound(self.model)


class Engine:
    """Trains `model` in place. Every rank of the gang builds one, from equal arguments, after `torch.distributed` is up.

    total_steps: of the whole run, for the schedule. num_micro_batches: A. no_weight_decay: parameter names that are not decayed,
    beside every parameter of at most one dimension. rate_scales: parameter name -> factor of its learning rate, where not 1.
    seed: of dropout and the like. Rank 0's parameters are the ones that count; those that require no gradient are frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerOptions,
        options: EngineOptions,
        total_steps: int,
        num_micro_batches: int,
        worker: Worker,
        no_weight_decay: Collection[str] = (),
        rate_scales: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model.to(worker.device)
        self.device = torch.device(worker.device)
        self.precision = precision_of(options.precision, self.device)
        self._options = optimizer
        self._total_steps = total_steps
        self._num_micro_batches = num_micro_batches
        self._micro_batches = micro_batches_of(worker.rank, worker.world_size, num_micro_batches)
        self._rank = worker.rank
        self._seed = seed
        self._guard = Guard(optimizer)
        self._timer = StepTimer(self.device)
        self._batch_norm = BatchNormStatistics(model)
        persistent = set(model.state_dict())
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._scale = LossScale() if self.precision == "fp16" else None
        self._objective = _Objective(compiled(model, options), self.device.type, DTYPES.get(self.precision))
        self._zero = PartitionedAdamW(
            self._objective,
            model,
            parameter_groups(model, optimizer.weight_decay, no_weight_decay, rate_scales or {}),
            options=optimizer,
            stage=options.zero_stage,
            accumulation=len(self._micro_batches),
            averaged=bool(optimizer.ema),
            device=self.device,
            timer=self._timer,
        )
        averaged = {name: buffer for name, buffer in self._buffers.items() if optimizer.ema and buffer.is_floating_point()}
        self._averages = {name: buffer.clone() for name, buffer in averaged.items()}
        self._keep_frozen_statistics()

    def train_step(
        self,
        step: int,
        batches: Iterable[tuple[int, Batch]],
        loss: Callable[[nn.Module, Batch], Tensor],
        *,
        stop: Callable[[], bool] = _nobody_asks,
    ) -> StepResult:
        """Optimizer step `step` (from 0) on this rank's micro-batches: pairs of number in [0, A) and batch, in rank order.

        loss: of (model, batch), the mean over the micro-batch's samples, a scalar. Batches may be drawn lazily.
        stop: asked once on each rank; the result says on all ranks whether any said yes. The step is finished all the same.
        Raises ClusterError naming the step when it is one bad step too many (`guard`); then no later state may be saved.
        """
        self._timer.begin()
        rate = learning_rate(step, self._total_steps, self._options)
        self._zero.set_rate(rate)
        if self._scale:
            self._zero.set_loss_scale(self._scale.value)
        if not self._objective.training:
            self._objective.train()
            self._keep_frozen_statistics()
        self._batch_norm.begin()
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        value = None
        for number, value in enumerate(self._forwards(step, batches, loss, total), start=1):
            if number < len(self._micro_batches):
                self._zero.backward(value)
                self._timer.mark("backward")
                self._zero.accumulate()
        assert value is not None
        # One reduction tells every rank the same, before the gang's gradients are: it travels with what must be reduced anyway.
        asked = torch.full((1,), float(stop()), dtype=torch.float64, device=self.device)
        means = torch.cat([total, self._batch_norm.total.to(self.device), asked])
        dist.all_reduce(means)
        self._timer.mark("collective")
        means /= self._num_micro_batches
        good = means[0].isfinite() & (means[0] <= self._guard.bound)
        # A bad loss makes all gradients nan, on which no ZeRO stage steps. A factor of one changes nothing.
        self._zero.backward(value * torch.where(good, 1.0, torch.nan))
        self._timer.mark("backward")
        norm = self._zero.apply(average_decay(step, self._options))
        self._timer.mark("optimizer")
        mean_loss = float(means[0])
        problem = self._judge(step, mean_loss, norm, rate)
        if problem is None:
            self._batch_norm.finish(means[1:-1])
            self._average_buffers(step)
        else:
            self._batch_norm.discard()
        return StepResult(loss=mean_loss, grad_norm=norm, lr=rate, skipped=problem, stop=bool(means[-1] > 0), parts=self._timer.split())

    def _judge(self, step: int, loss: float, norm: float, rate: float) -> str | None:
        """Why the step was passed over, None where it was not. Raises ClusterError for one bad step too many."""
        scale = self._scale
        if scale and scale.may_shrink and math.isfinite(loss) and loss <= self._guard.bound and not math.isfinite(norm):
            scale.overflowed()  # no bad step: the scale is still being found
            return f"gradient of step {step} overflows fp16; the loss scale is now {scale.value:g}"
        problem = self._guard.judge(step, loss, norm)
        if problem is not None:
            self._guard.skip(problem, step + 1 - self._zero.applied - (scale.overflows if scale else 0), rate)
        elif scale:
            scale.applied()
        return problem

    def _keep_frozen_statistics(self) -> None:
        """A batch norm whose parameters are frozen keeps its statistics, and uses them: evaluation mode."""
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and own and not any(parameter.requires_grad for parameter in own):
                module.eval()

    def _forwards(
        self, step: int, batches: Iterable[tuple[int, Batch]], loss: Callable[[nn.Module, Batch], Tensor], total: Tensor
    ) -> Iterator[Tensor]:
        """The loss of each of this rank's micro-batches, with its graph; adds them up in `total`."""
        done = 0
        for done, (micro, batch) in enumerate(batches, start=1):
            if done > len(self._micro_batches) or micro != self._micro_batches[done - 1]:
                raise ValueError(f"step {step}: micro-batch {micro} came as number {done} of {list(self._micro_batches)}")
            self._timer.mark("data")
            torch.manual_seed(_key(self._seed, step, micro))
            self._objective.bound = _bind(loss, batch)
            value = self._zero.forward()
            self._objective.bound = None
            total += value.detach()
            self._batch_norm.add()
            self._timer.mark("forward")
            yield value
            if done == len(self._micro_batches):
                return
        raise ValueError(f"step {step}: {done} micro-batches came, expected {len(self._micro_batches)}")

    @torch.no_grad()
    def _average_buffers(self, step: int) -> None:
        decay = average_decay(step, self._options)
        if decay is not None and self._averages:
            torch._foreach_lerp_(list(self._averages.values()), [self._buffers[name] for name in self._averages], 1.0 - decay)

    @property
    def state_bytes(self) -> int:
        """About the size of the whole training state."""
        copies = len(self._zero.keys)
        return 4 * copies * sum(math.prod(shape) for shape in self._shapes.values())

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """The whole training state as fresh host copies on rank 0, {} on the others. A collective: every rank must call it.

        "model.<parameter>", "exp_avg.<parameter>", "exp_avg_sq.<parameter>" (float32), "buffer.<buffer>" and "optimizer.step";
        with an average "ema.<parameter or buffer>", with a bound on the loss "optimizer.losses", in fp16 "optimizer.scale".
        Free of world size and ZeRO stage.
        """
        found = {}
        for name, tensor in self._gather():
            if self._rank == 0:
                found[name] = tensor.detach().to("cpu", copy=True).contiguous().numpy()
        return found

    def _gather(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._zero.state()
        for name, buffer in self._buffers.items():
            yield f"buffer.{name}", buffer
        for name, average in self._averages.items():
            yield f"{AVERAGE}.{name}", average
        yield STEP, torch.tensor(self._zero.applied)
        if self._options.max_spike:
            yield LOSSES, torch.tensor([self._guard.mean, self._guard.seen], dtype=torch.float64)
        if self._scale:
            yield SCALE, torch.tensor([self._scale.value, self._scale.good, self._scale.overflows], dtype=torch.float64)

    @torch.no_grad()
    def copy_weights(self, target: nn.Module) -> None:
        """Makes `target`, a module of the model's own class, what evaluation sees: weights and buffers, averages where there are any.

        A collective that leaves the engine and its model as they are.
        """
        tensors = target.state_dict()
        for name, tensor in self._zero.state([AVERAGE]):
            tensors[name.partition(".")[2]].copy_(tensor)  # the average comes behind the last weights
        for name, buffer in {**self._buffers, **self._averages}.items():
            tensors[name].copy_(buffer)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Takes over a state that `state` gave, at any world size and stage. Every rank must call it with the whole state.

        Raises CheckpointError naming the first array that is missing, too many or of another shape.
        """
        self._check(tensors)
        self._zero.set_applied(int(tensors[STEP]))
        for name, parameter in self.model.named_parameters():
            self._zero.put(parameter, {key: torch.tensor(tensors[f"{key}.{name}"], device=self.device) for key in self._keys(parameter)})
        for name, buffer in self._buffers.items():
            buffer.copy_(torch.tensor(tensors[f"buffer.{name}"], device=self.device))
        for name, average in self._averages.items():
            average.copy_(torch.tensor(tensors[f"{AVERAGE}.{name}"], device=self.device))
        if LOSSES in tensors:
            mean, seen = tensors[LOSSES].tolist()
            self._guard.mean, self._guard.seen = mean, int(seen)
        if self._scale:
            value, good, overflows = tensors[SCALE].tolist()
            self._scale.value, self._scale.good, self._scale.overflows = value, int(good), int(overflows)

    def _keys(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return self._zero.keys if parameter.requires_grad else ("model",)

    def _check(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> None:
        expected: dict[str, tuple[int, ...]] = {STEP: ()}
        for name, parameter in self.model.named_parameters():
            expected |= {f"{key}.{name}": self._shapes[name] for key in self._keys(parameter)}
        expected |= {f"buffer.{name}": tuple(buffer.shape) for name, buffer in self._buffers.items()}
        expected |= {f"{AVERAGE}.{name}": tuple(average.shape) for name, average in self._averages.items()}
        if LOSSES in tensors:
            expected[LOSSES] = (2,)  # a bound on the loss may be set or lifted when a run is resumed
        if self._scale:
            expected[SCALE] = (3,)
        for name in sorted(expected.keys() | tensors.keys()):
            wanted, got = expected.get(name), tensors[name].shape if name in tensors else None
            if wanted != got:
                raise CheckpointError(
                    f"The checkpoint does not fit the model: '{name}' has shape {got} there, {wanted} here. Was the model's recipe changed?"
                )


def _bind(loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Callable[[nn.Module], Tensor]:
    return lambda model: loss(model, batch)


def _key(seed: int, step: int, micro: int) -> int:
    """A torch seed for one forward, in [0, 2^63)."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, micro), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
