"""Forward and backward as CUDA graphs: a replay costs the host one call, however many layers there are.

At small batches the host takes longer to start a layer's kernels than a GPU to run them; graphs take it out of the way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from statespan.errors import UserError

WARM_UPS = 2  # kernels are compiled and chosen before anything is captured


class Captured:
    """`compute(*inputs)`, which adds to the gradients of `module` and returns tensors, captured for each kind of input.

    A kind is the shapes and dtypes of the inputs, and which of them are None. Gradients are added to tensors that stay
    where they are: set them to zero in place, never to None.

    Args:
        module: its parameters get gradients, zero to begin with.
        compute: forward and backward. It must not wait for the GPU, and its control flow must not depend on values.
    """

    def __init__(self, module: nn.Module, compute: Callable[..., Any]) -> None:
        self._compute = compute
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if any(parameter.device.type != "cuda" for parameter in self._parameters):
            raise UserError("run.cuda_graph needs the model on a CUDA device: run.device=cuda")
        self._calls: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], Any]] = {}
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, *inputs: Tensor | None) -> Any:
        """What compute returns, in tensors that the next call of the same kind overwrites."""
        kind = tuple(None if value is None else (value.shape, value.dtype) for value in inputs)
        if kind not in self._calls:
            self._calls[kind] = self._capture(inputs)
        graph, places, outputs = self._calls[kind]
        for place, value in zip(places, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        graph.replay()
        return outputs

    def _capture(
        self, inputs: tuple[Tensor | None, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], Any]:
        places = tuple(None if value is None else value.clone() for value in inputs)
        before = [parameter.grad.clone() for parameter in self._parameters if parameter.grad is not None]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._compute(*places)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter, gradient in zip(self._parameters, before, strict=True):
            assert parameter.grad is not None  # made at the beginning
            parameter.grad.copy_(gradient)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._calls.values()))[0].pool() if self._calls else None
        with torch.cuda.graph(graph, pool=pool):
            outputs = self._compute(*places)
        return graph, places, outputs
