"""The experts' parameters and one expert's two products, for every backend."""

from dataclasses import dataclass

from torch import Tensor

from statespan.ops.linear import linear

WIDENED = 512  # rows an expert from which int8 weights are widened beforehand: in each tile that halves the rate


@dataclass(frozen=True)
class Experts:
    """The parameters; shapes in the docstring of `statespan.ops.grouped_mlp`."""

    up_proj: Tensor
    down_proj: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    def up(self, rows: Tensor, expert: int) -> Tensor:
        """[.. h] -> [.. f] (gated: [.. 2f])."""
        return _product(rows, expert, self.up_proj, self.up_bias, self.up_scale)

    def down(self, inner: Tensor, expert: int) -> Tensor:
        """[.. f] -> [.. h]."""
        return _product(inner, expert, self.down_proj, self.down_bias, self.down_scale)


def _product(x: Tensor, expert: int, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return linear(
        x,
        weight[expert],
        None if bias is None else bias[expert],
        scale=None if scale is None else scale[expert],
    )
