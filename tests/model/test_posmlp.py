"""The built network: its numbers, its uses in training, and its refusals."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from model.errors import ModelError
from model.posmlp import PosMLPVideo
from model.presets import PRESETS, ModelConfig, count_macs, count_parameters, split_windows
from tests.model.reference import randomise, relative_error

DEEP = (4, 6, 15, 4)
WIDE = (96, 192, 384, 768)
TABLE = [  # configuration, frames, parameters in M, GMACs: model.md, the released S16 in the first rows
    ({}, 8, 13.50, 19.98),
    ({}, 16, 13.510, 40.17),
    ({}, 32, 13.53, 81.22),
    ({"depths": DEEP}, 16, 18.98, 58.49),
    ({"widths": WIDE}, 16, 23.69, 68.82),
    ({"widths": WIDE, "depths": DEEP}, 32, 33.29, 202.09),
    ({"preset": "posmlp_b"}, 16, 35.25, 115.72),
    ({"preset": "posmlp_b"}, 32, 35.27, 233.37),
]
VARIANTS = [
    {"block": "parallel"},
    {"block": "temporal_spatial"},
    {"block": "spatial_temporal"},
    {"block": "joint"},
    {"version": "v2"},
    {"version": "v3"},
    {"version": "v4"},
    {"stem": "3d"},
    {"expansion": 4},
    {"version": "v2", "expansion": 4},
]


def _clips(model: PosMLPVideo, batch: int = 1, size: tuple[int, int] | None = None, seed: int = 0) -> torch.Tensor:
    shape = (batch, model.config.in_channels, model.config.num_frames, *(size or model.config.input_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tiny(**fields: object) -> PosMLPVideo:
    torch.manual_seed(0)
    return PosMLPVideo(ModelConfig(**{"preset": "posmlp_tiny", "num_frames": 4, "input_size": 64, **fields}))


@pytest.mark.parametrize(("fields", "frames", "millions", "gmacs"), TABLE)
def test_the_specification_s_numbers(fields: dict[str, object], frames: int, millions: float, gmacs: float) -> None:
    config = ModelConfig(num_frames=frames, **fields).resolve()
    with torch.device("meta"):
        model = PosMLPVideo(config)
    built = sum(p.numel() for p in model.parameters())
    assert built == count_parameters(config)
    assert built / 1e6 == pytest.approx(millions, abs=0.0051)
    assert count_macs(config) / 1e9 == pytest.approx(gmacs, abs=0.0051)


@pytest.mark.parametrize("fields", [*VARIANTS, {"input_size": (96, 80)}, {"input_size": (100, 75), "windows": (5, 3, 2, 2)}])
def test_closed_forms_count_what_the_built_model_does(fields: dict[str, object]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = _tiny(**fields).eval()
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model.config)
    # What torch does not count by itself.
    uncounted = {
        torch.ops.aten.addmm_: lambda _, a, b, out_shape: 2 * a[0] * a[1] * b[1],
        torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, out_shape: 2 * a[0] * a[1] * b[0],
    }
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        model(_clips(model))
    assert counter.get_total_flops() == 2 * count_macs(model.config)


@pytest.mark.parametrize("fields", VARIANTS)
def test_every_variant_trains_every_parameter(fields: dict[str, object]) -> None:
    model = _tiny(dictionary_init="trunc_normal", drop_path=0.1, **fields)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(_clips(model, batch=2))
    logits.float().logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(32, 32), (112, 112), (64, 96), (75, 100)])
def test_any_input_size_runs_and_depends_on_all_of_it(size: tuple[int, int]) -> None:
    model = _tiny(num_frames=2).eval()
    randomise(model, 1)
    clips = _clips(model, size=size).requires_grad_(True)
    logits = model(clips)
    logits.sum().backward()
    assert logits.shape == (1, 10)
    assert [tuple(m.shape[1:4]) for m in model.forward_stages(clips)] == [(2, -(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    assert clips.grad is not None
    assert (clips.grad.abs().amax(dim=(0, 1, 2)) > 0).all()


def test_checkpointing_changes_memory_not_numbers() -> None:
    gradients = []
    for recompute in (False, True):
        model = _tiny(dictionary_init="trunc_normal", drop_path=0.5, activation_checkpointing=recompute)
        torch.manual_seed(11)  # as a trainer does before each micro-batch
        model(_clips(model, batch=2)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_inference_mode_first_leaves_training_possible() -> None:
    model = _tiny(dictionary_init="trunc_normal")
    with torch.inference_mode():
        before = model(_clips(model))
    model(_clips(model)).sum().backward()
    assert before.shape == (1, 10)


def test_names_for_the_optimizer() -> None:
    model = _tiny()
    spared = model.no_weight_decay()
    assert spared == {name for name, p in model.named_parameters() if p.ndim == 1}
    more = PosMLPVideo(replace(model.config, decay_dictionaries=False)).no_weight_decay() - spared
    assert more
    assert all(name.endswith(("bias_table", "n_bias")) for name in more)
    ids = [model.layer_id(name) for name, _ in model.named_parameters()]
    assert ids == sorted(ids)
    assert set(ids) == set(range(model.num_layers))
    with pytest.raises(ModelError, match="layer_id"):
        model.layer_id("backbone.0")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 4, 3, 64, 64), torch.float32, "looks like"),
        ((3, 4, 64, 64), torch.float32, "expected"),
        ((1, 3, 4, 64, 64), torch.uint8, "normalise"),
        ((1, 3, 4, 64, 64), torch.float64, "expected the weights' torch.float32"),
        ((1, 3, 5, 64, 64), torch.float32, "num_frames: 5"),
        ((1, 3, 4, 31, 64), torch.float32, "at least 32"),
        ((0, 3, 4, 64, 64), torch.float32, "empty"),
    ],
)
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _tiny()(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "posmlp_S"}, "nearest: posmlp_s"),
        ({"widths": (8, 16, 32)}, "widths: got .* four stages"),
        ({"windows": (0, 1, 1, 1)}, "windows: got 0"),
        ({"expansion": 3}, "expansion: got 3, expected one of 2, 4"),
        ({"block": "serial"}, "block: got 'serial'"),
        ({"drop_path": 1.5}, "drop_path"),
        ({"num_frames": 2.0}, "num_frames"),
        ({"input_size": (64, 64, 64)}, "input_size"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": (5, 16, 32, 64)}, "groups: got 5 in stage 1.*divisor of 24"),
        ({"version": "v3", "block": "joint"}, "version: got 'v3'"),
        ({"widths": (25, 48, 96, 192), "groups": (5, 16, 32, 64)}, "even first width"),
    ],
)
def test_fields_that_do_not_fit_together_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(preset="posmlp_tiny", **fields).resolve()


def test_a_recipe_section_is_strict_and_takes_yaml_lists() -> None:
    adapter = TypeAdapter(ModelConfig)
    config = adapter.validate_python({"preset": "posmlp_tiny", "widths": [48, 96, 192, 384], "input_size": [112, 96]})
    assert config == ModelConfig(preset="posmlp_tiny", widths=(48, 96, 192, 384), input_size=(112, 96))
    assert hash(config) == hash(replace(config))
    with pytest.raises(ValidationError, match="width"):
        adapter.validate_python({"width": [48, 96, 192, 384]})


def test_presets_are_pure_and_resolve_to_themselves() -> None:
    for name, preset in PRESETS.items():
        assert ModelConfig(preset=name).resolve() == preset
    assert split_windows(56, 14) == (4, 14)
    assert split_windows(64, 14) == (5, 13)
    code = "import sys, model.presets, model.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_v1_to_v4_differ() -> None:
    clips = None
    seen = []
    for version in ("v1", "v2", "v3", "v4"):
        model = _tiny(version=version).eval()
        randomise(model, 0)
        clips = _clips(model) if clips is None else clips
        seen.append(model(clips))
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("changes", [{}, {"block": "joint"}, {"block": "temporal_spatial"}, {"version": "v4"}, {"version": "v2"}])
def test_gradients_accumulate_over_micro_batches(changes: dict[str, str]) -> None:
    """Two backwards add up: no two gradients share memory, or accumulation in place would count one of them twice."""
    config = ModelConfig(preset="posmlp_tiny", num_classes=3, num_frames=4, input_size=32, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = PosMLPVideo(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    clips = torch.randn(2, 2, 3, 4, 32, 32, dtype=torch.float64)
    model.eval()  # batch norm of one micro-batch must not see the other

    def gradients(*batches: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            model(batch).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    first, second, both = gradients(clips[0]), gradients(clips[1]), gradients(clips[0], clips[1])
    for name, total in both.items():
        torch.testing.assert_close(total, first[name] + second[name], msg=name)


@pytest.mark.parametrize("stem", ["2d", "3d"])
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_in_float32_are_those_in_float64_however_few_the_frames(stem: str, frames: int, batch: int) -> None:
    """With one token frame the strides of a clip fit two memory layouts; batch norm's backward read gradients in the wrong one."""
    config = ModelConfig(preset="posmlp_tiny", num_frames=frames, input_size=64, stem=stem, windows=(8, 4, 4, 2), depths=(1, 1, 1, 1))
    model = PosMLPVideo(config)
    randomise(model, seed=2)
    clips = torch.randn(batch, 3, frames, 64, 64, generator=torch.Generator().manual_seed(5))

    def gradients(model: PosMLPVideo, clips: Tensor) -> list[Tensor]:
        logits = model(clips)
        weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
        return list(torch.autograd.grad((logits * weight).sum(), list(model.parameters())))

    exact = gradients(copy.deepcopy(model).double(), clips.double())
    scale = max(g.abs().max() for g in exact)
    for (name, _), got, wanted in zip(model.named_parameters(), gradients(model, clips), exact, strict=True):
        assert (got - wanted).abs().max() <= 1e-4 * scale, name
