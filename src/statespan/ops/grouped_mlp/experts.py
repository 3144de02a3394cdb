"""The experts' parameters and one expert's two products, for every backend."""

from dataclasses import dataclass

from torch import Tensor

from statespan.ops.linear import linear


@dataclass(frozen=True)
class Experts:
    """The parameters; shapes in the docstring of `statespan.ops.grouped_mlp`."""

    up_proj: Tensor
    down_proj: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def up(self, rows: Tensor, expert: int) -> Tensor:
        """[.. h] -> [.. f] (gated: [.. 2f])."""
        return linear(rows, self.up_proj[expert], None if self.up_bias is None else self.up_bias[expert])

    def down(self, inner: Tensor, expert: int) -> Tensor:
        """[.. f] -> [.. h]."""
        return linear(inner, self.down_proj[expert], None if self.down_bias is None else self.down_bias[expert])
