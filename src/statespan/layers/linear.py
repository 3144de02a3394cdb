"""Linear layers through `ops.linear`, which streams the weights at memory speed when there are few rows (decode)."""

import torch
from torch import Tensor, nn

from statespan.ops import linear, quantize_rows
from statespan.ops.decode_step import Projection


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


def projection_of(layer: Linear | Int8Linear) -> Projection:
    """What a decoding step reads of a linear layer."""
    return Projection(layer.weight, layer.scale, layer.bias)
