"""Where top-k and top-p sampling cut off: the least weight that is kept, without sorting a vocabulary."""

from functools import cache

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_dim, check_shape
from statespan.ops.custom_op import define
from statespan.ops.dispatch import resolve
from statespan.ops.sampling_edge import reference, torch_backend

__all__ = ["sampling_edge"]


def sampling_edge(
    weights: Tensor, top_k: Tensor | int | None = None, top_p: Tensor | float | None = None, *, backend: str = "auto"
) -> Tensor:
    """Least weight of the k largest, and then of the fewest of these that hold top_p of their sum   (arXiv 1904.09751).

    A token is kept where its weight reaches the edge; tokens that tie with the last kept one stay.

    Args:
        weights: [n v], float32 in [0, 1]: probabilities relative to the best token's.
        top_k: [n], int64, or one number: at least 1; v and above keep all. None: all.
        top_p: [n], float32, or one number: above 0; 1 keeps all. None: all.
        backend: "auto", or a name from `statespan backends`. "cuda" neither sorts nor waits for anything, and
            can be captured in a CUDA graph: a search over the 30 bits of a weight, with each row in registers.

    Returns:
        [n 1] float32; 0 where all are kept. It means nothing for a row with NaN. No gradients.

    Raises:
        UserError: shapes, dtypes or devices disagree (both in the message).
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: "cuda" adds float32 in parts and these in float64, "torch" float32 in order: they may cut at neighbours
        where a sum meets top_p within rounding. Deterministic.

    Example:
        >>> sampling_edge(torch.tensor([[0.1, 1.0, 0.5]]), top_p=0.9)
        tensor([[0.5000]])
    """
    op = "sampling_edge"
    check_dim(op, "weights", weights, "[n v]")
    if weights.dtype != torch.float32:
        raise UserError(f"{op}: weights must be float32, got {weights.dtype}")
    if isinstance(top_k, int):
        top_k = weights.new_full((len(weights),), top_k, dtype=torch.int64)
    if isinstance(top_p, int | float):
        top_p = weights.new_full((len(weights),), top_p)
    check_shape(op, "top_k", top_k, "[n]", (len(weights),))
    check_shape(op, "top_p", top_p, "[n]", (len(weights),))
    check_devices(op, weights=weights, top_k=top_k, top_p=top_p)
    for name, tensor, dtype in (("top_k", top_k, torch.int64), ("top_p", top_p, torch.float32)):
        if tensor is not None and tensor.dtype != dtype:
            raise UserError(f"{op}: {name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    return _sampling_edge(weights.detach(), top_k, top_p, backend)


def _kernel(weights: Tensor, top_k: Tensor | None, top_p: Tensor | None, backend: str) -> Tensor:
    match resolve("sampling_edge", backend, weights.device, weights.dtype, too_large=_limits(weights)):
        case "cuda":
            from statespan.ops.sampling_edge import cuda_backend  # imports cuda-core, so imported when it runs

            return cuda_backend.sampling_edge(weights, top_k, top_p)
        case "torch":
            return torch_backend.sampling_edge(weights, top_k, top_p)
        case _:
            return reference.sampling_edge(weights, top_k, top_p)


@cache
def _too_large(size: int, device: torch.device) -> tuple[tuple[str, str], ...]:
    from statespan.ops.sampling_edge.cuda_backend import too_large

    reason = too_large(size, device)
    return () if reason is None else (("cuda", reason),)


def _limits(weights: Tensor) -> tuple[tuple[str, str], ...]:
    return _too_large(weights.shape[1], weights.device) if torch.version.cuda and weights.is_cuda else ()


_sampling_edge = define(
    "sampling_edge(Tensor weights, Tensor? top_k, Tensor? top_p, str backend) -> Tensor",
    _kernel,
    lambda weights, *_: weights.new_empty(weights.shape[0], 1),
)
