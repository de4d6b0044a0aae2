"""Weights from elsewhere: there and back bit-equal, resized by offset, refused with the first tensor that does not fit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from model.errors import ModelError
from model.posmlp import PosMLPVideo
from model.presets import ModelConfig
from model.weights import export_released, load_released, load_resized, read_state, resize_dictionary, resize_token_bias
from tests.model.reference import randomise, relative_error


def _tiny(seed: int = 0, **fields: object) -> PosMLPVideo:
    model = PosMLPVideo(ModelConfig(**{"preset": "posmlp_tiny", "num_frames": 4, "input_size": 64, **fields}))
    randomise(model, seed)
    return model.eval()


def _clips(frames: int = 4) -> Tensor:
    return torch.randn(1, 3, frames, 64, 64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("preset", "frames"), [("posmlp_tiny", 8), ("posmlp_s", 32), ("posmlp_b", 16)])
def test_a_preset_survives_the_released_names_bit_by_bit(preset: str, frames: int) -> None:
    with torch.device("meta"):
        model = PosMLPVideo(ModelConfig(preset=preset, num_frames=frames, num_classes=7))
    randomise(model.to_empty(device="cpu"), 0)
    again = load_released(export_released(model), input_size=model.config.input_size[0])
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    for field in ("widths", "depths", "windows", "groups", "num_frames", "num_classes", "expansion", "input_size"):
        assert getattr(again.config, field) == getattr(model.config, field), field


def test_expansion_four_and_grey_clips_survive_too() -> None:
    model = _tiny(expansion=4, in_channels=1, windows=(7, 7, 4, 2))
    again = load_released(export_released(model), input_size=64)
    assert torch.equal(again(_clips()[:, :1]), model(_clips()[:, :1]))


def test_bgr_weights_take_rgb_clips() -> None:
    model = _tiny()
    turned = load_released(export_released(model), input_size=64, bgr=True)
    assert relative_error(turned(_clips().flip(1)), model(_clips())) <= 1e-5


@pytest.mark.parametrize("fields", [{"block": "joint"}, {"block": "temporal_spatial"}, {"version": "v4"}, {"stem": "3d"}])
def test_what_released_names_cannot_express_is_refused(fields: dict[str, str]) -> None:
    (field,) = fields
    with pytest.raises(ModelError, match=f"only express {field}"):
        export_released(_tiny(**fields))


def _broken(change: str) -> dict[str, Tensor]:
    state = export_released(_tiny())
    if change == "missing":
        del state["blocks3.1.fc.encoder.fc2.bias"]
    elif change == "shape":
        state["patch_embed3.proj.weight"] = state["patch_embed3.proj.weight"][:, 1:]
    elif change == "surplus":
        state["blocks2.0.attn.qkv.weight"] = torch.zeros(1)
    elif change == "nan":
        state["norm.weight"][3] = float("nan")
    elif change == "index":
        state["blocks1.0.fc.encoder.gate_unit.pos.window_relative_position_index"] += 1
    elif change == "morphmlp":
        state["blocks1.0.t_fc.mlp_t.weight"] = torch.zeros(1)
    elif change == "image":
        state = {"levels.0.encoder.0.proj_c_e.weight": torch.zeros(1)}
    elif change == "groups":
        state["blocks1.0.fc.encoder.gate_unit.pos.window_relative_position_bias_table"] = torch.zeros(729, 7)
    elif change == "other":
        state = {"conv1.weight": torch.zeros(1)}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"^blocks3\.1\.fc\.encoder\.fc2\.bias: missing"),
        ("shape", r"^patch_embed3\.proj\.weight: got \(96, 47, 1, 3, 3\), expected \(96, 48, 1, 3, 3\)"),
        ("surplus", r"^blocks2\.0\.attn\.qkv\.weight: in the checkpoint"),
        ("nan", r"^norm\.weight: holds values that are not finite"),
        ("index", r"window_relative_position_index: the offsets are not"),
        ("morphmlp", "MorphMLP"),
        ("image", "published image PosMLP"),
        ("groups", "groups: got 7"),
        ("other", "no released PosMLP-Video checkpoint"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(change: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_released(_broken(change))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 3))
def test_a_dictionary_resized_and_back_is_unchanged_where_it_overlaps(sides: list[tuple[int, int]], groups: int) -> None:
    old, new = tuple(a for a, _ in sides), tuple(b for _, b in sides)
    size = 1
    for extent in old:
        size *= 2 * extent - 1
    table = torch.arange(1.0, size * groups + 1).view(size, groups)
    back = resize_dictionary(resize_dictionary(table, old, new), new, old)
    common = tuple(min(a, b) for a, b in sides)
    assert torch.equal(resize_dictionary(back, old, common), resize_dictionary(table, old, common))
    if common == old:
        assert torch.equal(back, table)
    else:
        assert back.count_nonzero() == resize_dictionary(table, old, common).numel()
    assert torch.equal(resize_dictionary(table, old, old, interpolate=True), table)


def test_token_biases_are_cropped_or_repeat_their_last_token() -> None:
    bias = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    assert resize_token_bias(bias, (3,), (2,)).flatten().tolist() == [1, 2]
    assert resize_token_bias(bias, (3,), (5,)).flatten().tolist() == [1, 2, 3, 3, 3]
    assert resize_token_bias(bias, (3,), (5,), interpolate=True).flatten().tolist() == [1, 1.5, 2, 2.5, 3]


@pytest.mark.parametrize("block", ["parallel", "joint"])
def test_another_clip_length_window_and_class_count_are_reported(block: str) -> None:
    source = _tiny(block=block, windows=(8, 4, 4, 2), num_classes=5)
    target = _tiny(seed=1, block=block, windows=(6, 4, 4, 2), num_classes=3, num_frames=6)
    head = target.head.weight.clone()
    report = load_resized(target, source.state_dict())
    assert report.fresh == report.dropped == ("head.weight", "head.bias")
    assert torch.equal(target.head.weight, head)
    assert any("blocks1.0" in line and "->" in line for line in report.resized)
    assert set(report.kept) | {line.partition(":")[0] for line in report.resized} | set(report.fresh) == set(target.state_dict())
    assert "resized" in str(report)
    back = _tiny(seed=2, block=block, windows=(8, 4, 4, 2), num_classes=5)
    load_resized(back, target.state_dict())
    assert torch.equal(back.state_dict()["norm.weight"], source.state_dict()["norm.weight"])


def test_smaller_windows_keep_the_function_on_smaller_clips() -> None:
    source = _tiny(windows=(16, 8, 8, 4))  # at 64 pixels the grids are 16, 8, 4, 2: the last two use part of their dictionary
    target = _tiny(seed=1, windows=(16, 8, 4, 2))
    load_resized(target, source.state_dict())
    assert relative_error(target(_clips()), source(_clips())) <= 1e-5


def test_an_image_model_becomes_the_video_model_that_computes_it_on_every_frame() -> None:
    image, video = _tiny(num_frames=1), _tiny(seed=1, num_frames=4)
    load_resized(video, export_released(image))
    frames = torch.stack([image(_clips()[:, :, t : t + 1]) for t in range(4)])
    assert relative_error(video(_clips()), frames.mean(0)) <= 1e-5
    plain = {name: t[:, :, 0] if t.ndim == 5 else t for name, t in image.state_dict().items()}  # 2-D convolutions
    assert load_resized(video, plain).resized
    deeper = _tiny(seed=1, num_frames=4, stem="3d")
    assert "patch_embed1.proj1.weight" in " ".join(load_resized(deeper, image.state_dict()).resized)


def test_other_architectures_are_not_half_loaded() -> None:
    model = _tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for state, message in (
        (_tiny(widths=(48, 96, 192, 384)).state_dict(), "patch_embed1.proj1.weight: got .* Set widths"),
        (_tiny(groups=(4, 16, 32, 64)).state_dict(), "bias_table: got .* Set widths, groups"),
        (_tiny(depths=(1, 1, 3, 1)).state_dict(), r"blocks3\.2.* not in the model"),
        (_tiny(block="joint").state_dict(), "missing from the checkpoint"),
    ):
        with pytest.raises(ModelError, match=message):
            load_resized(model, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_files_are_read_without_pickle(tmp_path: Path) -> None:
    state = export_released(_tiny())
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"model_state": {f"module.{name}": t for name, t in state.items()}, "epoch": 3}, tmp_path / "a.pyth")
    for name in ("a.safetensors", "a.pyth"):
        read = read_state(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], tensor) for key, tensor in state.items())
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(ModelError, match="mapping of names"):
        read_state(tmp_path / "b.pt")
