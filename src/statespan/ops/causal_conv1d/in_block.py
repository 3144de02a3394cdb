"""The convolution's gradients where a mixer's half of a block is one op."""

from torch import Tensor

from statespan.ops.causal_conv1d import _backward
from statespan.ops.dispatch import BACKENDS


def backward(
    grad_y: Tensor,
    through: Tensor,
    matrix: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    into: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the taps, bias and initial state (empty without them); that of x [b t d] is written to `into`.

    That of y = silu(conv(x)) is grad_y [b t d], which may be overwritten, + through [b t i] @ matrix [i d].
    """
    plain = initial_state is None and segments is None and grad_final_state is None
    if plain and x.is_cuda and all(BACKENDS[name].why_not(x.device, (x.dtype,)) is None for name in ("cuda", "triton")):
        from statespan.ops.causal_conv1d import in_block_cuda  # compiles for a GPU, so imported when it runs

        if in_block_cuda.serves(x, weight, matrix):
            absent = x.new_empty(0)
            grad_weight, grad_bias = in_block_cuda.backward(grad_y, through, matrix, x, weight, bias, into)
            return grad_weight, absent if grad_bias is None else grad_bias, absent
    grad_y.flatten(0, 1).addmm_(through.flatten(0, 1), matrix)
    if grad_final_state is None:
        grad_final_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    inputs = (x, weight, bias, initial_state, segments)
    return _backward(grad_y, grad_final_state, *inputs, True, "auto", into)[1:]
