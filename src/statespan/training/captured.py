"""Forward and backward as CUDA graphs: a replay costs the host one call, however many layers there are.

At small batches the host takes longer to start a layer's kernels than a GPU to run them; graphs take it out of the way.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statespan.errors import UserError
from statespan.models.capture import capturing

WARM_UPS = 2  # kernels are compiled and chosen before anything is captured
preparing = threading.RLock()  # threads that train side by side warm up and capture one after the other
_thread = threading.local()


def _stream() -> torch.cuda.Stream:
    """This thread's own, to warm up and capture on.

    A graph keeps the cuBLAS workspace of the stream it was captured on: graphs that run side by side must not share it.
    PyTorch hands out 32 streams of a priority in turns; this priority is nobody else's.
    """
    if not hasattr(_thread, "stream"):
        _thread.stream = torch.cuda.Stream(priority=-1)
    return _thread.stream


@contextmanager
def warming_up() -> Generator[None]:
    """Run what comes before a capture on the stream of the capture, between what the current stream does."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Generator[None]:
    """Capture what is launched on the current stream; other threads go on with work of their own meanwhile."""
    with preparing, capturing(graph, pool, _stream()):
        yield


@dataclass
class _Call:
    """A captured call: where its inputs lie, what it returns, and the gradients that it writes, one a parameter."""

    graph: torch.cuda.CUDAGraph
    places: tuple[Tensor | None, ...]
    outputs: Any
    gradients: list[Tensor | None]


class Captured:
    """`compute(*inputs)`, which gives gradients to `module` and returns tensors, captured for each kind of input.

    A kind is the shapes and dtypes of the inputs, and which of them are None. As without graphs, gradients are added to
    those that are there, and new where they are None, as `zero_grad()` leaves them. New ones always lie in the same
    tensors: a first call writes them where it computes them, neither zeros nor sums are needed, and their memory
    serves the activations while there are none.

    Args:
        module: its parameters get gradients.
        compute: forward and backward. It must not wait for the GPU, and its control flow must not depend on values.
    """

    def __init__(self, module: nn.Module, compute: Callable[..., Any]) -> None:
        self._compute = compute
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if any(parameter.device.type != "cuda" for parameter in self._parameters):
            raise UserError("run.cuda_graph needs the model on a CUDA device: run.device=cuda")
        self._calls: dict[Any, _Call] = {}
        self._gradients: list[Tensor | None] | None = None  # the tensors that all graphs write to

    def __call__(self, *inputs: Tensor | None) -> Any:
        """What compute returns, in tensors that the next call overwrites: graphs share their memory."""
        new = all(parameter.grad is None for parameter in self._parameters)
        kind = (new, *(None if value is None else (value.shape, value.dtype) for value in inputs))
        if kind not in self._calls:
            with preparing:
                self._calls[kind] = self._capture(inputs, new)
        call = self._calls[kind]
        for place, value in zip(call.places, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        if new:  # the host sets the gradients while the GPU computes them
            call.graph.replay()
        for parameter, gradient in zip(self._parameters, call.gradients, strict=True):
            if gradient is None or parameter.grad is gradient:
                continue
            if not new:  # what came from elsewhere goes where the graph adds to it
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if not new:
            call.graph.replay()
        return call.outputs

    def _capture(self, inputs: tuple[Tensor | None, ...], new: bool) -> _Call:
        places = tuple(None if value is None else value.clone() for value in inputs)
        graph, first = torch.cuda.CUDAGraph(), not self._calls
        pool = None if first else next(iter(self._calls.values())).graph.pool()
        before = self._shown()
        try:
            with warming_up():
                for _ in range(WARM_UPS):
                    self._show([None] * len(before))
                    self._compute(*places)
            into = before if self._gradients is None else self._gradients
            if not (first and new):  # it adds to what is there, and memory of a graph's own is written by others, too
                into = list(map(_or_zeros, into, self._shown()))
            self._show(into)
            with capture(graph, pool):
                if new:
                    for gradient in into:
                        if gradient is not None:
                            gradient.zero_()
                outputs = self._compute(*places)
            gradients = self._gradients = self._shown()
        finally:
            self._show(before)
        return _Call(graph, places, outputs, gradients)

    def _shown(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._parameters]

    def _show(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


def _or_zeros(place: Tensor | None, like: Tensor | None) -> Tensor | None:
    return torch.zeros_like(like) if place is None and like is not None else place
