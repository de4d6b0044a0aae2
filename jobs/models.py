"""Which models there are: presets at 8, 16 and 32 frames with parameters, multiply-accumulates and memory, all in closed form.

Nothing is built and torch is not imported. What training keeps follows from what the operations of model/blocks.py save for
their gradients; tests/jobs/test_models.py counts it on built models.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import click

from model.presets import NUM_STAGES, PRESET_FRAMES, PRESET_SOURCES, PRESETS, ResolvedConfig, count_macs, count_parameters, split_windows

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One preset at one clip length, at the preset's own input size and number of classes.

    macs: multiply-accumulates of one clip's forward pass. parameter_bytes: of float32 weights. activation_bytes: what one more
    clip of a micro-batch keeps from forward to backward in float32 (bf16 autocast: about half). map_bytes: what a forward pass
    makes of the dictionaries once, whatever the batch: kept for backward in training, between passes in evaluation on a CPU.
    source: what of it is released and what is inferred.
    """

    preset: str
    num_frames: int
    input_size: tuple[int, int]
    parameters: int
    macs: int
    parameter_bytes: int
    activation_bytes: int
    map_bytes: int
    source: str


def run() -> list[ModelCard]:
    """A card for each preset and clip length."""
    return [card(replace(preset, num_frames=frames)) for preset in PRESETS.values() for frames in PRESET_FRAMES]


def card(config: ResolvedConfig) -> ModelCard:
    """The card of any configuration."""
    return ModelCard(
        preset=config.preset,
        num_frames=config.num_frames,
        input_size=config.input_size,
        parameters=count_parameters(config),
        macs=count_macs(config),
        parameter_bytes=4 * count_parameters(config),
        activation_bytes=4 * kept_elements(config),
        map_bytes=4 * map_elements(config),
        source=PRESET_SOURCES[config.preset],
    )


def kept_elements(config: ResolvedConfig) -> int:
    """Numbers that autograd keeps of one clip on a CPU, stochastic depth and recomputation aside."""
    d, frames = config.widths, config.num_token_frames
    height, width = config.input_size
    half_size = frames * -(-height // 2) * -(-width // 2)
    tokens = [frames * rows * columns for rows, columns in config.grids]
    # Stem: the clip, what each convolution gives, GELU's output in between; on a GPU BatchNorm's, too.
    total = config.stem_channels * config.num_frames * height * width + 2 * half_size * (d[0] // 2) + tokens[0] * d[0]
    for stage in range(NUM_STAGES):
        if stage:  # the convolution's input and its output, which LayerNorm reads
            total += tokens[stage - 1] * d[stage - 1] + tokens[stage] * d[stage]
        padded = frames
        for length in config.grids[stage]:
            count, side = split_windows(length, config.windows[stage])
            padded *= count * side
        total += config.depths[stage] * padded * _kept_of_a_token(config, stage)
    return total + tokens[-1] * d[-1]  # the last LayerNorm's input


def map_elements(config: ResolvedConfig) -> int:
    """Numbers in all matrices W_s, g*n*n of each unit."""
    total = 0
    for stage, (rows, columns) in enumerate(config.grids):
        window = split_windows(rows, config.windows[stage])[1] * split_windows(columns, config.windows[stage])[1]
        frames = config.num_token_frames
        relations = (frames * window) ** 2 if config.block == "joint" else frames**2 + window**2
        total += config.depths[stage] * config.groups[stage] * relations
    return total


def _kept_of_a_token(config: ResolvedConfig, stage: int) -> int:
    """Of a block: of each step x, its mean and deviation and the normalised x, and of each layer in it what fc1 gives, what the
    maps give, and the gated channels."""
    width, hidden = config.widths[stage], config.expansion * config.widths[stage]
    steps = 2 if config.block in ("temporal_spatial", "spatial_temporal") else 1
    layers = 1 if config.block == "joint" or config.version != "v1" else 2
    mapped, gated = {"v1": (1, 1), "v2": (1, 1), "v3": (2, 2), "v4": (2, 1)}[config.version]
    return steps * (2 * width + 2) + layers * (hidden + (mapped + gated) * hidden // 2)


def as_plain(cards: list[ModelCard]) -> list[Mapping[str, object]]:
    """The cards as JSON takes them."""
    return [asdict(each) for each in cards]


def show(cards: list[ModelCard]) -> None:
    """The cards for people."""
    click.echo(
        f"{'preset':<13}{'frames':>6}{'pixels':>10}{'parameters':>13}{'GMACs':>9}{'weights':>10}{'maps':>10}{'training, a clip':>18}"
    )
    for each in cards:
        pixels = "x".join(map(str, each.input_size))
        sizes = [f"{size / MIB:.0f} MiB" for size in (each.parameter_bytes, each.map_bytes, each.activation_bytes)]
        line = f"{each.preset:<13}{each.num_frames:>6}{pixels:>10}{each.parameters / 1e6:>11.2f} M{each.macs / 1e9:>9.2f}"
        click.echo(f"{line}{sizes[0]:>10}{sizes[1]:>10}{sizes[2]:>18}")
    click.echo("\nMemory in float32; training keeps the last column for every clip of a micro-batch, about half of it in bf16.")
    for preset in dict.fromkeys(each.preset for each in cards):
        click.echo(f"{preset}: {PRESET_SOURCES[preset]}")
