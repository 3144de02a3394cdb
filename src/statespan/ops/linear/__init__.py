"""Matrix product with weights that may be int8, fast for the few rows of a decoding step."""

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_dim, check_shape, needs_gradients
from statespan.ops.custom_op import define
from statespan.ops.dispatch import resolve

__all__ = ["add_product", "linear", "quantize_rows"]

FEW_ROWS = 8  # up to here the cpu kernel reads the weights once, at memory speed; matrix units win beyond
WIDENED_ELEMENTS = 1 << 24  # int8 weights are widened at most this many at once


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x W^T + bias, or y = (x Q^T) * scale + bias for int8 weights Q.

    Args:
        x: [.. i], float.
        weight: [o i], float32, bfloat16 or int8.
        bias: [o], float.
        scale: [o], float32. For int8 weights only, where it is needed: W = Q * scale[:, None], see `quantize_rows`.
        backend: "auto", or a name from `statespan backends`. "cpu" reads the weights at memory speed for up to 8 rows;
            beyond, where autograd records and under autocast it is F.linear too. "torch" is F.linear.

    Returns:
        y [.. o] in x.dtype (under autocast in its dtype). Gradients are those of F.linear; int8 weights have none.

    Raises:
        UserError: shapes or devices disagree (both in the message), or a scale is missing or in excess.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: where x and weight differ in dtype the narrower one is widened; sums are float32; int8 weights meet x as
    it is (the activations are not quantised).

    Example:
        >>> quantized, scale = quantize_rows(torch.randn(16, 8))
        >>> linear(torch.randn(1, 8), quantized, scale=scale).shape
        torch.Size([1, 16])
    """
    plain = x.is_cuda and bias is None and x.dtype == weight.dtype and backend == "auto"
    if plain and x.device == weight.device and x.shape[-1:] == weight.shape[1:]:
        return F.linear(x, weight)  # which takes the host less time than the checks
    check_dim("linear", "weight", weight, "[o i]")
    outputs, inputs = weight.shape
    check_shape("linear", "x", x, "[.. i]", (*x.shape[:-1], inputs))
    check_shape("linear", "bias", bias, "[o]", (outputs,))
    check_shape("linear", "scale", scale, "[o]", (outputs,))
    if (scale is None) is (weight.dtype == torch.int8):
        raise UserError(f"linear: int8 weights need a scale and others take none; weight is {weight.dtype}")
    check_devices("linear", x=x, weight=weight, bias=bias, scale=scale)
    if needs_gradients(x, weight, bias, scale) or torch.is_autocast_enabled(x.device.type):
        return _torch(x, weight, bias, scale)
    return _linear(x, weight, bias, scale, backend)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 quantisation of each output row: weight = quantized * scale[:, None] + error.

    Args:
        weight: [o i], float.

    Returns:
        quantized [o i] int8 in [-127, 127] and scale [o] float32 = max|row| / 127; the error is at most scale / 2.

    Example:
        >>> quantized, scale = quantize_rows(torch.randn(16, 8))
    """
    check_dim("quantize_rows", "weight", weight, "[o i]")
    wide = weight.detach().to(torch.float32)
    scale = wide.abs().amax(1) / 127
    steps = wide / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def set_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """As add_product, in place of what total holds."""
    if left.dtype != right.dtype:  # under autocast
        right = right.to(left.dtype)
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total)
    elif total.is_cuda and torch.version.hip is None:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        total.copy_(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [t o] += left [t i] @ right [i o] in place, the sum in total's dtype; there are no gradients."""
    if left.dtype != right.dtype:  # under autocast
        right = right.to(left.dtype)
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """F.linear in the wider dtype of x and weight. int8 is exact in every float dtype, and scaled after."""
    if scale is not None:
        blocks = weight.split(max(1, WIDENED_ELEMENTS // weight.shape[1]))
        products = [F.linear(x, block.to(x.dtype)) for block in blocks]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        y = y.mul_(scale)
        return y if bias is None else y.add_(bias)
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, backend: str) -> Tensor:
    dtypes = (x.dtype,) if scale is not None else (x.dtype, weight.dtype)
    name, row, elements = resolve("linear", backend, x.device, *dtypes), weight.shape[1], x.numel()
    if backend == "auto" and elements == row and x.dtype == weight.dtype == torch.float32:
        name = "torch"  # the one case in which F.linear reads memory as fast, and it costs less to call
    if name == "cpu" and 0 < elements <= FEW_ROWS * row:
        from statespan.ops.linear import cpu  # loads compiled kernels, so imported when it runs

        return cpu.linear(x, weight, bias, scale)
    return _torch(x, weight, bias, scale)


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, str backend) -> Tensor",
    _kernel,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
