"""In which type a model is run forward and backward, and whether it is compiled; parameters stay float32."""

from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import ClusterError
from cluster.options import EngineOptions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(wanted: str, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16"; rank 0's device decides "auto": the numerics of a gang must not differ between its machines."""
    if wanted == "fp16" and device.type != "cuda":
        raise ClusterError(
            f"engine.precision: got fp16, which is for GPUs, but this rank runs on {device}. "
            "Set engine.precision=bf16 or fp32: their numbers differ, so a run begun in fp16 goes on on GPUs only."
        )
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        facts = torch.cpu.get_capabilities()
        native = bool(facts.get("avx512_bf16") or facts.get("amx_bf16"))
    choice = torch.tensor([int(native)], device=device)
    dist.broadcast(choice, 0)
    return "bf16" if choice.item() else "fp32"


def autocast(options: EngineOptions, device: str) -> torch.autocast:
    """The autocast under which training ran forward, for inference in a gang. A collective where the precision is "auto".

    What was trained in fp16 is judged in float32 where there is no GPU.
    """
    where = torch.device(device)
    wanted = "fp32" if options.precision == "fp16" and where.type != "cuda" else options.precision
    precision = precision_of(wanted, where)
    return torch.autocast(where.type, dtype=DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def compiled(model: nn.Module, options: EngineOptions) -> nn.Module:
    """The model as `engine.compile` wants it run. Raises ClusterError where this machine cannot compile."""
    if not options.compile:
        return model
    if options.zero_stage == 3:
        raise ClusterError("engine.compile: got true, expected false at engine.zero_stage=3, which gathers weights module by module.")
    try:
        torch.compile(torch.sin)(torch.ones(1, device=next(model.parameters()).device))
    except Exception as error:  # dynamo, inductor, Triton and the compiler each have their own
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(
            "engine.compile: got true, but torch.compile does not work here; it needs a C++ compiler (g++), and a C compiler for GPUs. "
            f"Install one, or set engine.compile=false. It said: {reason}"
        ) from None
    return cast(nn.Module, torch.compile(model))
