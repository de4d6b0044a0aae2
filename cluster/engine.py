"""One optimizer step of a gang, and its whole state: the only file that knows DeepSpeed.

Parameters and AdamW's moments are float32 at every ZeRO stage; `precision` is that of forward and backward, under autocast, so
gradients and their reduction are float32 too. A step is the mean over the A micro-batches of the global batch however many ranks
share them: torch is seeded by (seed, step, micro-batch) before each forward, batch-norm statistics are averaged (`batch_norm`), the
learning rate is a function of the step. So no random state, scheduler or world size is ever saved.

DeepSpeed is used for partitioning (ZeRO 1 to 3), accumulation and reduction; not for its checkpoints, mixed precision or schedules.
What its public functions do not cover (moments before the first step, Adam's step count, working copies of the weights) is done here
on its partitions, for DeepSpeed 0.19.
"""

import hashlib
import math
import os
import struct
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.batch_norm import BatchNormStatistics
from cluster.errors import CheckpointError, ClusterError
from cluster.options import EngineOptions, OptimizerOptions
from cluster.schedule import learning_rate
from cluster.topology import Worker, micro_batches_of

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "optimizer.step"
BUCKET = 50_000_000  # elements reduced at once; DeepSpeed's default allocates ten times as many

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Of one optimizer step, equal on all ranks: mean loss over the global batch, gradient norm before clipping, learning rate."""

    loss: float
    grad_norm: float
    lr: float


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
    beside every parameter of at most one dimension. seed: of dropout and the like. Rank 0's parameters are the ones that count.
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
        seed: int = 0,
    ) -> None:
        self.model = model.to(worker.device)
        self.device = torch.device(worker.device)
        self.precision = _precision(options.precision, self.device)
        self._options = optimizer
        self._stage = options.zero_stage
        self._total_steps = total_steps
        self._num_micro_batches = num_micro_batches
        self._micro_batches = micro_batches_of(worker.rank, worker.world_size, num_micro_batches)
        self._rank = worker.rank
        self._seed = seed
        self._batch_norm = BatchNormStatistics(model)
        persistent = set(model.state_dict())
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._objective = _Objective(model, self.device.type, torch.bfloat16 if self.precision == "bf16" else None)
        self._adam = torch.optim.AdamW(
            _groups(model, optimizer.weight_decay, no_weight_decay), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        deepspeed = _deepspeed(self.device)
        self._zero = deepspeed.zero
        self._fragments = deepspeed.utils
        self._engine = deepspeed.initialize(model=self._objective, optimizer=self._adam, config=self._config(), dist_init_required=False)[0]

    def _config(self) -> dict[str, object]:
        bucket = min(BUCKET, max(1, sum(math.prod(shape) for shape in self._shapes.values())))
        return {
            "train_micro_batch_size_per_gpu": 1,  # of bookkeeping only: the data is ours
            "gradient_accumulation_steps": len(self._micro_batches),
            "gradient_clipping": self._options.clip_grad if self._stage else 0.0,  # at stage 0 we clip, and know the norm
            "zero_optimization": {"stage": self._stage, "reduce_bucket_size": bucket, "overlap_comm": self.device.type == "cuda"},
            "steps_per_print": None,
        }

    def train_step(self, step: int, batches: Iterable[tuple[int, Batch]], loss: Callable[[nn.Module, Batch], Tensor]) -> StepResult:
        """Optimizer step `step` (from 0) on this rank's micro-batches: pairs of number in [0, A) and batch, in rank order.

        loss: of (model, batch), the mean over the micro-batch's samples, a scalar. Batches may be drawn lazily.
        Raises ClusterError naming the step when loss or gradient are not finite; then no later state may be saved.
        """
        rate = learning_rate(step, self._total_steps, self._options)
        for group in self._adam.param_groups:
            group["lr"] = rate
        if not self._objective.training:
            self._objective.train()
        self._batch_norm.begin()
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        done = 0
        for done, (micro, batch) in enumerate(batches, start=1):
            if done > len(self._micro_batches) or micro != self._micro_batches[done - 1]:
                raise ValueError(f"step {step}: micro-batch {micro} came as number {done} of {list(self._micro_batches)}")
            torch.manual_seed(_key(self._seed, step, micro))
            self._objective.bound = _bind(loss, batch)
            value = self._engine()
            total += value.detach()
            self._batch_norm.add()
            self._engine.backward(value)
            if done == len(self._micro_batches):
                break  # the last one steps below, when the whole gang's loss is known
            self._engine.step()
        if done != len(self._micro_batches):
            raise ValueError(f"step {step}: {done} micro-batches came, expected {len(self._micro_batches)}")
        self._objective.bound = None
        means = torch.cat([total, self._batch_norm.total.to(self.device)])
        dist.all_reduce(means)
        means /= self._num_micro_batches
        mean_loss = float(means[0])
        _require_finite(mean_loss, "loss", step, rate)
        norm = self._update(step, rate)
        self._batch_norm.finish(means[1:])
        return StepResult(loss=mean_loss, grad_norm=norm, lr=rate)

    def _update(self, step: int, rate: float) -> float:
        """Clips and applies the reduced gradients; returns their norm before clipping."""
        if self._stage == 0:
            bound = self._options.clip_grad or math.inf
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), bound))
            _require_finite(norm, "gradient norm", step, rate)
            self._engine.step()
            return norm
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        _require_finite(norm if norm >= 0 else math.nan, "gradient norm", step, rate)  # ZeRO reports -1, and skips the step
        return norm

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """The whole training state as fresh host copies on rank 0, {} on the others. A collective: every rank must call it.

        "model.<parameter>", "exp_avg.<parameter>", "exp_avg_sq.<parameter>" (float32), "buffer.<buffer>" and "optimizer.step":
        free of world size and ZeRO stage.
        """
        found = {}
        for name, tensor in self._gather():
            if self._rank == 0:
                found[name] = tensor.detach().to("cpu", copy=True).contiguous().numpy()
        return found

    def _gather(self) -> Iterator[tuple[str, Tensor]]:
        partitions = self._partitions()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                with self._zero.GatheredParameters([parameter], enabled=self._stage == 3):
                    yield f"model.{name}", parameter
            elif self._stage == 0:
                yield f"model.{name}", parameter
                for moment in MOMENTS:
                    yield f"{moment}.{name}", self._adam.state[parameter][moment]
            else:
                yield f"model.{name}", self._fragments.safe_get_full_fp32_param(parameter)
                for moment in MOMENTS:
                    yield f"{moment}.{name}", self._fragments.safe_get_full_optimizer_state(parameter, moment)
        for name, buffer in self._buffers.items():
            yield f"buffer.{name}", buffer
        steps = {int(self._adam.state[partition]["step"]) for partition in partitions}
        assert len(steps) == 1, f"AdamW's groups are at different steps: {steps}"
        yield STEP, torch.tensor(steps.pop())

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Takes over a state that `state` gave, at any world size and stage. Every rank must call it with the whole state.

        Raises CheckpointError naming the first array that is missing, too many or of another shape.
        """
        self._check(tensors)
        partitions = self._partitions()
        for name, parameter in self.model.named_parameters():
            names = ("model", *MOMENTS) if parameter.requires_grad else ("model",)
            values = {key: torch.tensor(tensors[f"{key}.{name}"], device=self.device) for key in names}
            (self._put_plain, self._put_flat, self._put_flat, self._put_sliced)[self._stage](parameter, values)
        for name, buffer in self._buffers.items():
            buffer.copy_(torch.tensor(tensors[f"buffer.{name}"], device=self.device))
        for partition in partitions:
            self._adam.state[partition]["step"].fill_(float(tensors[STEP]))

    def _check(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> None:
        expected: dict[str, tuple[int, ...]] = {STEP: ()}
        for name, parameter in self.model.named_parameters():
            for key in ("model", *MOMENTS) if parameter.requires_grad else ("model",):
                expected[f"{key}.{name}"] = self._shapes[name]
        expected |= {f"buffer.{name}": tuple(buffer.shape) for name, buffer in self._buffers.items()}
        for name in sorted(expected.keys() | tensors.keys()):
            wanted, got = expected.get(name), tensors[name].shape if name in tensors else None
            if wanted != got:
                raise CheckpointError(
                    f"The checkpoint does not fit the model: '{name}' has shape {got} there, {wanted} here. Was the model's recipe changed?"
                )

    def _put_plain(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        parameter.copy_(values["model"])
        for moment in MOMENTS if parameter.requires_grad else ():
            self._adam.state[parameter][moment].copy_(values[moment])

    def _put_flat(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        if parameter.requires_grad:
            self._fragments.safe_set_full_fp32_param(parameter, values["model"])
            for moment in MOMENTS:
                self._fragments.safe_set_full_optimizer_state(parameter, values[moment], moment)
        parameter.copy_(values["model"])  # the setter leaves the working copy stale until the next step

    def _put_sliced(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        """Stage 3, where the setter for whole tensors fails when their size does not divide by the world size."""
        size, sliced = parameter.ds_tensor.ds_numel, parameter.ds_tensor  # type: ignore[attr-defined]

        def own_part(value: Tensor) -> Tensor:
            padded = torch.zeros(size * dist.get_world_size(), device=self.device)
            padded[: value.numel()] = value.flatten()
            return padded[size * self._rank : size * (self._rank + 1)]

        sliced.copy_(own_part(values["model"]))
        if parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]  # small ones stay gathered
            parameter.copy_(values["model"])
        if parameter.requires_grad:
            self._fragments.safe_set_local_fp32_param(parameter, own_part(values["model"]))
            for moment in MOMENTS:
                self._fragments.safe_set_local_optimizer_state(parameter, own_part(values[moment]), moment)

    def _partitions(self) -> list[Tensor]:
        """The tensors that AdamW steps. Before the first step it has no state for them: they get the zeros it would start from."""
        wrapped = self._engine.optimizer
        partitions: list[Tensor]
        if self._stage == 0:
            partitions = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        elif self._stage == 3:
            partitions = list(wrapped.fp32_partitioned_groups_flat)
        else:
            partitions = list(wrapped.single_partition_of_fp32_groups)
        for partition in partitions:
            state = self._adam.state[partition]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
                state.update({moment: torch.zeros_like(partition.data) for moment in MOMENTS})
        if self._stage in (1, 2):
            wrapped._hp_optimizer_states_linked = False
            wrapped._lazy_init_hp_params_optimizer_state()
        return partitions


def _bind(loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Callable[[nn.Module], Tensor]:
    return lambda model: loss(model, batch)


def _key(seed: int, step: int, micro: int) -> int:
    """A torch seed for one forward, in [0, 2^63)."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, micro), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _require_finite(value: float, what: str, step: int, rate: float) -> None:
    if not math.isfinite(value):
        raise ClusterError(
            f"The {what} of step {step} is {value} at learning rate {rate:.3g}: training has diverged. "
            "Lower optimizer.lr or optimizer.clip_grad, or set engine.precision=fp32; the last checkpoint is from before."
        )


def _precision(wanted: str, device: torch.device) -> str:
    """ "fp32" or "bf16", as rank 0's device decides "auto": the numerics of a gang must not differ between its machines."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        facts = torch.cpu.get_capabilities()
        native = bool(facts.get("avx512_bf16") or facts.get("amx_bf16"))
    choice = torch.tensor([int(native)], device=device)
    dist.broadcast(choice, 0)
    return "bf16" if choice.item() else "fp32"


def autocast(options: EngineOptions, device: str) -> torch.autocast:
    """The autocast under which training ran forward, for inference in a gang. A collective where the precision is "auto"."""
    where = torch.device(device)
    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=_precision(options.precision, where) == "bf16")


def _groups(model: nn.Module, weight_decay: float, no_weight_decay: Collection[str]) -> list[dict[str, object]]:
    """AdamW's parameter groups, with and without decay; frozen parameters are in none."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim > 1 and name not in no_weight_decay]
    others = [parameter for name, parameter in trained if parameter.ndim <= 1 or name in no_weight_decay]
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


_set_up_for: list[object] = []  # the process group that DeepSpeed has wrapped


def _deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, told before its import which device it runs on, to be quiet, and not to compile anything."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed's way to say which device is this process's
    warnings.filterwarnings("ignore", r".*(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning)  # DeepSpeed's use
    import deepspeed  # its import takes a second and decides on the device

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at first use, and needs a compiler
    if deepspeed.comm.comm.cdb is not None and _set_up_for[-1:] != [dist.group.WORLD]:
        deepspeed.comm.comm.cdb = None  # it belongs to a process group that is gone: a second gang in one process
        deepspeed.utils.groups._WORLD_GROUP = None
    _set_up_for[:] = [dist.group.WORLD]
    module: ModuleType = deepspeed
    return module
