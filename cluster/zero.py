"""AdamW whose state is partitioned over a gang by ZeRO: the only file that knows DeepSpeed.

DeepSpeed is used for partitioning (ZeRO 1 to 3), accumulation and reduction; not for its checkpoints, mixed precision or schedules.
What its public functions do not cover (moments before the first step, Adam's step count, working copies of the weights, the running
average of the weights) is done here on its partitions, for DeepSpeed 0.19.

The average of the weights is a third state tensor of AdamW beside its two moments: partitioned, gathered and restored as they are. It
takes 4 bytes a parameter, at stages 1 to 3 divided by the world size.
"""

import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import ClusterError
from cluster.options import OptimizerOptions
from cluster.step_timer import StepTimer

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"
BUCKET = 50_000_000  # elements reduced at once; DeepSpeed's default allocates ten times as many


class PartitionedAdamW:
    """Steps `objective`'s trainable parameters, in groups as `torch.optim` takes them, each with an "lr_scale".

    objective: a module whose forward takes nothing and returns a scalar loss. names: of `model`'s parameters in `state` and `put`.
    accumulation: backward passes in a step. averaged: keep a running average of the weights. Its weights are rank 0's.
    timer: told when a reduction of gradients begins and ends.
    """

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        groups: Sequence[dict[str, object]],
        *,
        options: OptimizerOptions,
        stage: int,
        accumulation: int,
        averaged: bool,
        device: torch.device,
        timer: StepTimer,
    ) -> None:
        self._model, self._stage, self._device = model, stage, device
        self._clip = options.clip_grad
        self._rank = dist.get_rank()
        self.keys = ("model", *MOMENTS, AVERAGE) if averaged else ("model", *MOMENTS)
        self.applied = 0  # AdamW's step count
        self._loss_scale = 1.0
        self._adam = torch.optim.AdamW(list(groups), lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
        size = sum(parameter.numel() for parameter in model.parameters())
        deepspeed = _deepspeed(device)
        self._zero, self._fragments = deepspeed.zero, deepspeed.utils
        config = {
            "train_micro_batch_size_per_gpu": 1,  # of bookkeeping only: the data is ours
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": self._clip if stage else 0.0,  # at stage 0 we clip, and know the norm
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": min(BUCKET, max(1, size)),
                "overlap_comm": device.type == "cuda",
            },
            "steps_per_print": None,
        }
        self._engine = deepspeed.initialize(model=objective, optimizer=self._adam, config=config, dist_init_required=False)[0]
        self._time_reduction(timer)
        if averaged:
            for partition in self._prepared():
                self._adam.state[partition][AVERAGE] = partition.detach().clone()

    def _time_reduction(self, timer: StepTimer) -> None:
        """Marks what DeepSpeed's backward pass spends in its reduction of gradients, of which there is no public figure."""
        reduce = self._engine.allreduce_gradients

        def timed(*arguments: object, **options: object) -> None:
            timer.mark("backward")
            reduce(*arguments, **options)
            timer.mark("collective")

        self._engine.allreduce_gradients = timed

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next step, times each group's own scale."""
        for group in self._adam.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def set_loss_scale(self, scale: float) -> None:
        """Factor of the losses of the next step; gradients and their norm come back without it."""
        self._loss_scale = scale
        if self._stage:
            self._engine.optimizer.override_loss_scale(scale)  # which then scales and unscales by itself

    def forward(self) -> Tensor:
        loss: Tensor = self._engine()
        return loss

    def backward(self, loss: Tensor) -> None:
        """Of one micro-batch. The last one of a step also reduces the gradients over the gang."""
        self._engine.backward(loss if self._stage or self._loss_scale == 1.0 else loss * self._loss_scale)

    def accumulate(self) -> None:
        """After the backward pass of each micro-batch but the last."""
        self._engine.step()

    @torch.no_grad()
    def apply(self, average_decay: float | None) -> float:
        """Clips and applies the reduced gradients; returns their norm before clipping, equal on all ranks.

        Where the norm is not finite nothing is applied: weights, moments, their step count and the average stay as they are.
        average_decay: share of the old average that remains.
        """
        if self._stage == 0:
            if self._loss_scale != 1.0:
                gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
                torch._foreach_mul_(gradients, 1.0 / self._loss_scale)
            norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or math.inf))
            if not math.isfinite(norm):
                for parameter in self._model.parameters():
                    parameter.grad = None  # which AdamW passes over
            self._engine.step()
        else:
            self._engine.step()  # ZeRO notices by itself, passes the step over, and reports an infinite norm or -1
            norm = float(self._engine.get_global_grad_norm())
            norm = norm if norm >= 0 else math.nan
        if math.isfinite(norm):
            self.applied += 1
            if average_decay is not None:
                weights = [partition.detach() for partition in self._partitions()]
                averages = [self._adam.state[partition][AVERAGE] for partition in self._partitions()]
                torch._foreach_lerp_(averages, weights, 1.0 - average_decay)
        return norm

    def state(self, keys: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """("model.<name>", float32 weights) and, of trainable parameters, their moments and average: whole tensors. A collective.

        keys: which of `self.keys` beside "model", all by default. A tensor is good until the next is asked for.
        """
        more = [key for key in self.keys[1:] if keys is None or key in keys]
        steps = {int(self._adam.state[partition]["step"]) for partition in self._prepared()}
        assert steps == {self.applied}, f"AdamW's groups are at steps {steps} instead of {self.applied}"
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                with self._zero.GatheredParameters([parameter], enabled=self._stage == 3):
                    yield f"model.{name}", parameter
                continue
            yield f"model.{name}", parameter if self._stage == 0 else self._fragments.safe_get_full_fp32_param(parameter)
            for key in more:
                if self._stage == 0:
                    yield f"{key}.{name}", self._adam.state[parameter][key]
                else:
                    yield f"{key}.{name}", self._fragments.safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def put(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        """Sets one parameter from whole tensors by key (`keys`; "model" alone for a frozen one). Call `set_applied` first."""
        (self._put_plain, self._put_flat, self._put_flat, self._put_sliced)[self._stage](parameter, values)

    def set_applied(self, steps: int) -> None:
        """Sets AdamW's step count."""
        self.applied = steps
        for partition in self._prepared():
            self._adam.state[partition]["step"].fill_(float(steps))

    def _put_plain(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        parameter.copy_(values["model"])
        for key in self.keys[1:] if parameter.requires_grad else ():
            self._adam.state[parameter][key].copy_(values[key])

    def _put_flat(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        if parameter.requires_grad:
            self._fragments.safe_set_full_fp32_param(parameter, values["model"])
            for key in self.keys[1:]:
                self._fragments.safe_set_full_optimizer_state(parameter, values[key], key)
        parameter.copy_(values["model"])  # the setter leaves the working copy stale until the next step

    def _put_sliced(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        """Stage 3, where the setter for whole tensors fails when their size does not divide by the world size."""
        size, sliced = parameter.ds_tensor.ds_numel, parameter.ds_tensor  # type: ignore[attr-defined]

        def own_part(value: Tensor) -> Tensor:
            padded = torch.zeros(size * dist.get_world_size(), device=self._device)
            padded[: value.numel()] = value.flatten()
            return padded[size * self._rank : size * (self._rank + 1)]

        sliced.copy_(own_part(values["model"]))
        if parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]  # small ones stay gathered
            parameter.copy_(values["model"])
        if parameter.requires_grad:
            self._fragments.safe_set_local_fp32_param(parameter, own_part(values["model"]))
            for key in self.keys[1:]:
                self._fragments.safe_set_local_optimizer_state(parameter, own_part(values[key]), key)

    def _partitions(self) -> list[Tensor]:
        """The tensors that AdamW steps."""
        if self._stage == 0:
            return [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        wrapped = self._engine.optimizer
        return list(wrapped.fp32_partitioned_groups_flat if self._stage == 3 else wrapped.single_partition_of_fp32_groups)

    def _prepared(self) -> list[Tensor]:
        """The same, with state. Before the first step AdamW has none for them: they get the zeros it would start from."""
        partitions = self._partitions()
        for partition in partitions:
            state = self._adam.state[partition]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
                state.update({moment: torch.zeros_like(partition.data) for moment in MOMENTS})
        if self._stage in (1, 2):  # their getters and setters see only what was there when they were linked
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        return partitions


def parameter_groups(
    model: nn.Module, weight_decay: float, no_weight_decay: Collection[str], rate_scales: Mapping[str, float]
) -> list[dict[str, object]]:
    """AdamW's parameter groups: with and without decay, for each scale of the learning rate; frozen parameters are in none."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name in no_weight_decay
            groups.setdefault((spared, rate_scales.get(name, 1.0)), []).append(parameter)
    if not groups:
        raise ClusterError("No parameter is left to train: train.freeze names them all. Freeze fewer.")
    return [
        {"params": parameters, "weight_decay": 0.0 if spared else weight_decay, "lr_scale": scale}
        for (spared, scale), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


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
