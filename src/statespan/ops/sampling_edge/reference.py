"""The equations: every weight in order, sums in float64."""

import torch
from torch import Tensor


def sampling_edge(weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """[n 1] of `statespan.ops.sampling_edge`."""
    edge = weights.new_zeros(len(weights), 1)
    for row, values in enumerate(weights.double()):
        best = values.sort(descending=True).values
        if top_k is not None and top_k[row] < len(best):
            edge[row] = best[top_k[row] - 1]
        if top_p is not None and top_p[row] < 1:
            sums = (best * (best >= edge[row])).cumsum(0)
            reached = torch.searchsorted(sums, top_p[row].double() * sums[-1:])
            edge[row] = best[reached.clamp(max=len(best) - 1)]
    return edge
