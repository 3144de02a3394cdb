"""How `project.cu` is compiled and how its work is divided, for one product of a decoding step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.ops.decode_step.launch import Launch
from statespan.ops.decode_step.weights import Projection
from statespan.ops.gpu import multiprocessors, shared_memory

TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}
ACTIVATIONS = {"silu": 0, "relu": 1, "gelu": 2, "swiglu": 0, "geglu": 2}
FEW_ROWS = 8
WARPS = 8
BLOCKS = 2  # of a multiprocessor
LOADS = 8  # of 16 bytes, that a lane has in its ring; twice as many for one row
LOAD_BYTES = 16 * 32 * WARPS
RING_BYTES = LOADS * LOAD_BYTES
OWN_BYTES = 4 << 10  # of shared memory, for sums and factors, at most


@dataclass(frozen=True)
class Normed:
    """x is RMSNorm(x) of the residual stream."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Gated:
    """x is y silu(z), normalised in groups of so many channels where there is a weight."""

    weight: Tensor | None
    epsilon: float
    group: int
    norm_first: bool


@dataclass(frozen=True)
class Convolved:
    """A causal conv and SiLU of the outputs from `start` on, over a window in memory."""

    start: int
    weight: Tensor  # [c k]
    bias: Tensor | None
    state_dtype: torch.dtype


@dataclass(frozen=True)
class Chosen:
    """A product for each choice of a batch row, or summed over them."""

    top_k: int
    summed: bool


def based(parameter: Tensor) -> bool:
    """Whether it has no gaps and begins at a multiple of 16 bytes: a view into memory of many may not."""
    return parameter.is_contiguous() and parameter.data_ptr() % 16 == 0


def parameters_fit(plain: Sequence[Tensor | None], exact: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these by 16 bytes: parameters of one type, and float32 others."""
    there = [parameter for parameter in plain if parameter is not None]
    return (
        all(based(parameter) and parameter.dtype in TYPES for parameter in there)
        and len({parameter.dtype for parameter in there}) <= 1
        and all(based(value) and value.dtype == torch.float32 for value in exact)
    )


def aligned(projection: Projection) -> bool:
    """Whether the kernel can read the weights, 16 bytes at a time."""
    weight = projection.weight
    return (
        weight.dtype in TYPES
        and based(weight)
        and weight.shape[-1] * weight.element_size() % 16 == 0
        and weight.shape[-1] % 4 == 0
    )


def macros_of(
    projection: Projection,
    rows: int,
    hidden_dtype: torch.dtype,
    before: Normed | Gated | None,
    after: Convolved | str | None,
    add: bool,
) -> dict[str, str | int]:
    """What project.cu and stream.cu are compiled with, but for the division of their work."""
    weight, bias = projection.weight, projection.bias
    conv = after if isinstance(after, Convolved) else None
    norm = None if before is None else before.weight
    plain = conv.weight if norm is None and conv else norm
    pairs = after in ("swiglu", "geglu")
    return {
        **{"W": TYPES[weight.dtype], "H": TYPES[hidden_dtype], "P": "float" if plain is None else TYPES[plain.dtype]},
        **{"Q": "float" if bias is None else TYPES[bias.dtype], "S": TYPES[conv.state_dtype] if conv else "float"},
        **{"INPUTS": weight.shape[-1], "BATCH": rows},
        **{"INPUT": 1 if isinstance(before, Normed) else 2 if before else 0},
        **{"GROUP": before.group if isinstance(before, Gated) and norm is not None else 0},
        **{"OUTPUT": 1 if conv else 2 if add else 3 if pairs else 4 if after else 0},
        **{"TAPS": conv.weight.shape[1] if conv else 1, "ACTIVATION": ACTIVATIONS.get(str(after), 0)},
        **{"EPSILON": f"{before.epsilon if before else 0.0:.9e}f"},
        **{"NORM_FIRST": int(isinstance(before, Gated) and before.norm_first)},
    }


class Product:
    """y = W x of one projection, with what happens before and after: see project.cu."""

    def __init__(
        self,
        projection: Projection,
        rows: int,
        hidden_dtype: torch.dtype,
        *,
        before: Normed | Gated | None = None,
        after: Convolved | str | None = None,  # an activation's name
        add: bool = False,  # to the residual stream
        experts: Chosen | None = None,
        outputs: int | None = None,  # only the first of them
    ) -> None:
        weight = projection.weight
        total, inputs = weight.shape[-2:]
        self.projection, self.before, self.after = projection, before, after
        self.outputs = outputs or total
        pairs = after in ("swiglu", "geglu")
        summed = experts.top_k if experts is not None and experts.summed else 1
        plan = Plan(self.outputs // (2 if pairs else 1), inputs, weight, 1 if experts else rows, pairs, summed)
        macros = {
            **macros_of(projection, rows, hidden_dtype, before, after, add),
            **{"EXPERTS": 0 if experts is None else 2 if experts.summed else 1},
            **{"CHOICES": experts.top_k if experts else 1},
            **plan.macros,
        }
        along = rows * (experts.top_k // summed) if experts else 1
        self._launch = Launch("project", weight.device, (plan.blocks, along), 32 * WARPS, macros, plan.shared_bytes)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        z: Tensor | None = None,
        conv_state: Tensor | None = None,
        chosen: Tensor | None = None,
        expert_weight: Tensor | None = None,
        ahead: Tensor | None = None,
    ) -> None:
        """x and y are [rows ..], z as x; conv_state is overwritten; `ahead` are weights to be brought to L2."""
        p, conv = self.projection, self.after if isinstance(self.after, Convolved) else None
        norm = None if self.before is None else self.before.weight
        self._launch(
            *(p.weight, p.scale, p.bias, x, x.stride(0), z, 0 if z is None else z.stride(0), norm),
            *(y, y.stride(0), self.outputs, conv_state),
            *((None, None, 0, 0) if conv is None else (conv.weight, conv.bias, conv.start, conv.weight.shape[0])),
            *(chosen, expert_weight, ahead, 0 if ahead is None else ahead.nbytes // 16 * 16),
        )


class Plan:
    """Rows at a time, the ring's depth, warps that share a row, and blocks."""

    def __init__(self, made: int, inputs: int, weight: Tensor, rows: int, pairs: bool, summed: int) -> None:
        span = 32 * 16 // weight.element_size()
        chunks = -(-inputs // span)
        processors = multiprocessors(weight.device)
        warps = BLOCKS * WARPS * processors  # that run at once
        together = 2 if rows > 1 or chunks < 5 else 1  # output rows; pairs of them where they come in pairs
        at_a_time = max(2, together) if pairs else together
        share = 1
        while share < WARPS and 2 * share <= chunks * summed and made * share * 2 <= warps:
            share *= 2
        blocks = -(-made * (2 if pairs else 1) * share // (at_a_time * WARPS))
        turns = -(-blocks // (BLOCKS * processors))
        self.blocks = -(-blocks // turns)
        x_bytes = 4 * max(rows, summed) * chunks * span
        deeper = rows == 1 and x_bytes + 2 * RING_BYTES + OWN_BYTES <= shared_memory(weight.device) // BLOCKS
        loads = 2 * LOADS if deeper else LOADS
        self.shared_bytes = x_bytes + loads * LOAD_BYTES
        self.macros: dict[str, str | int] = {
            "J": at_a_time,
            "DEPTH": loads // at_a_time,
            "SPLIT": share,
            "WARPS": WARPS,
        }


def fits(projection: Projection, rows: int) -> bool:
    """Whether rows of x, or choices of experts, fit into shared memory."""
    inputs, size = projection.weight.shape[-1], projection.weight.element_size()
    room = shared_memory(projection.weight.device) - RING_BYTES - OWN_BYTES
    return 4 * rows * (inputs + 512 // size) <= room
