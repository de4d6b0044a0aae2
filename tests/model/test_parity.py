"""Equality with the authors' released code: their numbers where the files are at hand, their formulation everywhere."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.blocks import Block, GatedLayer, add_layers
from model.posmlp import Downsample, PatchEmbed, PosMLPVideo
from model.presets import ModelConfig
from model.units import PoSGU, PoTGU
from model.weights import load_released
from model.windows import WindowGrid
from tests.model.reference import plain_logits, randomise, relative_error, state_of

PARITY = Path(os.environ.get("POSMLP_TEST_DATA", Path(__file__).parents[2] / "../shared/data")) / "parity"
needs_files = pytest.mark.skipif(not PARITY.is_dir(), reason=f"no released numbers in {PARITY}; set POSMLP_TEST_DATA to the data folder")
PARTS = ["LearnedPosMapT", "LearnedPosMap", "PoTGU", "PoSGU", "LayerT", "LayerS", "LevelS", "LevelT", "Block", "PatchEmbed", "Downsample"]


class _OnWindows(nn.Module):
    """A layer or block on a released part's own tensor layout, put into window order around it."""

    def __init__(self, inner: nn.Module, window: int) -> None:
        super().__init__()
        self.inner, self.window = inner, window

    def forward(self, x: Tensor) -> Tensor:
        windows = WindowGrid.of(x.shape[2], x.shape[3], self.window)
        ordered = windows.partition(x)
        if isinstance(self.inner, GatedLayer):
            return windows.merge(add_layers(ordered, [self.inner], windows, residual=False))
        return windows.merge(self.inner(ordered, windows))


def _part(name: str, ctor: dict[str, int], x: Tensor) -> tuple[nn.Module, str, Tensor]:
    """Our module for a released part, the prefix its released names lack (-) or have (+), and the input as ours takes it."""
    groups, side = ctor.get("gamma", 1), ctor.get("win_size", 1)
    if name.startswith("LearnedPosMap"):
        unit = PoTGU(x.shape[-1], groups, side) if name.endswith("T") else PoSGU(x.shape[-1], groups, side)
        return unit, "pos.", torch.cat([x, torch.ones_like(x)], dim=-1)
    if name == "PoTGU":
        return PoTGU(ctor["dim"] // 2, groups, side), "", x
    if name == "PoSGU":
        return PoSGU(ctor["dim"] // 2, groups, side), "", x
    if name in ("LayerT", "LevelT"):
        frames, width = (side, ctor["dim"]) if name == "LayerT" else (ctor["win_size_t"], ctor["embed_dim"])
        layer = GatedLayer(width, 2, [PoTGU(width, groups, frames)])
        sites = x.flatten(0, 1)[:, :, None, None] if name == "LayerT" else x
        return _OnWindows(layer, 7), "inner.", sites
    if name in ("LayerS", "LevelS"):
        width = x.shape[-1]
        tiles = x.reshape(-1, 1, side, side, width) if name == "LayerS" else x
        return _OnWindows(GatedLayer(width, 2, [PoSGU(width, groups, side)]), side), "inner.", tiles
    if name == "Block":
        config = ModelConfig(
            preset="posmlp_tiny", num_frames=ctor["win_size_t"], widths=(ctor["dim"],) * 4, windows=(side,) * 4, groups=(groups,) * 4
        ).resolve()
        return _OnWindows(Block(config, 0, 0.0), side), "inner.", x
    if name == "PatchEmbed":
        return PatchEmbed(x.shape[1], ctor["embed_dim"]), "", x
    return Downsample(ctor["cin"], ctor["cout"]), "", x


@needs_files
@pytest.mark.parametrize("name", PARTS)
def test_a_released_part_is_reproduced_with_its_gradients(name: str) -> None:
    entry = torch.load(PARITY / "units.pt", weights_only=True)[name]
    x = entry["input"].clone().requires_grad_(True)
    module, prefix, ours = _part(name, entry["ctor"], x)
    state = {prefix + key.removeprefix("encoder."): value for key, value in entry["state_dict"].items() if not key.endswith("_index")}
    module.load_state_dict(state, strict=True)
    module.eval()
    out = module(ours).reshape(entry["output"].shape)
    assert relative_error(out, entry["output"]) <= 1e-5
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert relative_error(x.grad, entry["grad_input"]) <= 1e-5
    grads = {key: p.grad for key, p in module.named_parameters()}
    for key, expected in entry["grads"].items():
        got = grads[prefix + key.removeprefix("encoder.")]
        # Looser than values: a sum over all tokens against linspace(-1, 1) cancels to a thousandth of its terms.
        assert relative_error(got, expected) <= 1e-4, key


@needs_files
def test_a_whole_released_model_is_reproduced() -> None:
    entry = torch.load(PARITY / "tiny8.hot.pt", weights_only=True)
    model = load_released(entry["state_dict"])
    with torch.inference_mode():
        maps = model.forward_stages(entry["input"])
        logits = model(entry["input"])
    assert relative_error(logits, entry["logits"]) <= 1e-4
    assert relative_error(maps[0][:, :1], entry["stage1"]) <= 1e-4


@pytest.mark.parametrize(
    ("config", "size", "batch"),
    [
        ({"num_frames": 4}, (64, 64), 2),  # one window a stage
        ({"num_frames": 5, "widths": (16, 24, 40, 48), "groups": (4, 8, 8, 16), "windows": (4, 4, 4, 2)}, (64, 128), 1),
        ({"num_frames": 1, "expansion": 4, "windows": (7, 7, 7, 4), "groups": (1, 2, 4, 8)}, (112, 112), 1),  # the image twin, r_e 4
        ({"num_frames": 1, "windows": (8, 4, 4, 2)}, (64, 64), 3),  # one frame, several clips: strides of length-1 axes
        ({"num_frames": 3, "in_channels": 1, "groups": (24, 48, 96, 192), "windows": (8, 4, 4, 2)}, (64, 64), 2),  # one channel a group
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_any_released_shape_agrees_with_the_released_formulation(
    config: dict[str, object], size: tuple[int, int], batch: int, training: bool
) -> None:
    windows = config.get("windows", (16, 8, 4, 2))
    model = PosMLPVideo(ModelConfig(preset="posmlp_tiny", input_size=size, **{**config, "windows": windows}))
    randomise(model, seed=3)
    model.train(training)
    clips = torch.randn(batch, model.config.in_channels, model.config.num_frames, *size, generator=torch.Generator().manual_seed(5))
    exact_model = copy.deepcopy(model).double()

    def run(model: PosMLPVideo, clips: Tensor, plain: bool) -> tuple[Tensor, dict[str, Tensor]]:
        logits = plain_logits(state_of(model), clips, windows, training) if plain else model(clips)
        weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
        parameters = dict(model.named_parameters())
        return logits.detach(), dict(zip(parameters, torch.autograd.grad((logits * weight).sum(), list(parameters.values())), strict=True))

    exact_logits, exact = run(exact_model, clips.double(), plain=True)
    _, ours_exact = run(exact_model, clips.double(), plain=False)
    _, plain = run(copy.deepcopy(model), clips, plain=True)
    logits, ours = run(model, clips, plain=False)
    assert relative_error(logits.double(), exact_logits) <= 1e-4
    scale = max(g.abs().max() for g in exact.values())
    for name, wanted in exact.items():
        # The bias of a convolution before a batch norm has a true gradient of zero in training: both sides are rounding.
        zero = training and name.startswith("patch_embed1.proj") and name.endswith("bias")
        reach = scale if zero else wanted.abs().max()
        assert (ours_exact[name] - wanted).abs().max() <= 1e-9 * reach, name
        # In float32 a sum over all tokens may cancel to a thousandth of its terms: then as near as the released formulation comes.
        off, released_off = ((g[name].double() - wanted).abs().max() for g in (ours, plain))
        assert off <= max(1e-4 * reach, 2 * released_off), name


def test_bfloat16_autocast_stays_within_its_rounding() -> None:
    model = PosMLPVideo(ModelConfig(preset="posmlp_tiny", num_frames=4, input_size=64, windows=(16, 8, 4, 2))).eval()
    randomise(model, seed=7)
    clips = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model(clips)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(clips)
            plain = plain_logits(state_of(model), clips, (16, 8, 4, 2))
    assert relative_error(rounded.float(), exact) <= max(0.05, 2 * relative_error(plain.float(), exact))
