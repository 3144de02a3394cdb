"""Several tokens of each row through half a block, with the state after each token kept: how drafts are verified.

Products see tokens as rows, so that the weights are read once; see verify_conv.cu and verify_update.cu for the rest.
"""

from collections.abc import Callable
from functools import partial
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import silu

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.decode_step import many
from statespan.ops.decode_step.cuda import few_rows, readable
from statespan.ops.decode_step.launch import Launch
from statespan.ops.decode_step.multiply import Multiply, multiplies
from statespan.ops.decode_step.project import TYPES, Gated, Normed, Product
from statespan.ops.decode_step.stream import Stream, product
from statespan.ops.decode_step.update import UPDATE_WARPS
from statespan.ops.decode_step.weights import Mamba1Weights, Mamba2Weights, Projection
from statespan.ops.rms_norm import gated_rms_norm, rms_norm

FEW_TOKENS = 64  # of all rows; beyond, x_proj and dt_proj are a library's products
MOST_TOKENS = 16  # of a row: a thread of the conv holds what it reads of them
F32 = torch.float32
Weights = Mamba1Weights | Mamba2Weights
VerifyCall = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def mamba1(
    w: Mamba1Weights, num_rows: int, num_tokens: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype
) -> VerifyCall | None:
    """The prepared step, see `statespan.ops.decode_step.prepare_verify`."""
    small = [w.norm, w.conv_weight, w.conv_bias, *w.inner_norms]
    dt_weight = w.dt_proj.weight
    aligned = dt_weight.is_contiguous() and dt_weight.data_ptr() % 16 == 0
    if not aligned or not readable([w.in_proj, w.x_proj, w.out_proj], small, [w.dt_bias, w.A_log, w.D]):
        return None
    (channels, states), rank, rows = w.A_log.shape, dt_weight.shape[1], num_rows * num_tokens
    few = few_rows(rows, w.in_proj, w.x_proj, w.out_proj)
    dtype = F32 if few else w.norm.dtype
    into, out = _into(w, rows, hidden_dtype, few), _out(w.out_proj, rows, hidden_dtype, few)
    select, selected_dtype = _select(w, rows, hidden_dtype, few)
    conv = _Convolve(w, num_rows, num_tokens, dtype, conv_dtype)
    steps = _steps(w) if rows > FEW_TOKENS and selected_dtype == F32 else None
    own_rank = rank if steps is None else 0  # the recurrence multiplies itself
    update = _Update(w, num_rows, num_tokens, (dtype, selected_dtype), (1, channels, 1), states, own_rank)

    def step(hidden: Tensor, window: Tensor, state: Tensor, windows: Tensor, states_after: Tensor) -> Tensor:
        projected = into(hidden)
        x, z = projected[:, :channels], projected[:, channels:]
        conv(x, window, windows)
        selected = select(x)
        dt, B, C = (selected[:, skip:] for skip in (0, rank, rank + states))
        y = x.new_empty(rows, channels)
        update(x, z, dt if steps is None else steps(dt[:, :rank]), B, C, state, states_after, y, w.out_proj.weight)
        return out(hidden, y, z)

    return step


def mamba2(
    w: Mamba2Weights, num_rows: int, num_tokens: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype
) -> VerifyCall | None:
    """The prepared step, see `statespan.ops.decode_step.prepare_verify`."""
    small = [w.norm, w.conv_weight, w.conv_bias, w.gate_norm]
    if not readable([w.in_proj, w.out_proj], small, [w.dt_bias, w.A_log, w.D]):
        return None
    inner, heads, conv_size = w.out_proj.weight.shape[1], w.A_log.shape[0], w.conv_weight.shape[0]
    rows, bc_size, states = num_rows * num_tokens, (conv_size - inner) // 2, w.state_size
    few = few_rows(rows, w.in_proj, w.out_proj)
    dtype = F32 if few else w.norm.dtype
    into, out = _into(w, rows, hidden_dtype, few), _out(w.out_proj, rows, hidden_dtype, few, gate=w)
    conv = _Convolve(w, num_rows, num_tokens, dtype, conv_dtype)
    sizes = (heads, inner // heads, heads * states // bc_size)
    update = _Update(w, num_rows, num_tokens, (dtype, dtype), sizes, states)

    def step(hidden: Tensor, window: Tensor, state: Tensor, windows: Tensor, states_after: Tensor) -> Tensor:
        projected = into(hidden)
        x, B, C, dt = (projected[:, inner + skip :] for skip in (0, inner, inner + bc_size, conv_size))
        conv(x, window, windows)
        y = x.new_empty(rows, inner)
        update(x, None, dt, B, C, state, states_after, y, w.out_proj.weight)
        return out(hidden, y, projected[:, :inner])

    return step


def _into(w: Weights, rows: int, hidden_dtype: torch.dtype, few: bool) -> Callable[[Tensor], Tensor]:
    """in_proj of the normalised residual stream."""
    norm = Normed(w.norm, w.norm_epsilon)
    if few:
        return _made(product(w.in_proj, rows, hidden_dtype, before=norm), rows)
    normalize = many.normalizer(norm, rows, hidden_dtype)
    return lambda hidden: many.multiplied(normalize(hidden), w.in_proj)


def _select(
    w: Mamba1Weights, rows: int, hidden_dtype: torch.dtype, few: bool
) -> tuple[Callable[[Tensor], Tensor], torch.dtype]:
    """x_proj, and the dtype of what it gives."""
    if few:
        return _made(Product(w.x_proj, rows, hidden_dtype), rows), F32
    if multiplies(w.x_proj) and w.x_proj.weight.dtype == w.norm.dtype:
        multiplied = Multiply(w.x_proj, rows) if rows <= FEW_TOKENS else partial(wide_product, weight=w.x_proj.weight)
        return multiplied, F32
    return lambda x: many.multiplied(x, w.x_proj), w.norm.dtype


def _steps(w: Mamba1Weights) -> Callable[[Tensor], Tensor] | None:
    """dt_proj of many tokens, whose weights the recurrence would read for each row; None: it must."""
    weight = w.dt_proj.weight
    if not multiplies(w.dt_proj) or weight.dtype != w.norm.dtype:
        return None

    def steps(dt: Tensor) -> Tensor:
        normed = rms_norm(dt, w.inner_norms[0], eps=w.inner_norm_epsilon) if w.inner_norms else dt.to(weight.dtype)
        return wide_product(normed, weight)

    return steps


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, not rounded."""
    return torch.mm(x, weight.t(), out_dtype=F32)


def _out(
    projection: Projection, rows: int, hidden_dtype: torch.dtype, few: bool, gate: Mamba2Weights | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(residual stream, y, z): out_proj of y, gated where that is still to be done, is added to the stream."""
    gated = None
    if gate is not None:
        gated = Gated(gate.gate_norm, gate.gate_norm_epsilon, gate.gate_norm_size, gate.norm_before_gate)
    if few:
        added = product(projection, rows, hidden_dtype, before=gated, add=True)

        def out(hidden: Tensor, y: Tensor, z: Tensor) -> Tensor:
            added(y, hidden, z=None if gated is None else z)
            return hidden

        return out

    def out_of_many(hidden: Tensor, y: Tensor, z: Tensor) -> Tensor:
        if gated is not None and gated.weight is None:
            y = y * silu(z)
        elif gated is not None and gated.weight is not None:
            size, first = gated.group, gated.norm_first
            y = gated_rms_norm(y, z, gated.weight, eps=gated.epsilon, group_size=size, norm_before_gate=first)
        return many.add(hidden, y, projection)

    return out_of_many


def _made(projected: Product | Stream, rows: int) -> Callable[[Tensor], Tensor]:
    """A product of few rows into memory of its own, whose rows begin at multiples of 16 bytes."""
    size = -(-projected.outputs // 4) * 4

    def run(x: Tensor) -> Tensor:
        y = torch.empty(rows, size, dtype=F32, device=x.device)
        projected(x, y)
        return y

    return run


class _Convolve:
    """The conv and SiLU of verify_conv.cu, in place."""

    def __init__(
        self, w: Weights, num_rows: int, num_tokens: int, dtype: torch.dtype, window_dtype: torch.dtype
    ) -> None:
        self._weight, self._bias = weight, _ = w.conv_weight, w.conv_bias
        macros: dict[str, str | int] = {"X": TYPES[dtype], "S": TYPES[window_dtype], "P": TYPES[weight.dtype]}
        macros |= {"TAPS": weight.shape[1], "TOKENS": num_tokens}
        self._launch = Launch("verify_conv", weight.device, (-(-weight.shape[0] // 128), num_rows), 128, macros)

    def __call__(self, x: Tensor, window: Tensor, windows: Tensor) -> None:
        self._launch(x, x.stride(0), window, windows, self._weight, self._bias, self._weight.shape[0])


class _Update:
    """The recurrence of verify_update.cu."""

    def __init__(
        self,
        w: Weights,
        num_rows: int,
        num_tokens: int,
        dtypes: tuple[torch.dtype, torch.dtype],  # of x, z and y, and of dt, B and C
        sizes: tuple[int, int, int],  # heads, channels of a head, heads that share B and C
        states: int,
        rank: int = 0,
    ) -> None:
        self._w, self._sizes = w, sizes
        ssd, norms = isinstance(w, Mamba2Weights), () if isinstance(w, Mamba2Weights) else w.inner_norms
        self._norms = norms or (None, None, None)
        self._dt_proj = Projection(w.D) if isinstance(w, Mamba2Weights) else w.dt_proj
        shared_by = 4 if states <= 16 else 8 if states <= 32 else 16 if states <= 64 else 32
        tile = 4 if ssd and states > 64 else 1
        low, high = w.dt_limit if isinstance(w, Mamba2Weights) else (0.0, inf)
        macros: dict[str, str | int] = {
            **{"X": TYPES[dtypes[0]], "F": TYPES[dtypes[1]], "W": TYPES[self._dt_proj.weight.dtype]},
            **{"P": TYPES[w.norm.dtype], "STATES": states, "SHARED_BY": shared_by, "TILE": tile},
            **{"WARPS": UPDATE_WARPS, "SSD": int(ssd), "RANK": rank, "NORMS": int(bool(norms)), "TOKENS": num_tokens},
            **{"EPSILON": f"{w.inner_norm_epsilon if isinstance(w, Mamba1Weights) else 0.0:.9e}f"},
            **{"DISCRETIZATION": DISCRETIZATIONS[w.discretization]},
            **{"LOW": f"{low:.9e}f", "HIGH": f"{min(high, 3e38):.9e}f"},
        }
        blocks = sizes[0] * -(-sizes[1] // (32 * UPDATE_WARPS // shared_by * tile))
        self._launch = Launch("verify_update", w.norm.device, (blocks, num_rows), 32 * UPDATE_WARPS, macros)

    def __call__(
        self,
        x: Tensor,
        z: Tensor | None,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        states_after: Tensor,
        y: Tensor,
        ahead: Tensor,
    ) -> None:
        """As update.Update, but the state stays and `states_after` [t b ..] are written."""
        of_z = (None, 0) if z is None else (z, z.stride(0))
        self._launch(
            *(x, x.stride(0), *of_z, dt, dt.stride(0), B, B.stride(0), C, C.stride(0)),
            *(self._dt_proj.weight, self._dt_proj.scale, self._w.dt_bias, *self._norms),
            *(self._w.A_log, self._w.D, state, states_after, y, y.stride(0), *self._sizes),
            *(ahead, ahead.nbytes // 16 * 16),
        )
