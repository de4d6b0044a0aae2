"""The loss and the counts against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from model.errors import ModelError
from model.objective import cross_entropy, topk_correct


def _logits(batch: int = 5, classes: int = 7) -> torch.Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(0))


def test_hard_and_soft_targets_agree_with_the_definition() -> None:
    logits, labels = _logits(), torch.tensor([0, 3, 6, 2, 2])
    soft = F.one_hot(labels, 7).float()
    smoothed = 0.9 * soft + 0.1 / 7
    expected = -(smoothed * logits.log_softmax(1)).sum(1)
    assert torch.allclose(cross_entropy(logits, labels, 0.1, "none"), expected)
    assert torch.allclose(cross_entropy(logits, soft, 0.1), expected.mean())
    assert torch.allclose(cross_entropy(logits, smoothed), expected.mean())


def test_the_loss_is_float32_whatever_the_logits() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(_logits().bfloat16(), torch.tensor([0, 3, 6, 2, 2])).dtype == torch.float32


def test_top_k_counts() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [float("nan")] * 3])
    labels = torch.tensor([0, 2, 1, 0])
    assert topk_correct(logits, labels, (1, 2, 3)).tolist() == [1, 3, 4]
    assert topk_correct(logits, F.one_hot(labels, 3).float(), (1,)).tolist() == [1]


def test_wrong_targets_are_refused() -> None:
    for target in (torch.zeros(4, dtype=torch.int64), torch.zeros(5, 6), torch.zeros(5, dtype=torch.int32)):
        with pytest.raises(ModelError, match="target: got"):
            cross_entropy(_logits(), target)
    with pytest.raises(ModelError, match="label_smoothing"):
        cross_entropy(_logits(), torch.zeros(5, dtype=torch.int64), 1.0)
