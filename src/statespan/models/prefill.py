"""Prefiller: chunks of prompts as CUDA graphs, where the host takes longer to launch a forward than a GPU to run it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mlp import MLP
from statespan.layers.state import ModelState
from statespan.models.backbone import Backbone, Block
from statespan.models.capture import capturing
from statespan.models.slabs import Slabs, states_in

# Tokens of the chunks that there are graphs for. However short it is, a graph takes the time of several hundred tokens,
# so a chunk is padded to the next size rather than taken apart.
SIZES = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
MOST_TOKENS = 2048  # of all rows of a chunk together; with more a GPU takes longer than the host


class Prefiller:
    """`start(state)`, `feed(ids, real)` for one chunk after the other, `state()`; under torch.inference_mode().

    A chunk is padded on the left to one of SIZES, and the state lives in its memory, so that a graph serves every
    prompt of about this length. A size that comes for the first time runs as it is, for what is compiled then;
    when it comes again its graph is captured. Not for two threads at once; make a new one when weights were moved.

    Args:
        embedding, backbone: the model's, all of whose blocks are `capturable`.
        hidden_dtype: of the residual stream.
        state: of this model with b rows; only its form counts.
    """

    def __init__(
        self, embedding: nn.Embedding, backbone: Backbone, hidden_dtype: torch.dtype, state: ModelState
    ) -> None:
        self._embedding, self._backbone, self._hidden_dtype = embedding, backbone, hidden_dtype
        tensors = [{} if layer is None else layer.tensors() for layer in state.layers]
        self._slabs = Slabs(tensors, state.batch_size, embedding.weight.device)
        self._memory = states_in(self._slabs, state.layers)
        self._chunks: dict[tuple[int, bool], _Chunk] = {}
        on_gpu = self._slabs.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None

    @staticmethod
    def serves(num_rows: int, num_tokens: int) -> bool:
        """Whether chunks of so many tokens of so many rows are worth a graph."""
        return num_tokens <= SIZES[-1] and num_rows * num_tokens <= MOST_TOKENS

    def start(self, state: ModelState) -> None:
        """Go on from `state`, which is not changed."""
        self._slabs.fill(state.layers)

    def feed(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Feed the next tokens.

        Args:
            ids: [b t] int64 on the CPU.
            real: [b t] bool on the CPU, False where a token is padding, and the last ones are none. None: all are real.

        Returns:
            The residual stream [b 1 h] after the last tokens, overwritten by the next call.
        """
        if real is not None and bool(real.all()):
            real = None
        size = next(size for size in SIZES if size >= ids.shape[1])
        padded = size > ids.shape[1] or real is not None
        if (size, padded) not in self._chunks:
            self._chunks[size, padded] = _Chunk(self, len(ids), size, padded)
        return self._chunks[size, padded](ids, real)

    def state(self) -> ModelState:
        """The state as a value."""
        return states_in(self._slabs.clone(), self._memory.layers)

    @property
    def memory(self) -> ModelState:
        """The state where it lies: what comes next overwrites it."""
        return self._memory

    @property
    def device(self) -> torch.device:
        return self._slabs.device

    @property
    def pool(self) -> Any:
        """The memory that the graphs share."""
        return self._pool

    def run(self, ids: Tensor, segments: Tensor | None) -> Tensor:
        """One forward, from the state in memory to the next one there: the residual stream [b 1 h] after it."""
        hidden = self._embedding(ids).to(self._hidden_dtype)
        hidden, state, _, _ = self._backbone(hidden, self._memory, segments)
        assert state is not None  # a state went in
        self._slabs.fill(state.layers)
        return hidden[:, -1:].clone()


class _Chunk:
    """The forward of chunks of one size, on tensors that stay where they are."""

    def __init__(self, prefiller: Prefiller, num_rows: int, size: int, padded: bool) -> None:
        self._prefiller, self._size = prefiller, size
        self._ids = torch.zeros(num_rows, size, dtype=torch.int64, device=prefiller.device)
        self._segments = torch.zeros_like(self._ids) if padded else None
        self._hidden: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: Tensor, real: Tensor | None) -> Tensor:
        padding = self._size - ids.shape[1]
        _fill(self._ids, F.pad(ids, (padding, 0)))
        if self._segments is not None:
            seen = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            _fill(self._segments, F.pad(seen, (padding, 0)).long() - 1)
        if self._hidden is None or not self._ids.is_cuda:
            self._hidden = self._prefiller.run(self._ids, self._segments)
            return self._hidden
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self._prefiller.pool):
                self._hidden = self._prefiller.run(self._ids, self._segments)
            self._graph = graph  # not before: a capture that fails is tried again
        self._graph.replay()
        return self._hidden


def capturable(block: Block) -> bool:
    """Whether a graph can hold the block: its state keeps its size, and nothing in it waits for the device."""
    return isinstance(block.mixer, Mamba1 | Mamba2) and isinstance(block.feed_forward, MLP | None)


def _fill(target: Tensor, values: Tensor) -> None:
    """Overwrite a tensor, on a GPU without waiting for it."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
