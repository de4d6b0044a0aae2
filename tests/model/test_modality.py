"""What the stem reads: colours as they are, or differences of grey frames."""

import dataclasses

import pytest
import torch

from model.errors import ModelError
from model.modality import see
from model.posmlp import PosMLPVideo
from model.presets import LAGS, PRESETS, count_parameters
from model.weights import export_released


def clip(frames: int) -> torch.Tensor:
    return torch.randn(2, 3, frames, 32, 48, generator=torch.Generator().manual_seed(1))


def test_colours_are_passed_through() -> None:
    pixels = clip(4)
    assert see(pixels, "rgb") is pixels


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 16])
def test_differences_equal_their_definition(frames: int) -> None:
    pixels = clip(frames)
    seen = see(pixels, "grey_difference")
    assert seen.shape == (2, len(LAGS["grey_difference"]), frames, 32, 48)
    for channel, lag in enumerate(LAGS["grey_difference"]):
        for frame in range(frames):
            later = pixels[:, :, frame + lag].mean(1) if frame + lag < frames else pixels[:, :, frame].mean(1)
            torch.testing.assert_close(seen[:, channel, frame], later - pixels[:, :, frame].mean(1))


def test_a_still_clip_is_all_the_same_to_a_network_that_sees_differences() -> None:
    """The scene alone cannot change its logits; what moves can."""
    network = PosMLPVideo(dataclasses.replace(PRESETS["posmlp_tiny"], modality="grey_difference", dictionary_init="trunc_normal")).eval()
    scenes = torch.randn(2, 3, 1, 112, 112).expand(-1, -1, 8, -1, -1)
    with torch.inference_mode():
        first, second = network(scenes)
        moved = network(scenes[:1].roll(1, dims=-1) * torch.linspace(0, 1, 8)[:, None, None])[0]
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, moved)
    assert sum(p.numel() for p in network.parameters()) == count_parameters(network.config)


def test_the_released_names_do_not_express_differences() -> None:
    network = PosMLPVideo(dataclasses.replace(PRESETS["posmlp_tiny"], modality="grey_difference"))
    with pytest.raises(ModelError, match="modality: grey_difference"):
        export_released(network)
