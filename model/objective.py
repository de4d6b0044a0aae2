"""What classification training minimises and reports: smoothed cross entropy and top-k accuracy.

Targets are hard (class indices) or soft (probabilities, as mixup and cutmix make them); one function takes both, so the
training loop need not know whether a batch was mixed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ModelError


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Cross entropy of logits (B, K) against ``target``, computed in float32 whatever the logits' type.

    target: (B,) int64 class indices in [0, K), or (B, K) floating probabilities whose rows sum to one.
    label_smoothing: in [0, 1); the target becomes (1 - s) * target + s / K.
    reduction: ``mean`` gives a scalar, ``none`` gives (B,).

    Raises ModelError if shapes or types do not fit.
    """
    _check_target(logits, target)
    if not 0.0 <= label_smoothing < 1.0:
        raise ModelError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1)")
    if reduction not in ("mean", "none"):
        raise ModelError(f"reduction: got {reduction!r}, expected mean or none")
    if target.is_floating_point():
        target = target.float()
    # Autocast would keep bfloat16 logits; a log-sum over hundreds of classes needs more than 8 bits.
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing, reduction=reduction)


def topk_correct(logits: Tensor, target: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """How many clips of a batch have their class among the k highest logits, one count for each k.

    logits: (B, K); target: (B,) int64 class indices, or (B, K) probabilities, whose largest entry is the class.
    Returns (len(ks),) int64 on the logits' device: counts, not rates, so that ranks and uneven last batches add up
    exactly. A k above K counts every clip. Equal logits rank by class index, lowest first, on every device, so that a
    constant model does not score by accident.
    """
    _check_target(logits, target)
    labels = target.argmax(dim=1) if target.is_floating_point() else target
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    # A clip whose own logit is not a number compares false everywhere and would rank first.
    rank = torch.where(own[:, 0].isnan(), logits.shape[1], ahead.sum(dim=1))
    return torch.stack([(rank < k).sum() if k < logits.shape[1] else rank.new_tensor(len(rank)) for k in ks])


def _check_target(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ModelError(f"logits: got {tuple(logits.shape)} {logits.dtype}, expected (B, K) floating point")
    expected = logits.shape if target.is_floating_point() else logits.shape[:1]
    if target.shape != expected or not (target.is_floating_point() or target.dtype == torch.int64):
        raise ModelError(
            f"target: got {tuple(target.shape)} {target.dtype} for logits {tuple(logits.shape)}, expected "
            f"({logits.shape[0]},) int64 class indices or {tuple(logits.shape)} floating probabilities"
        )
