"""What a PosMLP-Video is, in plain numbers: the configuration users write, the presets, and the closed forms.

Users write a :class:`ModelConfig` (in a recipe: the ``model:`` section); every field left ``None`` comes from the preset
named. :meth:`ModelConfig.resolve` fills them in and checks that the numbers fit together. The closed forms give tokens,
parameters and multiply-accumulates without building anything. Pure Python: no torch, so a recipe is checked in
milliseconds on a machine that will never train.

Where the numbers come from: [paper] arXiv 2407.02934; [released] the authors' released code; [inferred] our reading
where neither says.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import ClassVar, Literal, get_args

BlockType = Literal["parallel", "temporal_spatial", "spatial_temporal", "joint"]
Version = Literal["v1", "v2", "v3", "v4"]
Stem = Literal["2d", "3d"]
DictionaryInit = Literal["zeros", "trunc_normal"]
Modality = Literal["rgb", "grey_difference"]

NUM_STAGES = 4
# grey_difference: frames between the two that are subtracted, a channel each. [this project's own, chosen on J-HMDB: docs/benchmarks.md]
LAGS: Mapping[str, tuple[int, ...]] = MappingProxyType({"grey_difference": (1, 2, 4)})
_CHOICES = {
    "block": get_args(BlockType),
    "version": get_args(Version),
    "stem": get_args(Stem),
    "dictionary_init": get_args(DictionaryInit),
    "modality": get_args(Modality),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One PosMLP-Video. Fields left ``None`` come from the preset; :meth:`resolve` fills them in.

    preset: a name in :data:`PRESETS`.
    num_classes: K, the width of the logits.
    num_frames: T, frames of a clip.
    input_size: pixels of the crop, one number or (height, width).
    in_channels: channels of a frame.
    modality: ``rgb`` [released], or ``grey_difference``, this project's own: the stem sees only differences of grey frames
        (model/modality.py). For small datasets, where colours teach the scenes instead of the motion.
    widths: D of the four stages; with expansion r_e a unit maps r_e*D/2 channels.
    depths: blocks of the four stages.
    windows: side of the square spatial windows of the four stages; grids that are not a multiple are padded and
        cropped, smaller grids use the part of the dictionary they need.
    groups: dictionaries (channel groups) of each unit in the four stages; they divide the unit's channels.
    expansion: r_e, 2 or 4 [paper].
    block: how units form a block: ``parallel`` [released], ``temporal_spatial``, ``spatial_temporal``, ``joint``
        (names and residuals [inferred]; the paper draws factorized schemata without releasing them).
    version: PoTGU+PoSGU combination V1-V4 of a ``parallel`` block [paper figure 5]; V1 is the released one, the
        placement of the shared layers in V2-V4 is [inferred].
    stem: ``2d`` [released], or ``3d``, whose first convolution also halves T [inferred].
    drop_path: the last block's stochastic depth rate; blocks ramp up linearly from 0 [released].
    dictionary_init: ``zeros`` (what the released code really does: each block starts as the identity) or
        ``trunc_normal`` (std .02, what it intends).
    decay_dictionaries: whether weight decay applies to dictionaries and token biases [released: yes].
    activation_checkpointing: recompute each block in backward instead of keeping its activations.

    Raises ValueError naming the field, what was given and what is expected.
    """

    # Read by pydantic where a ModelConfig is a section of a recipe: an unknown key is an error, not ignored.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    preset: str = "posmlp_s"
    num_classes: int | None = None
    num_frames: int | None = None
    input_size: int | tuple[int, int] | None = None
    in_channels: int | None = None
    modality: Modality | None = None
    widths: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    windows: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    expansion: int | None = None
    block: BlockType | None = None
    version: Version | None = None
    stem: Stem | None = None
    drop_path: float | None = None
    dictionary_init: DictionaryInit | None = None
    decay_dictionaries: bool | None = None
    activation_checkpointing: bool | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            near = difflib.get_close_matches(self.preset, PRESETS, n=1, cutoff=0.0)
            raise ValueError(f"preset: got {self.preset!r}, expected one of {', '.join(PRESETS)}; nearest: {near[0]}")
        for name in ("widths", "depths", "windows", "groups"):
            _set_sequence(self, name, NUM_STAGES, "one for each of the four stages")
        if not isinstance(self.input_size, int):
            _set_sequence(self, "input_size", 2, "(height, width)")
        for name in ("num_classes", "num_frames", "input_size", "in_channels"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                _check_positive(name, value)
        _check_choice("expansion", self.expansion, (2, 4))
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in ("decay_dictionaries", "activation_checkpointing"):
            _check_choice(name, getattr(self, name), (True, False))
        if self.drop_path is not None and not 0.0 <= self.drop_path <= 1.0:
            raise ValueError(f"drop_path: got {self.drop_path!r}, expected a rate in [0, 1]")

    def resolve(self) -> "ResolvedConfig":
        """The concrete numbers: every ``None`` filled from the preset, every relation between fields checked."""
        preset = PRESETS[self.preset]
        version = self.version or preset.version
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.groups is None and version == "v2":
            # V2 gives each unit half the channels; half the groups keep the channels of a group. [inferred]
            values["groups"] = tuple(max(1, g // 2) for g in preset.groups)
        if isinstance(self.input_size, int):
            values["input_size"] = (self.input_size, self.input_size)
        return replace(preset, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """A :class:`ModelConfig` with nothing left open; the field meanings are the same. Made by ``resolve()``."""

    preset: str
    num_classes: int
    num_frames: int
    input_size: tuple[int, int]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    windows: tuple[int, ...]
    groups: tuple[int, ...]
    in_channels: int = 3
    modality: Modality = "rgb"
    expansion: int = 2
    block: BlockType = "parallel"
    version: Version = "v1"
    stem: Stem = "2d"
    drop_path: float = 0.1
    dictionary_init: DictionaryInit = "zeros"
    decay_dictionaries: bool = True
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.version != "v1" and self.block != "parallel":
            raise ValueError(
                f"version: got {self.version!r} with block {self.block!r}, expected v1; V2-V4 are ways to run PoTGU and "
                "PoSGU on the same feature, which only block: parallel does"
            )
        if self.widths[0] % 2:
            raise ValueError(f"widths: got {self.widths}, expected an even first width (the stem starts at half of it)")
        for stage, (channels, groups) in enumerate(zip(self.unit_channels, self.groups, strict=True)):
            if channels % groups:
                raise ValueError(
                    f"groups: got {groups} in stage {stage + 1}, where a unit maps {channels} channels (width "
                    f"{self.widths[stage]}, expansion {self.expansion}, version {self.version}); expected a divisor of "
                    f"{channels}; set model.groups"
                )

    @property
    def stem_channels(self) -> int:
        """Channels that the stem reads: those of a frame, or one for each difference of frames."""
        return self.in_channels if self.modality == "rgb" else len(LAGS[self.modality])

    @property
    def unit_channels(self) -> tuple[int, ...]:
        """Channels that one positional map works on, per stage: r_e*D/2, and half of it in V2."""
        share = 4 if self.version == "v2" else 2
        return tuple(self.expansion * width // share for width in self.widths)

    @property
    def num_token_frames(self) -> int:
        """Frames after the stem: T, or ceil(T/2) behind the 3-D stem."""
        return (self.num_frames + 1) // 2 if self.stem == "3d" else self.num_frames

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the token grid of each stage at ``input_size``: 4, 8, 16, 32 times smaller, rounded up."""
        height, width = self.input_size
        return tuple((-(-height // scale), -(-width // scale)) for scale in (4, 8, 16, 32))


def split_windows(length: int, window: int) -> tuple[int, int]:
    """(number of windows, their side) that cover ``length`` tokens with windows of at most ``window``.

    As few windows as fit, then as even as they go, so that little is padded: 56 by 14 is 4 of 14, 64 by 14 is 5 of 13,
    7 by 14 is 1 of 7. A window smaller than the dictionary's uses the offsets it has. [inferred; equal to the released
    model wherever that runs, which is where window divides length]
    """
    count = -(-length // window)
    return count, -(-length // count)


def count_parameters(config: ResolvedConfig) -> int:
    """Trainable parameters, in closed form; equal to what the built model holds."""
    d, r, in_channels = config.widths, config.expansion, config.stem_channels
    half = d[0] // 2
    total = in_channels * half * (27 if config.stem == "3d" else 9) + 3 * half + half * d[0] * 9 + 3 * d[0]
    total += sum(9 * d[i] * d[i + 1] + 3 * d[i + 1] for i in range(NUM_STAGES - 1))
    total += 2 * d[-1] + d[-1] * config.num_classes + config.num_classes
    for stage, width in enumerate(d):
        layer = r * width * width + r * width + 2 * width + (r * width // 2) * width + width
        maps = _map_parameters(config, stage)
        if config.version == "v1":
            block = (1 if config.block == "joint" else 2) * layer + maps
        else:
            block = layer + maps + ((r * width // 2) * width if config.version == "v3" else 0)
        total += config.depths[stage] * block
    return total


def count_macs(config: ResolvedConfig) -> int:
    """Multiply-accumulates of one clip's forward pass: convolutions, linear layers and positional maps. [released: 40.17 G]

    Norms, activations and gates are not counted, as usual. Padded windows count as the work they are.
    """
    d, frames = config.widths, config.num_token_frames
    height, width = config.input_size
    half, first = d[0] // 2, -(-height // 2) * -(-width // 2) * frames
    total = first * config.stem_channels * half * (27 if config.stem == "3d" else 9)
    total += frames * config.grids[0][0] * config.grids[0][1] * half * d[0] * 9
    for stage, (rows, columns) in enumerate(config.grids):
        if stage:
            total += frames * rows * columns * d[stage - 1] * d[stage] * 9
        padded = frames * math.prod(math.prod(split_windows(n, config.windows[stage])) for n in (rows, columns))
        total += config.depths[stage] * padded * (_linear_macs(config, stage) + _map_macs(config, stage))
    return total + d[-1] * config.num_classes


def _map_parameters(config: ResolvedConfig, stage: int) -> int:
    frames, window, groups = config.num_token_frames, config.windows[stage], config.groups[stage]
    temporal, spatial = 2 * frames - 1, (2 * window - 1) ** 2
    if config.block == "joint":
        return temporal * spatial * groups + frames * window * window
    return (temporal + spatial) * groups + frames + window * window


def _linear_macs(config: ResolvedConfig, stage: int) -> int:
    """Of fc1 and fc2, per token of a block."""
    d, r = config.widths[stage], config.expansion
    if config.version == "v1":
        return (1 if config.block == "joint" else 2) * (r * d * d + r * d * d // 2)
    return r * d * d + (2 if config.version == "v3" else 1) * (r * d * d // 2)


def _map_macs(config: ResolvedConfig, stage: int) -> int:
    """Of the positional maps, per token of a block."""
    frames = config.num_token_frames
    window = math.prod(split_windows(n, config.windows[stage])[1] for n in config.grids[stage])
    return config.unit_channels[stage] * (frames * window if config.block == "joint" else frames + window)


def _set_sequence(config: ModelConfig, name: str, length: int, meaning: str) -> None:
    """Checks a sequence field and stores it as a tuple: YAML gives lists, and a frozen config must hash."""
    value = getattr(config, name)
    if value is None:
        return
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
        raise ValueError(f"{name}: got {value!r}, expected {length} positive integers, {meaning}")
    for item in value:
        _check_positive(name, item)
    object.__setattr__(config, name, tuple(value))


def _check_positive(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, choices))}")


PRESETS: Mapping[str, ResolvedConfig] = MappingProxyType(
    {
        "posmlp_s": ResolvedConfig(
            preset="posmlp_s",
            num_classes=174,
            num_frames=16,
            input_size=(224, 224),
            widths=(72, 144, 288, 576),
            depths=(3, 4, 9, 3),
            windows=(14, 14, 14, 7),
            groups=(8, 16, 32, 64),
        ),
        "posmlp_b": ResolvedConfig(
            preset="posmlp_b",
            num_classes=174,
            num_frames=16,
            input_size=(224, 224),
            widths=(112, 224, 392, 784),
            depths=(4, 6, 15, 4),
            windows=(14, 14, 14, 7),
            groups=(8, 16, 28, 56),
        ),
        "posmlp_tiny": ResolvedConfig(
            preset="posmlp_tiny",
            num_classes=10,
            num_frames=8,
            input_size=(112, 112),
            widths=(24, 48, 96, 192),
            depths=(1, 1, 2, 1),
            windows=(14, 14, 14, 7),
            groups=(8, 16, 32, 64),
            drop_path=0.0,
        ),
    }
)
PRESET_FRAMES = (8, 16, 32)
PRESET_SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "posmlp_s": "widths, depths, windows, groups and classes at 16 frames are the released Something-Something V1 S16's; "
        "8 and 32 frames are the same network at another length [inferred]",
        "posmlp_b": "widths and depths are those of the released B files, whose 64 groups do not divide 392: these groups are inferred",
        "posmlp_tiny": "a size of this project's own, for tests and first steps on a laptop",
    }
)
