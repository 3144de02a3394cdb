"""Linear layers through `ops.linear`, which streams the weights at memory speed when there are few rows (decode)."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statespan.errors import UserError, first_line
from statespan.ops import linear, quantize_rows
from statespan.ops.decode_step import Projection

GROUP_SIZES = (128, 64, 32)  # weights of a row that share scale and zero point in int4; the largest that divides it


class Linear(nn.Linear):
    """nn.Linear whose product is `ops.linear`."""

    scale: Tensor | None = None  # that of int8 weights: see Int8Linear

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer for inference with int8 weights: y = (x Q^T) * scale + bias, one scale an output row."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        quantized, scale = quantize_rows(weight)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, scale=self.scale)


class Int4Linear(nn.Module):
    """A linear layer for inference with weights of 4 bits in groups along each row, through torchao.

    On a GPU they take half a byte each and meet bfloat16 activations in PyTorch's int4 kernel. On the CPU torchao keeps
    them in a byte each and widens them for each product: good for trying what 4 bits do to a model, not for speed.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(int4_weight(weight), requires_grad=False)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def num_bytes(self) -> int:
        """Of the weights where they are packed: 4 bits each, 2 x 16 bits a group."""
        group = int4_group_size(self.in_features) or self.in_features
        return self.out_features * (self.in_features // 2 + 4 * (self.in_features // group))

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(input.to(self.weight.dtype), self.weight, bias).to(input.dtype)


def int4_group_size(in_features: int) -> int | None:
    """Weights of a group, or None where rows of this length have no groups."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


def int4_weight(weight: Tensor) -> Tensor:
    """`weight` [o i] quantised by torchao: a tensor of its own class, of the same shape. On meta nothing happens.

    Raises:
        UserError: torchao is missing, or has no int4 for this device and dtype.
    """
    if weight.is_meta:
        return weight.detach()
    library, size = _torchao(), int4_group_size(weight.shape[1])
    holder = nn.Sequential(nn.Linear(1, 1, bias=False))
    holder[0].weight = nn.Parameter(weight.detach(), requires_grad=False)
    if weight.is_cuda:
        config = library.Int4WeightOnlyConfig(group_size=size, int4_packing_format="tile_packed_to_4d")
    else:
        # PyTorch's stubs lack torch.int4.
        config = library.IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=library.PerGroup(size))
    try:
        library.quantize_(holder, config)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        where = f"{weight.dtype} on {weight.device.type}"
        raise UserError(f"torchao has no int4 for {where}: {first_line(error)}") from None
    return holder[0].weight.detach()


def _torchao() -> Any:
    try:
        return import_module("torchao.quantization")
    except ImportError:
        raise UserError("int4 needs torchao: pip install 'statespan[quantization]'") from None


def projection_of(layer: Linear | Int8Linear | Int4Linear) -> Projection:
    """What a decoding step reads of a linear layer."""
    return Projection(layer.weight, layer.scale if not isinstance(layer, Int4Linear) else None, layer.bias)
