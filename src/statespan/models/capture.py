"""Recording a CUDA graph, and what it is good for."""

import gc
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakMethod

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")

_turn = threading.RLock()  # PyTorch has one stream for the captures of all threads


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Generator[None]:
    """What is launched inside becomes `graph`; graphs of one `pool`, a graph_pool_handle, share its memory.

    Threads take turns. What fails inside leaves a graph that cannot be replayed.
    """
    with _turn:
        gc_was_enabled = gc.isenabled()
        gc.disable()  # an old graph that is collected now would end the capture
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        finally:
            if gc_was_enabled:
                gc.enable()


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Where all weights and buffers are: a graph holds these, and reads there what a training step left."""
    found: list[int] = []
    modules = [module]
    for each in modules:  # parameters() and buffers() take ten times as long
        fields = vars(each)
        found += (x.data_ptr() for kind in ("_parameters", "_buffers") for x in fields[kind].values() if x is not None)
        modules += (child for child in fields["_modules"].values() if child is not None)
    return tuple(found)


def weakly(method: Callable[P, R]) -> Callable[P, R]:
    """A bound method that does not keep its object, which whoever calls it holds.

    For what a decoder or a graph keeps: else these would keep the model, or stay in a circle with their owner, weights
    and all, until Python looks for circles.
    """
    own = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        found = own()
        assert found is not None  # the caller holds it
        return found(*args, **kwargs)

    return call
