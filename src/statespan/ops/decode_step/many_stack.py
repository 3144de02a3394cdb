"""Many rows through Mamba-1 blocks that stand one after the other: four kernels a block, on Hopper."""

from collections.abc import Sequence

import torch
from torch import Tensor

from statespan.ops.decode_step.large import PART, Large, Settle, tiles
from statespan.ops.decode_step.multiply import HALVES, multiplies
from statespan.ops.decode_step.project import TYPES, Convolved, Normed, parameters_fit
from statespan.ops.decode_step.update import Recur
from statespan.ops.decode_step.weights import Mamba1Weights

MOST_RANK = 256  # for which x_proj's weights of a block's channels fit into large.cu's ring


class ManyStack:
    """The blocks one after the other, in place.

    What out_proj leaves are sums over parts of its inputs; the next block's norm adds them to the residual stream.
    in_proj's blocks leave sums over their channels for x_proj; the recurrence adds them up. What goes into the two
    large products lies in tiles, as matrix units read it.
    """

    def __init__(
        self,
        weights: Sequence[Mamba1Weights],
        states: Sequence[tuple[Tensor, Tensor]],
        rows: int,
        hidden_dtype: torch.dtype,
    ) -> None:
        first, (conv_state, _) = weights[0], states[0]
        device, dtype, (hidden, inner) = first.norm.device, first.norm.dtype, first.out_proj.weight.shape
        conv = Convolved(0, first.conv_weight, first.conv_bias, conv_state.dtype)
        self._weights, self._states, self._inner = weights, states, inner
        selected = first.x_proj.weight.shape[0]
        self._into = Large([w.in_proj.weight for w in weights], rows, conv, selected)
        self._out = Large([w.out_proj.weight for w in weights], rows)
        self._recur = [Recur(w, rows, tiled=True, sums=self._into.sums) for w in weights]
        norm = Normed(first.norm, first.norm_epsilon)
        self._first = Settle(norm, rows, hidden_dtype, 0)
        self._next = Settle(norm, rows, hidden_dtype, self._out.split)
        self._last = Settle(norm, rows, hidden_dtype, self._out.split, normed=False)
        self._normed, self._y = (tiles(rows, size, dtype, device) for size in (hidden, inner))
        self._projected = torch.empty(rows, 2 * inner, dtype=dtype, device=device)
        self._sums = torch.empty(self._out.split, rows, hidden, dtype=torch.float32, device=device)
        self._selection = torch.empty(self._into.sums, rows, selected, dtype=torch.float32, device=device)
        self._told = torch.zeros(rows, selected, 2, dtype=torch.int32, device=device)
        self._epoch = torch.zeros(1, dtype=torch.int32, device=device)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The residual stream [b h] after the blocks, where it was; the states are overwritten."""
        x, z = self._projected.split(self._inner, dim=1)
        for i, (w, (conv_state, ssm_state)) in enumerate(zip(self._weights, self._states, strict=True)):
            settle = self._next if i else self._first
            settle(hidden, self._sums, w.norm, self._normed, self._epoch)
            of_conv = conv_state, w.conv_weight, w.conv_bias
            self._into(i, self._normed, self._projected, *of_conv, w.x_proj.weight, self._selection)
            self._recur[i](x, z, self._selection, ssm_state, self._y, self._told, self._epoch)
            self._out(i, self._y, self._sums)
        self._last(hidden, self._sums, self._weights[-1].norm, self._normed, self._epoch)
        return hidden


def takes(w: Mamba1Weights, hidden_dtype: torch.dtype, conv_dtype: torch.dtype) -> bool:
    """Whether the kernels are made for a block like this, and for this GPU."""
    projections = (w.in_proj, w.x_proj, w.dt_proj, w.out_proj)
    return (
        torch.cuda.get_device_capability(w.norm.device)[0] == 9  # of which large.cu has the own instructions
        and all(map(multiplies, projections))
        and {p.weight.dtype for p in projections} == {w.norm.dtype}
        and parameters_fit((w.norm, w.conv_weight, w.conv_bias, *w.inner_norms), (w.dt_bias, w.A_log, w.D))
        and all(size % PART == 0 for size in w.out_proj.weight.shape)
        and hidden_dtype in TYPES
        and conv_dtype in HALVES
        and Recur.takes(w)
        and w.dt_proj.weight.shape[1] <= MOST_RANK
    )
