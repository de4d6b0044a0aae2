"""What a recipe may say about optimisation, checkpoints and workers, as plain frozen dataclasses free of heavy imports.

A bad value raises ValueError with the field, what it got and what it expected.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

FORBID_UNKNOWN = {"extra": "forbid"}  # read by pydantic when these dataclasses are sections of a recipe


def _require(ok: bool, field: str, got: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{field}: got {got!r}, expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """AdamW and its learning rate, a pure function of the step.

    lr: peak learning rate for the whole global batch. betas, eps: AdamW's.
    weight_decay: not applied to 1-D parameters and those the model names.
    layer_decay: a layer's rate is this times that of the layer above it, 1 for none.
    ema: an average of the weights is kept and evaluated; the share of the old average that a step leaves, 0 for no average.
    schedule: after warm-up, "cosine" down to min_lr; "step", lower at each milestone; "wsd", constant, then a linear cooldown to min_lr.
    warmup: share of all steps, 0 to 1, in which the rate rises linearly from warmup_lr to lr. warmup_lr, min_lr: where it begins and ends.
    milestones, gamma: of schedule "step", shares of all steps and the factor at each. cooldown: of "wsd", share of all steps at the end.
    clip_grad: bound on the global gradient norm, 0 for none. label_smoothing: share of the target spread over all classes.
    max_skipped: steps of a run that may be passed over because loss or gradient are not finite or the loss spikes; see `guard`.
    max_spike: a loss beyond so many times its running mean is a spike, 0: none is. Both may change when a run is resumed.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup: float = 0.05
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    clip_grad: float = 20.0
    label_smoothing: float = 0.1
    schedule: Literal["cosine", "step", "wsd"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    cooldown: float = 0.2
    layer_decay: float = 1.0
    ema: float = 0.0
    max_skipped: int = 0
    max_spike: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", self.lr, "a positive number")
        _require(0 <= self.warmup <= 1, "warmup", self.warmup, "a share of all steps, 0 to 1")
        _require(self.clip_grad >= 0, "clip_grad", self.clip_grad, "0 (off) or a positive norm")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "0 to below 1")
        rising = list(self.milestones) == sorted(set(self.milestones))
        _require(rising and all(0 < s < 1 for s in self.milestones), "milestones", self.milestones, "rising shares of all steps, 0 to 1")
        _require(0 < self.gamma <= 1, "gamma", self.gamma, "above 0, at most 1")
        _require(0 <= self.cooldown <= 1, "cooldown", self.cooldown, "a share of all steps, 0 to 1")
        _require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0, at most 1 (none)")
        _require(0 <= self.ema < 1, "ema", self.ema, "0 (off) to below 1")
        _require(self.max_skipped >= 0, "max_skipped", self.max_skipped, "0 or more steps")
        _require(self.max_spike == 0 or self.max_spike > 1, "max_spike", self.max_spike, "0 (off) or more than 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The DeepSpeed engine. Parameters and moments are float32; `precision` is that of the forward and backward pass.

    precision: "auto" is bf16 where the device computes it natively, else fp32; "fp16" is for GPUs, with a loss scale that finds itself.
    zero_stage: DeepSpeed ZeRO, 0 to 3.
    compile: run the model through torch.compile, which needs a compiler; not at stage 3. Its numbers differ in the last digits.
    peak_tflops: 10^12 operations per second of one device, of which metrics show the share used; 0: a matrix product's, measured at start.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    compile: bool = False
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        _require(self.peak_tflops >= 0, "peak_tflops", self.peak_tflops, "0 (measured) or a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """When state is saved. The last step always is.

    every: optimizer steps between checkpoints. keep: how many whole checkpoints stay, the newest ones, beside the best one of a
    validation (`eval.every`). keep_every: those of multiples of so many steps stay too, a multiple of `every`; 0: none.
    mirror: URL of a folder in an object store, or another folder, where those that stay are copied in the background; a machine whose
    run folder is empty or older goes on from there. null: none.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    every: int = 200
    keep: int = 2
    keep_every: int = 0
    mirror: str | None = None

    def __post_init__(self) -> None:
        _require(self.every >= 1, "every", self.every, "at least 1 step")
        fits = self.keep_every >= 0 and self.keep_every % self.every == 0
        _require(fits, "keep_every", self.keep_every, f"0 (off) or a multiple of checkpoint.every ({self.every})")
        _require(self.keep >= 1, "keep", self.keep, "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """Where workers run.

    launcher: "ray" (Ray Train) or "local" (processes of this machine, without Ray).
    workers: their number, or [fewest, most]: the largest number in between that divides the number of micro-batches and fits the cluster;
        "auto" is [1, all]. On Ray such a gang goes on with fewer when it loses a node, and grows again when there is room.
    cpus_per_worker: reserved on Ray, and the thread budget of one worker; 0: the machine's cores divided by its workers.
    max_restarts: how many times in a row a gang that died without having saved anything new is started again.
    hang_timeout_s: a worker that finishes no step for so long is treated as dead.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    launcher: Literal["ray", "local"] = "ray"
    workers: Literal["auto"] | int | tuple[int, int] = "auto"
    cpus_per_worker: int = 0
    max_restarts: int = 10
    hang_timeout_s: int = 1800

    def __post_init__(self) -> None:
        if isinstance(self.workers, list):  # as JSON has it
            object.__setattr__(self, "workers", tuple(self.workers))
        ok = self.fewest >= 1 and (self.most is None or self.fewest <= self.most)
        _require(ok, "workers", self.workers, "'auto', at least 1, or [fewest, most]")
        _require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "0 or more")
        _require(self.hang_timeout_s >= 10, "hang_timeout_s", self.hang_timeout_s, "at least 10 seconds")
        _require(self.cpus_per_worker >= 0, "cpus_per_worker", self.cpus_per_worker, "0 (automatic) or more")

    @property
    def fewest(self) -> int:
        """Workers that a gang needs at least."""
        return 1 if self.workers == "auto" else self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int | None:
        """Workers that it may have at most; None: as many as there are micro-batches."""
        return None if self.workers == "auto" else self.workers if isinstance(self.workers, int) else self.workers[1]
