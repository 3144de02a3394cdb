"""Decoding steps on NVIDIA GPUs, for CUDA graphs: states are overwritten, and so is the residual stream.

Up to 8 rows, a half block is 2 to 4 kernels that stream the weights; beyond, matrix units multiply and kernels of our
own do the rest. docs/kernels.md has the design and what was measured.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from statespan.ops.activation import activate
from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.decode_step.launch import Launch
from statespan.ops.decode_step.project import (
    FEW_ROWS,
    TYPES,
    Chosen,
    Convolved,
    Gated,
    Normed,
    Product,
    aligned,
    fits,
)
from statespan.ops.decode_step.weights import FeedForwardWeights, HeadWeights, Mamba1Weights, Mamba2Weights, Projection
from statespan.ops.linear import linear
from statespan.ops.rms_norm import gated_rms_norm, rms_norm

MixerCall = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
UPDATE_WARPS = 4
ROUTE_WARPS = 16


def _runs(projections: Sequence[Projection], plain: Sequence[Tensor | None], exact: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these: weights by 16 bytes, parameters of one type without gaps, float32 others."""
    there = [weight for weight in plain if weight is not None]
    return (
        all(map(aligned, projections))
        and all(weight.is_contiguous() and weight.dtype in TYPES for weight in there)
        and len({weight.dtype for weight in there}) <= 1
        and all(value.is_contiguous() and value.dtype == torch.float32 for value in exact)
    )


def _few(rows: int, *projections: Projection) -> bool:
    return rows <= FEW_ROWS and all(fits(projection, rows) for projection in projections)


def mamba1(w: Mamba1Weights, rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype) -> MixerCall | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    projections = [w.in_proj, w.x_proj, w.out_proj]
    small = [w.norm, w.conv_weight, w.conv_bias, *w.inner_norms]
    exact = [w.dt_bias, w.A_log, w.D]
    if not _runs(projections, small, exact) or not w.dt_proj.weight.is_contiguous():
        return None
    rank = w.dt_proj.weight.shape[1]
    if rows > FEW_ROWS or not _few(rows, *projections) or w.dt_proj.weight.data_ptr() % 16:
        return _mamba1_many(w, rows, conv_dtype)
    device, (channels, states) = w.norm.device, w.A_log.shape
    new = _scratch(device)
    conv = Convolved(0, w.conv_weight, w.conv_bias, conv_dtype)
    into = Product(w.in_proj, rows, hidden_dtype, before=Normed(w.norm, w.norm_epsilon), after=conv)
    select = Product(w.x_proj, rows, hidden_dtype)
    update = Update(w, rows, torch.float32, channels, 1, states, rank=rank)
    out = Product(w.out_proj, rows, hidden_dtype, add=True)
    projected, selected, y = new(rows, 2 * channels), new(rows, _padded(rank + 2 * states)), new(rows, channels)
    B, C = selected[:, rank:], selected[:, rank + states :]

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        into(hidden, projected, conv_state=conv_state)
        select(projected, selected, ahead=w.out_proj.weight)
        update(projected, projected[:, channels:], selected, B, C, ssm_state, y)
        out(y, hidden)
        return hidden, conv_state, ssm_state

    return step


def _mamba1_many(w: Mamba1Weights, rows: int, conv_dtype: torch.dtype) -> MixerCall:
    (channels, states), rank = w.A_log.shape, w.dt_proj.weight.shape[1]
    update = Update(w, rows, w.norm.dtype, channels, 1, states)
    convolve = Convolve(Convolved(0, w.conv_weight, w.conv_bias, conv_dtype), rows, w.norm.dtype)

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = _linear(rms_norm(hidden, w.norm, eps=w.norm_epsilon), w.in_proj)
        convolve(projected[:, :channels], conv_state)
        x, z = projected[:, :channels], projected[:, channels:]
        dt, B, C = _linear(x, w.x_proj).split([rank, states, states], dim=1)
        if w.inner_norms:
            pairs = zip((dt, B, C), w.inner_norms, strict=True)
            dt, B, C = (rms_norm(value, norm, eps=w.inner_norm_epsilon) for value, norm in pairs)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        update(x, z, _linear(dt, w.dt_proj), B, C, ssm_state, y)
        return _add(hidden, y, w.out_proj), conv_state, ssm_state

    return step


def mamba2(w: Mamba2Weights, rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype) -> MixerCall | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    small = [w.norm, w.conv_weight, w.conv_bias, w.gate_norm]
    if not _runs([w.in_proj, w.out_proj], small, [w.dt_bias, w.A_log, w.D]):
        return None
    inner, heads, conv_size = w.out_proj.weight.shape[1], w.A_log.shape[0], w.conv_weight.shape[0]
    bc_size = (conv_size - inner) // 2
    few = rows <= FEW_ROWS and _few(rows, w.in_proj, w.out_proj)
    dtype = torch.float32 if few else w.norm.dtype
    update = Update(w, rows, dtype, inner // heads, heads, w.state_size, group_heads=heads * w.state_size // bc_size)

    def recur(projected: Tensor, y: Tensor, ssm_state: Tensor) -> None:
        x, B, C = (projected[:, inner + skip :] for skip in (0, inner, inner + bc_size))
        ahead = w.out_proj.weight if few else None
        update(x, None, projected[:, inner + conv_size :], B, C, ssm_state, y, ahead=ahead)

    if not few:
        return _mamba2_many(w, rows, conv_dtype, recur)
    new = _scratch(w.norm.device)
    conv = Convolved(inner, w.conv_weight, w.conv_bias, conv_dtype)
    into = Product(w.in_proj, rows, hidden_dtype, before=Normed(w.norm, w.norm_epsilon), after=conv)
    gate = Gated(w.gate_norm, w.gate_norm_epsilon, w.gate_norm_size, w.norm_before_gate)
    out = Product(w.out_proj, rows, hidden_dtype, before=gate, add=True)
    projected, y = new(rows, _padded(w.in_proj.weight.shape[0])), new(rows, inner)

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        into(hidden, projected, conv_state=conv_state)
        recur(projected, y, ssm_state)
        out(y, hidden, z=projected)
        return hidden, conv_state, ssm_state

    return step


def _mamba2_many(
    w: Mamba2Weights,
    rows: int,
    conv_dtype: torch.dtype,
    recur: Callable[[Tensor, Tensor, Tensor], None],
) -> MixerCall:
    inner = w.out_proj.weight.shape[1]
    conv_size = w.conv_weight.shape[0]
    convolve = Convolve(Convolved(inner, w.conv_weight, w.conv_bias, conv_dtype), rows, w.norm.dtype)

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = _linear(rms_norm(hidden, w.norm, eps=w.norm_epsilon), w.in_proj)
        convolve(projected[:, inner : inner + conv_size], conv_state)
        z = projected[:, :inner]
        y = torch.empty_like(z, memory_format=torch.contiguous_format)
        recur(projected, y, ssm_state)
        if w.gate_norm is None:
            y = y * torch.nn.functional.silu(z)
        else:
            size, first = w.gate_norm_size, w.norm_before_gate
            y = gated_rms_norm(y, z, w.gate_norm, eps=w.gate_norm_epsilon, group_size=size, norm_before_gate=first)
        return _add(hidden, y, w.out_proj), conv_state, ssm_state

    return step


def feed_forward(w: FeedForwardWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    few = _runs([w.up_proj, w.down_proj], [w.norm], []) and rows <= FEW_ROWS
    top_k = 0 if w.router is None else w.router.top_k
    if few and _few(rows, w.up_proj) and _few(top_k or rows, w.down_proj):
        return _experts(w, rows, hidden_dtype) if top_k else _dense(w, rows, hidden_dtype)
    if top_k:
        return None

    def step(hidden: Tensor) -> Tensor:
        inner = _linear(rms_norm(hidden, w.norm, eps=w.norm_epsilon), w.up_proj)
        return _add(hidden, activate(inner, w.activation), w.down_proj)

    return step


def _dense(w: FeedForwardWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    up = Product(w.up_proj, rows, hidden_dtype, before=Normed(w.norm, w.norm_epsilon), after=w.activation)
    down = Product(w.down_proj, rows, hidden_dtype, add=True)
    inner = _scratch(w.norm.device)(rows, w.down_proj.weight.shape[1])

    def step(hidden: Tensor) -> Tensor:
        up(hidden, inner)
        down(inner, hidden)
        return hidden

    return step


def _experts(w: FeedForwardWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    router, device = w.router, w.norm.device
    assert router is not None
    if router.weight.dtype not in TYPES or not router.weight.is_contiguous():
        return None
    (count, inputs), top_k = router.weight.shape, router.top_k
    macros: dict[str, str | int] = {
        **{"H": TYPES[hidden_dtype], "P": TYPES[w.norm.dtype], "R": TYPES[router.weight.dtype], "INPUTS": inputs},
        **{
            "EXPERTS": count,
            "CHOICES": top_k,
            "WARPS": ROUTE_WARPS,
            "SIGMOID": int(router.score_function == "sigmoid"),
        },
        **{"RENORMALIZE": int(router.renormalize), "EPSILON": f"{w.norm_epsilon:.9e}f"},
    }
    route = Launch("route", device, (rows, 1), 32 * ROUTE_WARPS, macros, 4 * (inputs + count))
    up_choice, down_choice = Chosen(top_k, summed=False), Chosen(top_k, summed=True)
    before = Normed(w.norm, w.norm_epsilon)
    up = Product(w.up_proj, rows, hidden_dtype, before=before, after=w.activation, experts=up_choice)
    down = Product(w.down_proj, rows, hidden_dtype, add=True, experts=down_choice)
    new = _scratch(device)
    inner, weight = new(rows * top_k, w.down_proj.weight.shape[2]), new(rows, top_k)
    chosen = torch.empty(rows, top_k, dtype=torch.int32, device=device)
    bias = None if router.bias is None else router.bias.to(router.weight.dtype)

    def step(hidden: Tensor) -> Tensor:
        route(hidden, hidden.stride(0), w.norm, router.weight, bias, chosen, weight)
        up(hidden, inner, chosen=chosen)
        down(inner, hidden, chosen=chosen, expert_weight=weight)
        return hidden

    return step


def head(w: HeadWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    if not _runs([w.projection], [w.norm], []) or not _few(rows, w.projection):
        return None
    before = Normed(w.norm, w.norm_epsilon)
    product = Product(w.projection, rows, hidden_dtype, before=before, outputs=w.outputs)

    def step(hidden: Tensor) -> Tensor:
        logits = torch.empty(rows, w.outputs, dtype=torch.float32, device=hidden.device)
        product(hidden, logits)
        return logits

    return step


class Update:
    """The recurrence of update.cu, in place."""

    def __init__(
        self,
        w: Mamba1Weights | Mamba2Weights,
        rows: int,
        dtype: torch.dtype,
        head_size: int,
        heads: int,
        states: int,
        *,
        rank: int = 0,
        group_heads: int = 1,
    ) -> None:
        ssd = isinstance(w, Mamba2Weights)
        self._w, self._heads, self._sizes = w, heads, (heads, head_size, group_heads)
        norms = () if isinstance(w, Mamba2Weights) or rank == 0 else w.inner_norms
        self._norms = norms or (None, None, None)
        self._dt_proj = w.dt_proj if isinstance(w, Mamba1Weights) and rank else Projection(w.D)
        shared_by = 4 if states <= 16 else 8 if states <= 32 else 16 if states <= 64 else 32
        tile = 4 if ssd and states > 64 else 1
        low, high = w.dt_limit if isinstance(w, Mamba2Weights) else (0.0, float("inf"))
        macros: dict[str, str | int] = {
            **{"X": TYPES[dtype], "W": TYPES[self._dt_proj.weight.dtype], "P": TYPES[w.norm.dtype], "STATES": states},
            **{"SHARED_BY": shared_by, "TILE": tile, "WARPS": UPDATE_WARPS, "SSD": int(ssd), "RANK": rank},
            **{"NORMS": int(bool(norms)), "DISCRETIZATION": DISCRETIZATIONS[w.discretization]},
            **{"EPSILON": f"{w.inner_norm_epsilon if isinstance(w, Mamba1Weights) else 0.0:.9e}f"},
            **{"LOW": f"{low:.9e}f", "HIGH": f"{min(high, 3e38):.9e}f"},
        }
        tiles = -(-head_size // (32 * UPDATE_WARPS // shared_by * tile))
        self._launch = Launch("update", w.norm.device, (heads * tiles, rows), 32 * UPDATE_WARPS, macros)

    def __call__(
        self,
        x: Tensor,
        z: Tensor | None,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        y: Tensor,
        ahead: Tensor | None = None,
    ) -> None:
        """x, z and y [rows channels], dt what dt_proj is fed or what it gave, B and C [rows groups * states]."""
        of_z = (None, 0) if z is None else (z, z.stride(0))
        self._launch(
            *(x, x.stride(0), *of_z, dt, dt.stride(0), B, B.stride(0), C, C.stride(0)),
            *(self._dt_proj.weight, self._dt_proj.scale, self._w.dt_bias, *self._norms),
            *(self._w.A_log, self._w.D, state, y, y.stride(0), *self._sizes),
            *(ahead, 0 if ahead is None else ahead.nbytes // 16 * 16),
        )


class Convolve:
    """The conv and SiLU of convolve.cu, in place."""

    def __init__(self, conv: Convolved, rows: int, dtype: torch.dtype) -> None:
        self._weight, self._bias = weight, _ = conv.weight, conv.bias
        macros: dict[str, str | int] = {"X": TYPES[dtype], "S": TYPES[conv.state_dtype], "P": TYPES[weight.dtype]}
        grid = (-(-weight.shape[0] // 128), rows)
        self._launch = Launch("convolve", weight.device, grid, 128, macros | {"TAPS": weight.shape[1]})

    def __call__(self, x: Tensor, window: Tensor) -> None:
        self._launch(x, x.stride(0), window, self._weight, self._bias, self._weight.shape[0])


def _linear(x: Tensor, projection: Projection) -> Tensor:
    return linear(x, projection.weight, projection.bias, scale=projection.scale)


def _add(hidden: Tensor, x: Tensor, projection: Projection) -> Tensor:
    """hidden += W x"""
    if projection.scale is None and projection.bias is None and hidden.dtype == projection.weight.dtype:
        return hidden.addmm_(x, projection.weight.t())
    return hidden.add_(_linear(x, projection))


def _scratch(device: torch.device) -> Callable[[int, int], Tensor]:
    def new(rows: int, size: int) -> Tensor:
        return torch.empty(rows, size, dtype=torch.float32, device=device)

    return new


def _padded(size: int) -> int:
    """Rows of scratch memory begin at multiples of 16 bytes."""
    return -(-size // 4) * 4
