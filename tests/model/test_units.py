"""The units against their equations as plain loops in float64, and what follows from the equations."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.blocks import Block, DropPath, GatedLayer, add_layers
from model.errors import ModelError
from model.lrpe import LRPE, offset_index
from model.presets import ModelConfig
from model.units import GatingUnit, PoSGU, PoSTGU, PoTGU, Relations, gelu_gate, pos
from model.windows import WindowGrid
from tests.model.reference import loop_gate, loop_layer, randomise, relative_error

KINDS = st.sampled_from(["temporal", "spatial", "joint"])


def _unit(kind: str, frames: int, window: int, groups: int, per_group: int) -> GatingUnit:
    channels = groups * per_group
    if kind == "temporal":
        unit: GatingUnit = PoTGU(channels, groups, frames)
    elif kind == "spatial":
        unit = PoSGU(channels, groups, window)
    else:
        unit = PoSTGU(channels, groups, frames, window)
    return unit.double()


def _tokens(unit: GatingUnit) -> int:
    return unit.pos.token_proj_n_bias.shape[1]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(KINDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_unit_is_its_equation(kind: str, frames: int, window: int, groups: int, per_group: int, seed: int) -> None:
    unit = _unit(kind, frames, window, groups, per_group)
    randomise(unit, seed)
    z = _random(2, _tokens(unit), 2 * groups * per_group, seed=seed)
    expected = loop_gate(z, unit.pos.window_relative_position_bias_table, unit.pos.token_proj_n_bias, unit.pos.extents)
    assert relative_error(unit(z), expected) <= 1e-12


@pytest.mark.parametrize("kind", ["temporal", "spatial", "joint"])
def test_gradients_of_a_unit_are_those_of_the_function(kind: str) -> None:
    unit = _unit(kind, 2, 2, 2, 2)
    randomise(unit, 1)
    parameters = list(unit.parameters())

    def function(z: torch.Tensor, table: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        names = ("pos.window_relative_position_bias_table", "pos.token_proj_n_bias")
        return torch.func.functional_call(unit, dict(zip(names, (table, bias), strict=True)), (z,))

    z = _random(1, _tokens(unit), 8).requires_grad_(True)
    ordered = [p.detach().requires_grad_(True) for p in parameters]
    assert [name for name, _ in unit.named_parameters()] == ["pos.window_relative_position_bias_table", "pos.token_proj_n_bias"]
    assert torch.autograd.gradcheck(function, (z, *ordered))


@pytest.mark.parametrize("kind", ["temporal", "spatial", "joint"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_gelu_and_gate_in_one_are_those_of_the_function(kind: str, padded: bool) -> None:
    unit = _unit(kind, 2, 2, 2, 2)
    randomise(unit, 1)
    real = torch.tensor([[[1.0, 1, 1, 1]], [[1, 0, 1, 0]], [[1, 1, 0, 0]]], dtype=torch.float64) if padded else None
    z = _random(2, 2, 2, 3, 2, 4).requires_grad_(True)  # (2, g, C/g, R, T, n)
    matrices, bias, over_time = unit.relations(2, (2, 2), torch.float64)
    leaves = (z, matrices.detach().requires_grad_(True), bias.detach().requires_grad_(True))
    assert torch.autograd.gradcheck(lambda z, w, b: gelu_gate(z, Relations(w, b, over_time), real), leaves)
    u, v = torch.nn.functional.gelu(z.detach())
    u = u if real is None else u * real
    with torch.no_grad():
        assert (
            relative_error(gelu_gate(z, Relations(matrices, bias, over_time), real), pos(u, unit.relations(2, (2, 2), z.dtype)) * v)
            <= 1e-12
        )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.sampled_from([1, 2]), expansion=st.sampled_from([2, 4]), seed=st.integers(0, 99))
def test_layers_that_share_their_products_are_the_sum_of_plain_layers(
    monkeypatch: pytest.MonkeyPatch, groups: int, expansion: int, seed: int
) -> None:
    width, frames, window = 4, 3, 2
    channels = expansion * width // 2
    temporal = GatedLayer(width, expansion, [PoTGU(channels, groups, frames)]).double()
    spatial = GatedLayer(width, expansion, [PoSGU(channels, groups, window)]).double()
    randomise(temporal, seed)
    randomise(spatial, seed + 1)
    x = _random(4, frames, window * window, width, seed=seed)  # (R, T, n, D)
    windows = WindowGrid.of(window, 2 * window, window)
    in_time = loop_layer(x.transpose(1, 2).flatten(0, 1), temporal, (frames,)).view(4, window * window, frames, width)
    expected = loop_layer(x.flatten(0, 1), spatial, (window, window)).view(x.shape) + in_time.transpose(1, 2)
    hidden_bytes = expansion * width * frames * window * window * x.element_size()
    for at_once in (1, 3, 4):  # tubes a block takes at a time; the last turn may be shorter
        monkeypatch.setattr("model.blocks.CACHE_BYTES", at_once * hidden_bytes)
        assert relative_error(add_layers(x, [temporal, spatial], windows), x + expected) <= 1e-12
        assert relative_error(add_layers(x, [temporal, spatial], windows, residual=False), expected) <= 1e-12


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_windows_of_any_grid_come_back_as_they_went(height: int, width: int, window: int) -> None:
    grid = WindowGrid.of(height, width, window)
    x = _random(1, 2, height, width, 3)
    ordered = grid.partition(x)
    assert max(grid.sides) <= window
    assert torch.equal(grid.merge(ordered), x)
    if grid.real is not None:
        assert grid.real.sum() == height * width
        assert not ordered.transpose(0, 1)[:, grid.real == 0].any()


def _touched(unit: GatingUnit, windows: WindowGrid, place: tuple[int, int, int], frames: int = 3) -> torch.Tensor:
    """Where (R, T, n) the map of an impulse at ``place`` is not zero, dictionaries random and biases zero."""
    torch.nn.init.normal_(unit.pos.window_relative_position_bias_table)
    u = torch.zeros(1, 1, windows.count, frames, windows.sides[0] * windows.sides[1])
    u[(0, 0, *place)] = 1.0
    return pos(u, unit.relations(frames, windows.sides, u.dtype))[0, 0] != 0


def test_the_units_mix_what_they_name_and_nothing_else() -> None:
    windows = WindowGrid.of(4, 4, 2)
    in_space = _touched(PoSGU(1, 1, 2), windows, (2, 1, 3))
    assert in_space[2, 1].all()
    assert in_space.sum() == 4  # one frame, one window
    in_time = _touched(PoTGU(1, 1, 3), windows, (2, 1, 3))
    assert in_time[2, :, 3].all()
    assert in_time.sum() == 3  # one site
    joint = _touched(PoSTGU(1, 1, 3, 2), windows, (2, 1, 3))
    assert joint[2].all()
    assert joint.sum() == 12  # one window, all frames


def test_padding_is_never_seen() -> None:
    """A block on a padded grid gives, where nothing is padded, what the same block gives on a grid that ends there."""
    config = ModelConfig(preset="posmlp_tiny", num_frames=2, windows=(4, 4, 4, 4), block="joint").resolve()
    block = Block(config, 0, 0.0)
    randomise(block, 2)
    x = _random(1, 2, 5, 3, 24).float()
    grid = WindowGrid.of(5, 3, 4)  # two windows of 3 rows, one row of padding
    out = grid.merge(block(grid.partition(x), grid))
    alone = WindowGrid.of(2, 3, 4)  # the two real rows of the second window
    below = alone.merge(block(alone.partition(x[:, :, 3:]), alone))
    assert relative_error(out[:, :, 3:], below) <= 1e-5


def test_a_smaller_window_uses_the_central_offsets() -> None:
    encoding = LRPE((4, 4), 2)
    torch.nn.init.normal_(encoding.window_relative_position_bias_table)
    whole = encoding.matrices().view(2, 4, 4, 4, 4)
    assert torch.equal(encoding.matrices((3, 2)).view(2, 3, 2, 3, 2), whole[:, :3, :2, :3, :2])
    assert offset_index((4,))[0].tolist() == [3, 2, 1, 0]
    with pytest.raises(ModelError, match="at most"):
        encoding.matrices((5, 4))


def test_dictionaries_at_zero_make_every_block_the_identity() -> None:
    for block in ("parallel", "temporal_spatial", "spatial_temporal", "joint"):
        config = ModelConfig(preset="posmlp_tiny", num_frames=2, block=block, dictionary_init="zeros").resolve()
        x = torch.randn(4, 2, 49, 24, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Block(config, 0, 0.0)(x, WindowGrid.of(14, 14, 7)), x)


def test_drop_path_drops_samples_at_its_rate_from_the_default_generator() -> None:
    branch = torch.ones(4000, 2)
    torch.manual_seed(3)
    dropped = DropPath(0.25)(branch)
    torch.manual_seed(3)
    assert torch.equal(DropPath(0.25)(branch), dropped)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float(dropped.mean()) - 1.0) < 0.05
    assert not DropPath(1.0)(branch).any()  # the residual alone: the block is the identity
    assert torch.equal(DropPath(0.25).eval()(branch), branch)


def test_wrong_use_of_a_unit_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="divisor of 6"):
        PoTGU(6, 4, 2)
    with pytest.raises(ModelError, match=r"expected \(\.\.\., 4, 4\)"):
        PoSGU(2, 1, 2)(torch.zeros(1, 5, 4))


def _loop_block(block: Block, x: torch.Tensor, frames: int, window: int) -> torch.Tensor:
    """A block on tubes (R, T, n, D) by its equations: residual steps, each unit as plain loops."""
    for names in block.order:
        step = torch.zeros_like(x)
        for name in names:
            layer = block.get_submodule(name).encoder
            h = F.gelu(layer.fc1(layer.norm(x)))  # (R, T, n, 2C)
            kinds = [layer.gate_unit] if layer.version == "v1" else [layer.gate_unit_t, layer.gate_unit_s]
            pieces = h.chunk(2, dim=-1) if layer.version == "v2" else [h] * len(kinds)
            outs = []
            for unit, own in zip(kinds, pieces, strict=True):
                in_time = isinstance(unit, PoTGU)
                runs = own.transpose(1, 2) if in_time else own
                flat = runs.flatten(1, 2) if isinstance(unit, PoSTGU) else runs.flatten(0, 1)
                gated = loop_gate(flat, unit.pos.window_relative_position_bias_table, unit.pos.token_proj_n_bias, unit.pos.extents)
                gated = gated.view(*runs.shape[:-1], -1)
                outs.append(gated.transpose(1, 2) if in_time else gated)
            step = step + layer.fc2(sum(outs) if layer.version == "v4" else torch.cat(outs, dim=-1))
        x = x + step
    return x


@pytest.mark.parametrize("expansion", [2, 4])
@pytest.mark.parametrize("kind", ["parallel", "temporal_spatial", "spatial_temporal", "joint", "v2", "v3", "v4"])
def test_every_kind_of_block_is_its_equations(kind: str, expansion: int) -> None:
    """In training (float64, with gradients) and in inference (float32, where other kernels run)."""
    frames, window, width, groups = 3, 2, 8, 2
    choice = {"version": kind} if kind.startswith("v") else {"block": kind}
    fields = {"widths": (width,) * 4, "groups": (groups,) * 4, "windows": (window,) * 4, "expansion": expansion, **choice}
    config = ModelConfig(preset="posmlp_tiny", num_frames=frames, **fields).resolve()
    block, windows = Block(config, 0, 0.0), WindowGrid.of(window, 3 * window, window)
    randomise(block, 4)
    block.double()
    x = _random(3, frames, window * window, width, seed=5).requires_grad_(True)
    expected = _loop_block(block, x, frames, window)
    out = block(x, windows)
    assert relative_error(out, expected) <= 1e-12
    leaves = [x, *block.parameters()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    for got, wanted in zip(
        torch.autograd.grad((out * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        assert relative_error(got, wanted) <= 1e-10
    with torch.inference_mode():
        assert relative_error(block.float().eval()(x.float(), windows).double(), expected) <= 1e-5


def test_all_tubes_of_a_sample_share_its_fate_under_drop_path() -> None:
    config = ModelConfig(preset="posmlp_tiny", num_frames=2, dictionary_init="trunc_normal").resolve()
    windows, x = WindowGrid.of(4, 6, 2), _random(5 * 6, 2, 4, 24).float()  # 5 samples of 6 windows
    block = Block(config, 0, 0.5)
    randomise(block, 3)
    kept = block.eval()(x, windows) - x
    torch.manual_seed(0)
    change = (block.train()(x, windows) - x).view(5, -1)
    expected = kept.view(5, -1) * 2
    fates = [bool(row.any()) for row in change]
    assert len(set(fates)) == 2  # some kept, some dropped, or this shows nothing
    for row, wanted, fate in zip(change, expected, fates, strict=True):
        assert relative_error(row, wanted) <= 1e-5 if fate else not row.any()
