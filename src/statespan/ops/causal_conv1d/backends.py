"""Values and gradients of the convolution by the backend that runs: what blocks call, being kernels themselves."""

from torch import Tensor

from statespan.ops.causal_conv1d import reference, torch_backend
from statespan.ops.custom_op import gradients
from statespan.ops.dispatch import resolve
from statespan.ops.gpu import GRID_ROWS

MOST_CUDA_TAPS = 8  # that a thread of the CUDA kernels holds for its channels


def _resolve(backend: str, x: Tensor, weight: Tensor) -> str:
    rows, taps, too_large = x.shape[0], weight.shape[1], ()
    if taps > MOST_CUDA_TAPS or rows > GRID_ROWS:
        limit = f"its kernels take up to {MOST_CUDA_TAPS} taps and {GRID_ROWS} rows, not {taps} and {rows}"
        too_large = (("cuda", limit),)
    return resolve("causal_conv1d", backend, x.device, x.dtype, weight.dtype, too_large=too_large)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.causal_conv1d`."""
    match _resolve(backend, x, weight):
        case "cpu":
            from statespan.ops.causal_conv1d import cpu  # loads compiled kernels, so imported when it runs

            return cpu.forward(x, weight, bias, initial_state, segments, silu)
        case "cuda":
            from statespan.ops.causal_conv1d import cuda_backend  # compiles for a GPU, so imported when it runs

            return cuda_backend.forward(x, weight, bias, initial_state, segments, silu)
        case "triton":
            from statespan.ops.causal_conv1d import triton_backend  # imports Triton, so imported when it runs

            return triton_backend.forward(x, weight, bias, initial_state, segments, silu)
        case "torch":
            return torch_backend.causal_conv1d(x, weight, bias, initial_state, segments, silu)
        case _:
            return reference.causal_conv1d(x, weight, bias, initial_state, segments, silu)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    backend: str,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state; that of x is written to `into` [b t d], where it is given."""
    inputs = (x, weight, bias, initial_state, segments)
    name = _resolve(backend, x, weight)
    if name == "cuda":
        from statespan.ops.causal_conv1d import cuda_backend  # compiles for a GPU, so imported when it runs

        return _present(x, *cuda_backend.backward(grad_y, grad_final_state, *inputs, silu, into))
    if grad_final_state is None:
        grad_final_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    if name == "cpu":
        from statespan.ops.causal_conv1d import cpu  # loads compiled kernels, so imported when it runs

        found = cpu.backward(grad_y, grad_final_state, *inputs, silu)
    elif name == "triton":
        from statespan.ops.causal_conv1d import triton_backend  # imports Triton, so imported when it runs

        found = triton_backend.backward(grad_y, grad_final_state, *inputs, silu, into)
    else:
        function = (torch_backend if name == "torch" else reference).causal_conv1d
        found = gradients(
            lambda x, weight, bias, initial_state: function(x, weight, bias, initial_state, segments, silu),
            inputs[:4],
            (grad_y, grad_final_state),
        )
    if into is not None and found[0] is not None and found[0] is not into:
        found = into.copy_(found[0]), *found[1:]
    return _present(x, *found)


def backward_behind(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `backward` of y = silu(conv(x)), whose gradient is grad_y [b t d] + through [b t i] @ matrix [i d].

    grad_y may be overwritten.
    """
    inputs = (x, weight, bias, initial_state, segments)
    if _resolve("auto", x, weight) == "cuda":
        from statespan.ops.causal_conv1d import cuda_backend  # compiles for a GPU, so imported when it runs

        if cuda_backend.takes_product(x, weight, matrix):
            return _present(x, *cuda_backend.backward(grad_y, grad_final_state, *inputs, True, into, through, matrix))
    grad_y.flatten(0, 1).addmm_(through.flatten(0, 1), matrix)
    return backward(grad_y, grad_final_state, *inputs, True, "auto", into)


def _present(x: Tensor, *found: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four gradients, with empty tensors in place of None."""
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)  # type: ignore[return-value]  # four
