"""Times the model against the released formulation written plainly, at equal weights, interleaved in one run.

    python -m jobs.bench_model [--presets posmlp_s posmlp_b] [--num-frames 16] [--repeats 3] [--threads 1] [--json]

For each preset and type it prints clips per CPU-second of the forward pass (evaluation, no gradient) and of forward +
backward (batch statistics, loss to all gradients), the ratio to the released formulation in float32, and the share of the
rate at which one large matrix product runs on the same threads in the same type. Rounds alternate between the contestants,
so a machine that slows down slows all of them; the best round counts, and the spread (worst to best) is given beside it.

:func:`plain_logits` is that released formulation: groups innermost in one einsum, windows partitioned around every spatial
layer, sites and frames transposed around every temporal one, separate norms and linear layers. It shares no code with the
model package, only the names of the weights; the tests use it as the reference for values too.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.posmlp import PosMLPVideo
from model.presets import PRESETS, ModelConfig, count_macs

EPS = 1e-5
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One line of the table. The time is the process's CPU time, so other processes' turns do not count; their use of caches
    and of memory does.

    who: ``ours`` or ``released``. spread: the worst round's time over the best's. times_released: how many times as fast as
    the released formulation in float32. product_share: of the rate of one large product in the same type.
    """

    preset: str
    direction: str
    kind: str
    who: str
    clips_per_cpu_s: float
    spread: float
    times_released: float
    product_share: float


def run(
    presets: Sequence[str] = ("posmlp_s", "posmlp_b"), *, num_frames: int = 16, repeats: int = 3, threads: int = 1, batch: int = 1
) -> dict[str, object]:
    """Times every preset; plain data for a report: ``threads``, ``product_gflops`` by type, ``rows`` as :class:`Timing`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rates = {kind: product_rate(dtype) for kind, dtype in TYPES.items()}
        rows = [asdict(row) for preset in presets for row in _time_preset(preset, num_frames, repeats, batch, rates)]
    finally:
        torch.set_num_threads(before)
    return {"threads": threads, "batch": batch, "num_frames": num_frames, "product_gflops": rates, "rows": rows}


def product_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """GFLOP per CPU-second of a square matrix product, best of six: what the machine reaches when nothing is in the way."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2e-9 * size**3 / min(_cpu_seconds(partial(torch.mm, a, b)) for _ in range(6))


def _time_preset(preset: str, num_frames: int, repeats: int, batch: int, rates: Mapping[str, float]) -> Iterator[Timing]:
    config = ModelConfig(preset=preset, num_frames=num_frames, drop_path=0.0, dictionary_init="trunc_normal").resolve()
    model = PosMLPVideo(config)
    clips = torch.randn(batch, config.in_channels, num_frames, *config.input_size)
    cases = list(itertools.product(("released", "ours"), TYPES, (False, True)))
    seconds: dict[tuple[str, str, bool], list[float]] = {case: [] for case in cases}
    for case in cases:
        _pass(model, clips, *case)  # the first of each pays for memory and kernels
    for _ in range(repeats):
        for case in cases:
            seconds[case].append(_cpu_seconds(partial(_pass, model, clips, *case)))
    for (who, kind, backward), times in seconds.items():
        gflops = 2e-9 * count_macs(config) * (3 if backward else 1) * batch
        yield Timing(
            preset=preset,
            direction="forward+backward" if backward else "forward",
            kind=kind,
            who=who,
            clips_per_cpu_s=batch / min(times),
            spread=max(times) / min(times),
            times_released=min(seconds["released", "float32", backward]) / min(times),
            product_share=gflops / min(times) / rates[kind],
        )


def _pass(model: PosMLPVideo, clips: Tensor, who: str, kind: str, backward: bool) -> None:
    """One forward pass, or forward and backward, of one contestant."""
    model.train(backward)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"), torch.set_grad_enabled(backward):
        if who == "ours":
            logits = model(clips)
        else:
            weights = dict(model.named_parameters()) | dict(model.named_buffers())
            logits = plain_logits(weights, clips, model.config.windows, training=backward)
    if backward:
        torch.autograd.backward(F.cross_entropy(logits.float(), torch.zeros(len(clips), dtype=torch.int64)))


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def plain_logits(weights: Mapping[str, Tensor], clips: Tensor, windows: Sequence[int], training: bool = False) -> Tensor:
    """Logits (B, K) of the released model for clips (B, C, T, H, W), from weights under the released names.

    windows: side of the spatial windows of the four stages, dividing their grids, as the released model requires.
    ``training`` normalises with batch statistics instead of running ones. Stochastic depth is not applied.
    """
    x = clips
    for conv, norm in (("proj1", "norm1"), ("proj2", "norm2")):
        x = F.conv3d(x, *_pair(weights, f"patch_embed1.{conv}"), stride=(1, 2, 2), padding=(0, 1, 1))
        mean, variance = (weights[f"patch_embed1.{norm}.running_{kind}"] for kind in ("mean", "var"))
        mean, variance = (mean.clone(), variance.clone()) if training else (mean, variance)
        x = F.batch_norm(x, mean, variance, *_pair(weights, f"patch_embed1.{norm}"), training=training, eps=EPS)
        x = F.gelu(x) if norm == "norm1" else x
    x = x.permute(0, 2, 3, 4, 1)
    for stage, window in enumerate(windows, start=1):
        if stage > 1:
            x = x.permute(0, 4, 1, 2, 3)
            x = F.conv3d(x, *_pair(weights, f"patch_embed{stage}.proj"), stride=(1, 2, 2), padding=(0, 1, 1))
            x = _norm(weights, f"patch_embed{stage}.norm", x.permute(0, 2, 3, 4, 1))
        block = 0
        while f"blocks{stage}.{block}.fc.encoder.fc1.weight" in weights:
            x = plain_block(weights, f"blocks{stage}.{block}", x, window)
            block += 1
    x = _norm(weights, "norm", x.flatten(1, 3))
    return F.linear(x.mean(dim=1), *_pair(weights, "head"))


def plain_block(weights: Mapping[str, Tensor], name: str, x: Tensor, window: int) -> Tensor:
    """x + f_S(x) + f_T(x) on channels-last (B, T, H, W, D), as released."""
    batch, frames, height, width, channels = x.shape
    tiles = x.reshape(batch * frames, height // window, window, width // window, window, channels)
    tiles = tiles.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch * frames, -1, window * window, channels)
    space = plain_layer(weights, f"{name}.fc.encoder", tiles, (window, window))
    space = space.view(batch * frames, height // window, width // window, window, window, channels)
    space = space.permute(0, 1, 3, 2, 4, 5).contiguous().view(x.shape)
    sites = x.reshape(batch, frames, height * width, channels).permute(0, 2, 1, 3)
    time_ = plain_layer(weights, f"{name}.t_fc.encoder", sites, (frames,)).permute(0, 2, 1, 3).reshape(x.shape)
    return x + (space + time_)


def plain_layer(weights: Mapping[str, Tensor], name: str, x: Tensor, extents: tuple[int, ...]) -> Tensor:
    """fc2(G(GELU(fc1(LN(x))))) on (B, runs, n, D)."""
    z = F.gelu(F.linear(_norm(weights, f"{name}.norm", x), *_pair(weights, f"{name}.fc1")))
    return F.linear(plain_gate(weights, f"{name}.gate_unit", z, extents), *_pair(weights, f"{name}.fc2"))


def plain_gate(weights: Mapping[str, Tensor], name: str, z: Tensor, extents: tuple[int, ...]) -> Tensor:
    """pos(u) * v on (B, runs, n, 2C), the map as one einsum with groups innermost."""
    u, v = z.chunk(2, dim=-1)
    table = weights[f"{name}.pos.window_relative_position_bias_table"]
    tokens, groups = u.shape[2], table.shape[1]
    relations = table[_index(extents).view(-1)].view(tokens, tokens, groups).permute(2, 0, 1).contiguous()
    relations = relations.permute(1, 2, 0).unsqueeze(0)  # (1, m, n, s)
    mixed = torch.einsum("wmns,bwnvs->bwmvs", relations, u.reshape(*u.shape[:-1], -1, groups))
    mixed = mixed + weights[f"{name}.pos.token_proj_n_bias"].unsqueeze(0).unsqueeze(-1)
    return mixed.flatten(-2) * v


_INDICES: dict[tuple[int, ...], Tensor] = {}


def _index(extents: tuple[int, ...]) -> Tensor:
    """(n, n) dictionary entries; a buffer in the released model, so made once."""
    if extents not in _INDICES:
        axes = torch.meshgrid(*(torch.arange(extent) for extent in extents), indexing="ij")
        _INDICES[extents] = torch.zeros((), dtype=torch.int64)
        for extent, axis in zip(extents, axes, strict=True):
            offset = axis.flatten()[:, None] - axis.flatten()[None, :] + extent - 1
            _INDICES[extents] = _INDICES[extents] * (2 * extent - 1) + offset
    return _INDICES[extents]


def _pair(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _norm(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *_pair(weights, name), eps=EPS)


def print_table(result: Mapping[str, object]) -> None:
    """The result of :func:`run` for people."""
    rows, rates = result["rows"], result["product_gflops"]
    assert isinstance(rows, list)
    assert isinstance(rates, dict)
    print(f"{result['threads']} thread(s); a large product: " + ", ".join(f"{kind} {rate:.0f}" for kind, rate in rates.items()), end="")
    print(" GFLOP per CPU-second")
    print(f"{'preset':<12}{'pass':<18}{'type':<10}{'who':<10}{'clips/CPU-s':>12}{'spread':>8}{'x released':>12}{'of product':>12}")
    for row in sorted(rows, key=lambda row: (row["preset"], row["direction"], row["kind"], row["who"]), reverse=True):
        print(f"{row['preset']:<12}{row['direction']:<18}{row['kind']:<10}{row['who']:<10}{row['clips_per_cpu_s']:>12.3f}", end="")
        print(f"{row['spread']:>8.2f}{row['times_released']:>12.2f}{row['product_share']:>12.0%}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Times the model against the released formulation written plainly.")
    parser.add_argument("--presets", nargs="+", default=["posmlp_s", "posmlp_b"], choices=sorted(PRESETS))
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="clips a pass")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    options = parser.parse_args(arguments)
    result = run(options.presets, num_frames=options.num_frames, repeats=options.repeats, threads=options.threads, batch=options.batch)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
