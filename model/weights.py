"""Weights from elsewhere: released checkpoints by name, and checkpoints of another T, window, or number of classes.

:func:`load_released` builds the model that a released checkpoint describes and :func:`export_released` writes one;
:func:`load_resized` loads any checkpoint of this architecture into a model of another clip length, window, or class count and
says what it did. All three are strict: what does not fit stops the load with the first tensor that does not, because a
half-loaded network trains, only worse. Nothing here unpickles.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ModelError
from model.lrpe import LRPE, offset_index
from model.posmlp import PosMLPVideo
from model.presets import NUM_STAGES, ModelConfig, ResolvedConfig

_TABLE = "window_relative_position_bias_table"
_BIAS = "token_proj_n_bias"
_INDEX = "window_relative_position_index"


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file: ``.safetensors``, or a torch file read with ``weights_only``. On the CPU.

    A training checkpoint's ``model_state``, ``state_dict`` or ``model`` entry is unwrapped, and a ``module.`` prefix removed.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state: object = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model_state", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: expected a mapping of names to tensors, or one under model_state, state_dict or model")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def load_released(state: Mapping[str, Tensor], *, input_size: int = 224, bgr: bool = False) -> PosMLPVideo:
    """The model that a released checkpoint holds, on the CPU in float32, in evaluation mode.

    Depths, widths, windows, groups, expansion, frames, channels and classes are read off names and shapes; ``input_size``
    is not stored in weights and only informs the closed forms. ``bgr``: the checkpoint expects BGR frames, as the released
    Something-Something ones do; its first convolution is turned round so that the model takes RGB.

    Raises ModelError naming the first tensor that is missing, superfluous, of another shape or not finite, and saying so when
    the checkpoint is a MorphMLP or an image PosMLP.
    """
    _refuse_relatives(state)
    config = _infer_config(state, input_size)
    # Built without memory: initialising weights only to overwrite them would cost seconds and draw random numbers.
    with torch.device("meta"):
        model = PosMLPVideo(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    indices = _indices(model)
    _check_strictly(state, wanted | {name: tuple(index.shape) for name, index in indices.items()})
    for name, index in indices.items():
        if not torch.equal(state[name].cpu(), index):
            raise ModelError(f"{name}: the offsets are not those of the released model; export the checkpoint again")
    loaded = {name: _owned(state[name]) for name in model.state_dict()}
    if bgr:
        loaded["patch_embed1.proj1.weight"] = loaded["patch_embed1.proj1.weight"].flip(1)
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval()


def export_released(model: PosMLPVideo) -> dict[str, Tensor]:
    """The model under the released names, index buffers included: the inverse of :func:`load_released`.

    Raises ModelError for a model that those names cannot express: only block parallel, version v1, stem 2d, modality rgb exist there.
    """
    config = model.config
    for field, released in (("block", "parallel"), ("version", "v1"), ("stem", "2d"), ("modality", "rgb")):
        if getattr(config, field) != released:
            raise ModelError(f"export_released: got {field}: {getattr(config, field)}; the released names only express {field}: {released}")
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    # Cloned, as safetensors refuses tensors that share memory.
    return state | {name: index.clone() for name, index in _indices(model).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What :func:`load_resized` did, by tensor name.

    kept: loaded as they were; resized: loaded after resizing, "name: from -> to"; fresh: left at the model's own initial
    values (a head for other classes); dropped: in the checkpoint, not used.
    """

    kept: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"kept {len(self.kept)}, resized {len(self.resized)}, fresh {len(self.fresh)}, dropped {len(self.dropped)}"]
        lines += [f"  resized {line}" for line in self.resized]
        lines += [f"  fresh   {name}" for name in self.fresh]
        return "\n".join(lines + [f"  dropped {name}" for name in self.dropped])


def load_resized(model: PosMLPVideo, state: Mapping[str, Tensor], *, interpolate: bool = False) -> LoadReport:
    """Loads a checkpoint of the same widths, depths, groups and block type into ``model``, in place, and reports.

    Dictionaries are cropped or zero-padded around the centre offset (or interpolated, with ``interpolate``); token biases are
    cropped or repeat their last token; a head for another number of classes stays fresh; a 2-D convolution becomes (1, 3, 3)
    and, for the 3-D stem, the middle of a (3, 3, 3) one. A model trained on images, one frame, thus becomes a video model
    that computes the image model on every frame until training teaches it otherwise.

    Raises ModelError naming the first tensor that is missing or cannot be resized. The model is untouched if it raises.
    """
    _refuse_relatives(state)
    wanted, units = model.state_dict(), _units(model)
    loaded: dict[str, Tensor] = {}
    kept: list[str] = []
    resized: list[str] = []
    fresh = tuple(n for n in ("head.weight", "head.bias") if n not in state or state[n].shape != wanted[n].shape)
    for name, own in wanted.items():
        if name in fresh:
            loaded[name] = own
            continue
        if name not in state:
            raise ModelError(f"{name}: missing from the checkpoint; it is of another depth, block type or version")
        given = _finite(name, state[name])
        fitted = given if given.shape == own.shape else _fit(name, given, own, state, units, interpolate)
        loaded[name] = fitted.to(own)
        (kept if given.shape == own.shape else resized).append(name)
    indices = {f"{unit}.{_INDEX}" for unit in units}
    dropped = tuple(name for name in state if name not in indices and (name not in wanted or name in fresh))
    surplus = [name for name in dropped if name not in wanted]
    if surplus:
        raise ModelError(f"{surplus[0]}: not in the model; the checkpoint is of another depth, block type or version")
    model.load_state_dict(loaded, strict=True)
    changes = tuple(f"{name}: {tuple(state[name].shape)} -> {tuple(wanted[name].shape)}" for name in resized)
    return LoadReport(kept=tuple(kept), resized=changes, fresh=fresh, dropped=dropped)


def resize_dictionary(table: Tensor, extents: tuple[int, ...], new_extents: tuple[int, ...], *, interpolate: bool = False) -> Tensor:
    """A dictionary (M, g) over ``extents`` as one over ``new_extents``, (M', g), same type.

    By default offsets keep their meaning: those in both stay as they are, the others are cropped, or zero, which relates
    tokens that were never that far apart not at all. ``interpolate`` stretches the offsets instead (linear, centre and ends
    fixed), as if the same scene were sampled more or less finely. [inferred]
    """
    grid = table.t().reshape(-1, *(2 * extent - 1 for extent in extents))
    for axis, (old, new) in enumerate(zip(extents, new_extents, strict=True), start=1):
        if interpolate:
            grid = _interpolate(grid, axis, 2 * new - 1)
        elif new <= old:
            grid = grid.narrow(axis, old - new, 2 * new - 1)
        else:
            margin = grid.new_zeros(*grid.shape[:axis], new - old, *grid.shape[axis + 1 :])
            grid = torch.cat([margin, grid, margin], dim=axis)
    return grid.flatten(1).t().contiguous()


def resize_token_bias(bias: Tensor, extents: tuple[int, ...], new_extents: tuple[int, ...], *, interpolate: bool = False) -> Tensor:
    """A token bias (1, n, 1) over ``extents`` as one over ``new_extents``, (1, n', 1).

    By default cropped at the end of each axis, as a smaller window crops it, or extended by repeating the last token.
    """
    grid = bias.reshape(extents)
    for axis, (old, new) in enumerate(zip(extents, new_extents, strict=True)):
        if interpolate:
            grid = _interpolate(grid, axis, new)
        else:
            grid = grid.index_select(axis, torch.arange(new, device=grid.device).clamp(max=old - 1))
    return grid.reshape(1, -1, 1)


def _interpolate(grid: Tensor, axis: int, length: int) -> Tensor:
    """Linear interpolation of one axis to ``length`` points, ends fixed."""
    rows = grid.movedim(axis, -1)
    flat = rows.reshape(1, -1, rows.shape[-1])
    flat = F.interpolate(flat, size=length, mode="linear", align_corners=True)
    return flat.reshape(*rows.shape[:-1], length).movedim(-1, axis)


def _fit(name: str, given: Tensor, own: Tensor, state: Mapping[str, Tensor], units: Mapping[str, LRPE], interpolate: bool) -> Tensor:
    """``given`` resized to the shape of ``own``, for the kinds of tensor that have a rule."""
    unit, _, kind = name.rpartition(".")
    if unit in units and kind in (_TABLE, _BIAS) and f"{unit}.{_TABLE}" in state and f"{unit}.{_BIAS}" in state:
        extents = _extents(unit, state, len(units[unit].extents))
        if kind == _BIAS:
            return resize_token_bias(given, extents, units[unit].extents, interpolate=interpolate)
        if given.shape[1] == own.shape[1]:
            return resize_dictionary(given, extents, units[unit].extents, interpolate=interpolate)
    if own.ndim == 5 and given.ndim in (4, 5) and name.endswith("weight"):
        image = given.unsqueeze(2) if given.ndim == 4 else given
        if image.shape[:2] == own.shape[:2] and image.shape[3:] == own.shape[3:] and image.shape[2] == 1:
            inflated = image.new_zeros(own.shape)
            inflated[:, :, own.shape[2] // 2] = image[:, :, 0]
            return inflated
    raise ModelError(
        f"{name}: got {tuple(given.shape)}, expected {tuple(own.shape)}; only frames, windows, input size and classes can "
        "differ between checkpoint and model. Set widths, groups, expansion and stem as the checkpoint has them"
    )


def _extents(unit: str, state: Mapping[str, Tensor], axes: int) -> tuple[int, ...]:
    """The token grid of a unit, from the sizes n of its bias and M of its dictionary."""
    n, size = state[f"{unit}.{_BIAS}"].numel(), state[f"{unit}.{_TABLE}"].shape[0]
    candidates = [(n,)] if axes == 1 else [(n // (w * w), w, w)[-axes:] for w in range(1, math.isqrt(n) + 1) if n % (w * w) == 0]
    for extents in candidates:
        if math.prod(extents) == n and math.prod(2 * extent - 1 for extent in extents) == size:
            return extents
    raise ModelError(f"{unit}: got {n} token biases and {size} offsets, which are no grid's; the checkpoint is damaged")


def _infer_config(state: Mapping[str, Tensor], input_size: int) -> ResolvedConfig:
    """The configuration that names and shapes imply."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in state:
            raise ModelError(f"{name}: missing; this is no released PosMLP-Video checkpoint. Give the model's state dict itself")
        if state[name].ndim != axes:
            raise ModelError(f"{name}: got shape {tuple(state[name].shape)}, expected {axes} axes")
        return tuple(state[name].shape)

    stages = range(1, NUM_STAGES + 1)
    blocks = [{int(n.split(".")[1]) for n in state if n.startswith(f"blocks{s}.") and n.split(".")[1].isdigit()} for s in stages]
    first = [f"blocks{s}.0" for s in stages]
    spatial = [shape(f"{name}.fc.encoder.gate_unit.pos.{_BIAS}", 3)[1] for name in first]
    fc1 = [shape(f"{name}.fc.encoder.fc1.weight", 2) for name in first]
    try:
        return ModelConfig(
            num_classes=shape("head.weight", 2)[0],
            in_channels=shape("patch_embed1.proj1.weight", 5)[1],
            num_frames=shape(f"blocks1.0.t_fc.encoder.gate_unit.pos.{_BIAS}", 3)[1],
            input_size=input_size,
            widths=tuple(width for _, width in fc1),
            depths=tuple(len(own) for own in blocks),
            windows=tuple(math.isqrt(n) for n in spatial),
            groups=tuple(shape(f"{name}.fc.encoder.gate_unit.pos.{_TABLE}", 2)[1] for name in first),
            expansion=fc1[0][0] // fc1[0][1],
        ).resolve()
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"the checkpoint's shapes describe no PosMLP-Video: {error}") from error


def _refuse_relatives(state: Mapping[str, Tensor]) -> None:
    for name in state:
        if any(part in name for part in (".mlp_h.", ".mlp_t.", ".mlp_c.", ".reweight.")):
            raise ModelError(f"{name}: this is a MorphMLP checkpoint (the released 32-frame class is MorphMLP renamed); it has no LRPE")
        if name.startswith("levels.") or ".proj_c_e." in name:
            raise ModelError(
                f"{name}: this is a published image PosMLP; its widths, depthwise down-sampling and quadratic encoding do not fit. "
                "Train this project's image twin, num_frames: 1, and load that"
            )


def _check_strictly(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in state:
            raise ModelError(f"{name}: missing from the checkpoint")
        if tuple(state[name].shape) != shape:
            raise ModelError(f"{name}: got {tuple(state[name].shape)}, expected {shape} by the other tensors' shapes")
        _finite(name, state[name])
    for name in state:
        if name not in wanted:
            raise ModelError(f"{name}: in the checkpoint, but not in the PosMLP-Video that its other tensors describe")


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{name}: holds values that are not finite; use an earlier checkpoint")
    return tensor


def _owned(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().clone()
    return tensor.float() if tensor.is_floating_point() else tensor


def _units(model: PosMLPVideo) -> dict[str, LRPE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LRPE)}


def _indices(model: PosMLPVideo) -> dict[str, Tensor]:
    """The index buffers of the released model, (n, n) spatial and (T, T, 1) temporal; here they are computed, not stored."""
    indices: dict[str, Tensor] = {}
    made: dict[tuple[int, ...], Tensor] = {}
    for name, unit in _units(model).items():
        if unit.extents not in made:
            index = offset_index(unit.extents)
            made[unit.extents] = index[..., None] if len(unit.extents) == 1 else index
        indices[f"{name}.{_INDEX}"] = made[unit.extents]
    return indices
