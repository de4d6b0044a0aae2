"""The stem's batch norm, which runs over rows of channels in training on a CPU, is torch's, and the other ways through it are the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import products, stem_norm
from model.posmlp import PatchEmbed, convolve
from model.stem_norm import StemNorm
from tests.model.reference import relative_error

SHAPES = [(2, 6, 3, 4, 4), (1, 5, 1, 7, 3), (3, 1, 2, 5, 5), (1, 12, 4, 16, 16)]


def _norms(channels: int, gelu: bool, momentum: float | None = 0.1) -> tuple[StemNorm, nn.BatchNorm3d]:
    """Ours, and torch's with the same parameters and statistics, in float64."""
    norm = StemNorm(channels, 1e-5, gelu).double()
    norm.momentum = momentum
    generator = torch.Generator().manual_seed(0)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data.copy_(torch.rand(channels, generator=generator) + 0.5)
    plain = nn.BatchNorm3d(channels, eps=1e-5, momentum=momentum).double()
    plain.load_state_dict(norm.state_dict())
    return norm, plain


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("piece", [16, 2**19])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_training_is_torch_s_batch_norm(
    shape: tuple[int, ...], gelu: bool, piece: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stem_norm, "PIECE", piece)
    norm, plain = _norms(shape[1], gelu)
    for seed in range(2):  # the second pass blends into the first one's statistics
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 2
        ours, theirs = (values.clone().contiguous(memory_format=layout).requires_grad_(True) for _ in range(2))
        out, expected = norm(ours), plain(theirs)
        expected = F.gelu(expected) if gelu else expected
        assert relative_error(out, expected) <= 1e-12
        for result, clip in ((out, ours), (expected, theirs)):
            (result * torch.linspace(-1, 2, values.numel(), dtype=torch.float64).view(shape)).sum().backward()
            assert clip.grad is not None
        assert relative_error(ours.grad, theirs.grad) <= 1e-11
    for (name, tensor), other in zip(norm.state_dict().items(), plain.state_dict().values(), strict=True):
        assert tensor.dtype == other.dtype
        assert torch.allclose(tensor.double(), other.double(), rtol=1e-12), name
    for (name, parameter), other in zip(norm.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(parameter.grad, other.grad) <= 1e-11, name


def test_momentum_none_averages_over_all_steps_and_one_takes_the_last() -> None:
    for momentum in (None, 1.0):
        norm, plain = _norms(4, gelu=False, momentum=momentum)
        for seed in range(3):
            values = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            norm(values)
            plain(values)
        for name, tensor in plain.state_dict().items():
            assert torch.allclose(norm.state_dict()[name].double(), tensor.double(), rtol=1e-12), name


def test_gradients_are_those_of_the_function() -> None:
    for gelu in (False, True):
        norm, _ = _norms(3, gelu)
        x = torch.randn(1, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, _w, _b, norm=norm: norm(x), (x, norm.weight, norm.bias))


def test_float32_statistics_are_exact_where_the_mean_is_a_hundred_times_the_spread() -> None:
    norm, plain = _norms(8, gelu=False, momentum=1.0)
    values = torch.randn(1, 8, 16, 64, 64, generator=torch.Generator().manual_seed(3)) + 100
    plain(values.double())
    out = norm.float()(values)
    assert relative_error(norm.running_mean, plain.running_mean) <= 1e-6
    assert relative_error(norm.running_var, plain.running_var) <= 1e-5
    assert relative_error(out, plain(values.double())) <= 1e-4  # half of the digits of a value are its mean's


def test_bfloat16_under_autocast_stays_bfloat16_and_near_float32() -> None:
    torch.manual_seed(0)
    stem = PatchEmbed(3, 8)
    clips = torch.randn(1, 3, 2, 32, 32)
    expected = stem(clips)
    with torch.autocast("cpu", torch.bfloat16):
        out = stem(clips)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), expected) <= 0.03
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in stem.parameters())


@pytest.mark.parametrize("kind", ["2d", "3d"])
@pytest.mark.parametrize("frames", [1, 4])
def test_in_evaluation_the_convolution_does_it_all(kind: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stem = PatchEmbed(3, 8, kind)
    clips = torch.randn(2, 3, frames, 36, 32)
    for _ in range(2):
        stem(clips)  # running statistics that are nobody's defaults
    stem.eval()

    def step_by_step(stem: PatchEmbed, clips: Tensor) -> Tensor:
        x = clips
        for conv, norm in ((stem.proj1, stem.norm1), (stem.proj2, stem.norm2)):
            x = conv(x)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
            x = F.gelu(x) if norm is stem.norm1 else x
        return x

    expected = step_by_step(copy.deepcopy(stem).double(), clips.double())
    with torch.inference_mode():
        folded = stem(clips)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = stem(clips)
        monkeypatch.setattr(products, "in_onednn", lambda *_: False)  # as on another device
        apart = stem(clips)
        monkeypatch.undo()
    with_gradients = stem(clips.requires_grad_(True))
    with_gradients.sum().backward()
    assert relative_error(folded, expected) <= 2e-6
    assert relative_error(apart, expected) <= 2e-6
    assert relative_error(with_gradients, expected) <= 2e-6
    assert relative_error(narrow.float(), expected) <= 0.03
    assert clips.grad is not None
    exact = clips.detach().double().requires_grad_(True)
    step_by_step(copy.deepcopy(stem).double(), exact).sum().backward()
    assert relative_error(clips.grad, exact.grad) <= 1e-5


def test_a_convolution_takes_the_norm_s_weights_as_they_are_now() -> None:
    torch.manual_seed(0)
    stem = PatchEmbed(3, 8).eval()
    clips = torch.randn(1, 3, 2, 32, 32)
    with torch.inference_mode():
        before = convolve(stem.proj1, clips, stem.norm1)
        stem.norm1.bias.data.add_(1.0)
        assert relative_error(convolve(stem.proj1, clips, stem.norm1), before) > 0.1
