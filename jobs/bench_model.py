"""Times the model against the released formulation written plainly, at equal weights, interleaved in one run.

    posmlp bench model [--presets posmlp_s,posmlp_b] [--repeats 5] [--threads 1] [--batch 1] [--json]

For each preset and type it prints clips per CPU-second of the forward pass (evaluation, no gradient) and of forward +
backward (batch statistics, loss to all gradients), the ratio to the released formulation in float32, the share of the rate at
which one large matrix product runs on the same threads in the same type, and the peak memory. Contestants alternate within a
round, so a machine that slows down slows all of them: a ratio is taken within each round, and the median of the rounds
counts, with the lowest and the highest beside it. Memory is measured in a process of its own for each line: the highest
resident size minus what it was before the first pass.

:func:`plain_logits` is that released formulation: groups innermost in one einsum, windows partitioned around every spatial
layer, sites and frames transposed around every temporal one, separate norms and linear layers. It shares no code with the
model package, only the names of the weights; the tests use it as the reference for values too.
"""

import copy
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.errors import JobError
from model.posmlp import PosMLPVideo
from model.presets import ModelConfig, count_macs

EPS = 1e-5
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (direction, type, who), in the order of a round: what is compared stands close together.
CASES = [
    (direction, kind, who)
    for direction in ("forward", "forward+backward")
    for kind, who in (("float32", "released"), ("float32", "ours"), ("bfloat16", "ours"), ("bfloat16", "released"))
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One line of the table. Times are the process's CPU time, so other processes' turns do not count; their use of caches and
    of memory does.

    who: ``ours`` or ``released``. clips_per_cpu_s: of the best round. times_released: how many times as fast as the released
    formulation in float32, median, lowest and highest of the rounds. product_share: of the best rate of one large product in
    the same type. peak_mib: memory of a pass above what weights and clip take, in MiB; None where it was not measured.
    """

    preset: str
    direction: str
    kind: str
    who: str
    clips_per_cpu_s: float
    times_released: tuple[float, float, float]
    product_share: float
    peak_mib: int | None


def run(
    presets: Sequence[str] = ("posmlp_s", "posmlp_b"),
    *,
    num_frames: int = 16,
    repeats: int = 5,
    threads: int = 1,
    batch: int = 1,
    memory: bool = True,
) -> dict[str, object]:
    """Times every preset; plain data: ``threads``, ``batch``, ``product_gflops`` by type, ``rows`` as :class:`Timing`.

    Raises JobError for an unknown preset, naming the nearest.
    """
    try:
        configs = [ModelConfig(preset=preset, num_frames=num_frames, drop_path=0.0, dictionary_init="trunc_normal") for preset in presets]
    except ValueError as error:
        raise JobError(str(error)) from None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rates = {kind: product_rate(dtype) for kind, dtype in TYPES.items()}
        rows = [asdict(row) for config in configs for row in _time(config, repeats, batch, rates, memory)]
    finally:
        torch.set_num_threads(before)
    return {"threads": threads, "batch": batch, "num_frames": num_frames, "product_gflops": rates, "rows": rows}


def product_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """GFLOP per CPU-second of a square matrix product, best of six: what the machine reaches when nothing is in the way."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2e-9 * size**3 / min(_cpu_seconds(partial(torch.mm, a, b)) for _ in range(6))


def _time(config: ModelConfig, repeats: int, batch: int, rates: dict[str, float], memory: bool) -> Iterator[Timing]:
    model, clips = _contest(config, batch)
    # One for each direction, as changing a model from training to evaluation and back lets go of what it keeps between passes.
    models = {"forward": copy.deepcopy(model).eval(), "forward+backward": model.train()}
    for case in CASES:
        _pass(models[case[0]], clips, *case)  # the first of each pays for memory and kernels
    rounds = []
    for _ in range(repeats):
        rounds.append({case: _cpu_seconds(partial(_pass, models[case[0]], clips, *case)) for case in CASES})
        for kind, dtype in TYPES.items():  # the machine may have become faster since
            rates[kind] = max(rates[kind], product_rate(dtype))
    for direction, kind, who in CASES:
        best = min(seconds[direction, kind, who] for seconds in rounds)
        ratios = [seconds[direction, "float32", "released"] / seconds[direction, kind, who] for seconds in rounds]
        gflops = 2e-9 * count_macs(model.config) * (3 if direction == "forward+backward" else 1) * batch
        yield Timing(
            preset=config.preset,
            direction=direction,
            kind=kind,
            who=who,
            clips_per_cpu_s=batch / best,
            times_released=(statistics.median(ratios), min(ratios), max(ratios)),
            product_share=gflops / best / rates[kind],
            peak_mib=peak_memory(config, batch, direction, kind, who) if memory else None,
        )


def _contest(config: ModelConfig, batch: int) -> tuple[PosMLPVideo, Tensor]:
    """The model and a batch of clips of its size."""
    model = PosMLPVideo(config)
    return model, torch.randn(batch, model.config.in_channels, model.config.num_frames, *model.config.input_size)


def peak_memory(config: ModelConfig, batch: int, direction: str, kind: str, who: str) -> int | None:
    """MiB that two passes add at the most to a process's resident memory, in a new process; None where there is no /proc."""
    if not Path("/proc/self/status").exists():
        return None
    arguments = json.dumps(
        [{"preset": config.preset, "num_frames": config.num_frames}, torch.get_num_threads(), batch, direction, kind, who]
    )
    done = subprocess.run([sys.executable, "-m", "jobs.bench_model", arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(f"measuring memory of {config.preset}, {direction}, {kind}, {who} failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout)


def _print_peak_memory(arguments: str) -> None:
    """What the new process of :func:`peak_memory` does."""
    fields, threads, *case = json.loads(arguments)
    torch.set_num_threads(threads)
    model, clips = _contest(ModelConfig(**fields, drop_path=0.0, dictionary_init="trunc_normal"), case[0])
    model.train(case[1] == "forward+backward")
    before = _status_mib("VmRSS")
    for _ in range(2):
        _pass(model, clips, *case[1:])
    print(_status_mib("VmHWM") - before)


def _status_mib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) // 1024


def _pass(model: PosMLPVideo, clips: Tensor, direction: str, kind: str, who: str) -> None:
    """One forward pass, or forward and backward, of one contestant."""
    backward = direction == "forward+backward"
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


def table(result: Mapping[str, object]) -> str:
    """The result of :func:`run` for people."""
    rows, rates = result["rows"], result["product_gflops"]
    assert isinstance(rows, list)
    assert isinstance(rates, dict)
    products = ", ".join(f"{kind} {rate:.0f}" for kind, rate in rates.items())
    lines = [
        f"{result['threads']} thread(s), batch {result['batch']}, {result['num_frames']} frames; "
        f"a large product: {products} GFLOP per CPU-second",
        f"{'preset':<12}{'pass':<18}{'type':<10}{'who':<10}{'clips/CPU-s':>12}"
        f"{'x released (from, to)':>24}{'of product':>12}{'peak MiB':>10}",
    ]
    for row in rows:
        median, low, high = row["times_released"]
        lines.append(
            f"{row['preset']:<12}{row['direction']:<18}{row['kind']:<10}{row['who']:<10}{row['clips_per_cpu_s']:>12.3f}"
            f"{f'{median:.2f} ({low:.2f}, {high:.2f})':>24}{row['product_share']:>12.0%}{row['peak_mib'] or '-':>10}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    _print_peak_memory(sys.argv[1])
