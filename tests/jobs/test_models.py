"""`posmlp models`: its closed forms are what built models hold and keep, and it answers without a framework."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jobs.models import kept_elements, map_elements, run
from model.lrpe import LRPE
from model.posmlp import PosMLPVideo
from model.presets import PRESETS, ModelConfig


def _kept(model: PosMLPVideo, batch: int) -> int:
    """Bytes that a forward pass keeps for backward, parameters and buffers aside."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(batch, model.config.in_channels, model.config.num_frames, *model.config.input_size))
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in owned)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block": "temporal_spatial"},
        {"block": "joint", "windows": (4, 4, 4, 2)},
        {"version": "v2"},
        {"version": "v3"},
        {"version": "v4"},
        {"stem": "3d", "num_frames": 7},
        {"expansion": 4, "input_size": (72, 100)},
        {"in_channels": 1, "windows": (5, 3, 2, 2)},
    ],
)
def test_activation_memory_is_what_one_more_clip_keeps(fields: dict[str, object]) -> None:
    config = ModelConfig(
        **{"preset": "posmlp_tiny", "num_frames": 4, "input_size": 64, "dictionary_init": "trunc_normal", **fields}
    ).resolve()
    model = PosMLPVideo(config)
    assert 4 * kept_elements(config) == pytest.approx(_kept(model, 3) - _kept(model, 2), rel=0.01)


@pytest.mark.parametrize("fields", [{}, {"block": "joint", "windows": (4, 4, 4, 2)}, {"input_size": (72, 100)}])
def test_maps_are_what_evaluation_keeps(fields: dict[str, object]) -> None:
    config = ModelConfig(**{"preset": "posmlp_tiny", "num_frames": 4, "input_size": 64, **fields}).resolve()
    model = PosMLPVideo(config).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 4, *config.input_size))
    kept = [module._spelled for module in model.modules() if isinstance(module, LRPE)]
    assert sum(matrices.numel() for _, _, matrices in (each for each in kept if each)) == map_elements(config)


def test_every_preset_at_every_length() -> None:
    cards = {(card.preset, card.num_frames): card for card in run()}
    assert set(cards) == {(preset, frames) for preset in PRESETS for frames in (8, 16, 32)}
    released = cards["posmlp_s", 16]
    assert (round(released.parameters / 1e6, 3), round(released.macs / 1e9, 2)) == (13.510, 40.17)
    assert released.parameter_bytes == 4 * released.parameters
    with torch.device("meta"):
        for (preset, frames), card in cards.items():
            model = PosMLPVideo(replace(PRESETS[preset], num_frames=frames))
            assert sum(p.numel() for p in model.parameters()) == card.parameters


def test_the_command_answers_without_a_framework() -> None:
    code = "import sys, jobs.cli\ntry: jobs.cli.posmlp(['models', '--json'])\nfinally: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 9
    table = subprocess.run([sys.executable, "-m", "jobs", "models"], capture_output=True, text=True, check=True).stdout
    assert "40.17" in table
    assert "inferred" in table
