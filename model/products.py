"""Matrix products of the blocks: hidden channels as rows, tokens as columns.

On a CPU torch sends float32 products to MKL. oneDNN, which torch carries for inference, is 10 to 20 % faster where tokens are the
columns of the result, and can apply GELU to it on the way (docs/benchmarks.md).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product_type(x: Tensor) -> torch.dtype:
    """The type in which products on ``x`` run: autocast's, or its own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def in_onednn(device: torch.device, kind: torch.dtype) -> bool:
    """Whether products in the type ``kind`` can run in oneDNN: on a CPU, eagerly, in float32 or, where the CPU has it, bfloat16."""
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and (kind == torch.float32 or (kind == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())))
    )


def gelu_fits(device: torch.device, kind: torch.dtype) -> bool:
    """Whether a product or convolution may apply GELU, what they make passing through memory once: in oneDNN, without gradients."""
    return not torch.is_grad_enabled() and in_onednn(device, kind)


def product(weight: Tensor, tokens: Tensor, gelu: bool = False) -> Tensor:
    """weight (rows, D) and tokens (N, D), of one type, to weight tokens^T, (rows, N); ``gelu`` where :func:`gelu_fits`."""
    if not in_onednn(tokens.device, tokens.dtype):
        return torch.mm(weight, tokens.t())
    if torch.is_grad_enabled():
        out: Tensor = _Product.apply(weight, tokens)  # type: ignore[no-untyped-call]
        return out
    return _onednn(weight, tokens, gelu)


def add_product(out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """out (N, D) plus rows^T weight, rows (R, N) and weight (R, D) of one type; ``out`` may have a wider one, and is overwritten."""
    if torch.is_grad_enabled() and in_onednn(rows.device, rows.dtype):
        done: Tensor = _AddProduct.apply(out, rows, weight)  # type: ignore[no-untyped-call]
        return done
    return _add(out, rows, weight)


def _onednn(weight: Tensor, tokens: Tensor, gelu: bool = False) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(weight, tokens, None, "gelu" if gelu else "none", [], "none")
    return out


def _add(out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    # Where types agree the product adds to what is there.
    return out.addmm_(rows.t(), weight) if out.dtype == rows.dtype else out.add_(torch.mm(rows.t(), weight))


class _Product(torch.autograd.Function):
    """:func:`product` with gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(weight, tokens)
        return _onednn(weight, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, tokens = ctx.saved_tensors
        return torch.mm(grad, tokens), torch.mm(grad.t(), weight)


class _AddProduct(torch.autograd.Function):
    """:func:`add_product` with gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(rows, weight)
        return _add(out, rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        narrow = grad.to(rows.dtype)
        return grad, _onednn(weight, narrow), torch.mm(rows, narrow)
