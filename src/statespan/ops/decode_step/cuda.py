"""Decoding steps on NVIDIA GPUs, for CUDA graphs: states are overwritten, and so is the residual stream.

Up to 8 rows, a half block is 2 to 4 kernels that stream the weights; beyond, matrix units multiply and kernels of our
own do the rest. docs/kernels.md has the design and what was measured.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from statespan.ops.decode_step import many
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
    parameters_fit,
)
from statespan.ops.decode_step.stream import product
from statespan.ops.decode_step.update import Update, mamba2_update
from statespan.ops.decode_step.weights import FeedForwardWeights, HeadWeights, Mamba1Weights, Mamba2Weights, Projection

MixerCall = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
ROUTE_WARPS = 16
MOST_READ_AGAIN = 200 << 20  # bytes of experts; beyond, the grouped products, which read each once, are faster


def readable(projections: Sequence[Projection], plain: Sequence[Tensor | None], exact: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these, by 16 bytes: weights, parameters of one type, and float32 others."""
    return all(map(aligned, projections)) and parameters_fit(plain, exact)


def few_rows(rows: int, *projections: Projection) -> bool:
    return rows <= FEW_ROWS and all(fits(projection, rows) for projection in projections)


def mamba1(w: Mamba1Weights, rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype) -> MixerCall | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    projections = [w.in_proj, w.x_proj, w.out_proj]
    small = [w.norm, w.conv_weight, w.conv_bias, *w.inner_norms]
    exact = [w.dt_bias, w.A_log, w.D]
    if not readable(projections, small, exact) or not w.dt_proj.weight.is_contiguous():
        return None
    rank = w.dt_proj.weight.shape[1]
    if rows > FEW_ROWS or not few_rows(rows, *projections) or w.dt_proj.weight.data_ptr() % 16:
        return many.mamba1(w, rows, hidden_dtype, conv_dtype)
    device, (channels, states) = w.norm.device, w.A_log.shape
    new = _scratch(device)
    conv = Convolved(0, w.conv_weight, w.conv_bias, conv_dtype)
    into = product(w.in_proj, rows, hidden_dtype, before=Normed(w.norm, w.norm_epsilon), after=conv)
    select = Product(w.x_proj, rows, hidden_dtype)
    update = Update(w, rows, torch.float32, channels, 1, states, rank=rank)
    out = product(w.out_proj, rows, hidden_dtype, add=True)
    projected, selected, y = new(rows, 2 * channels), new(rows, _padded(rank + 2 * states)), new(rows, channels)
    B, C = selected[:, rank:], selected[:, rank + states :]

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        into(hidden, projected, conv_state=conv_state)
        select(projected, selected, ahead=w.out_proj.weight)
        update(projected, projected[:, channels:], selected, B, C, ssm_state, y)
        out(y, hidden)
        return hidden, conv_state, ssm_state

    return step


def mamba2(w: Mamba2Weights, rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype) -> MixerCall | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    small = [w.norm, w.conv_weight, w.conv_bias, w.gate_norm]
    if not readable([w.in_proj, w.out_proj], small, [w.dt_bias, w.A_log, w.D]):
        return None
    if not few_rows(rows, w.in_proj, w.out_proj):
        return many.mamba2(w, rows, hidden_dtype, conv_dtype)
    inner = w.out_proj.weight.shape[1]
    update = mamba2_update(w, rows, torch.float32)
    new = _scratch(w.norm.device)
    conv = Convolved(inner, w.conv_weight, w.conv_bias, conv_dtype)
    into = product(w.in_proj, rows, hidden_dtype, before=Normed(w.norm, w.norm_epsilon), after=conv)
    gate = Gated(w.gate_norm, w.gate_norm_epsilon, w.gate_norm_size, w.norm_before_gate)
    out = product(w.out_proj, rows, hidden_dtype, before=gate, add=True)
    projected, y = new(rows, _padded(w.in_proj.weight.shape[0])), new(rows, inner)

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        into(hidden, projected, conv_state=conv_state)
        update(projected, ssm_state, y, w.out_proj.weight)
        out(y, hidden, z=projected)
        return hidden, conv_state, ssm_state

    return step


def feed_forward(w: FeedForwardWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    few = readable([w.up_proj, w.down_proj], [w.norm], []) and rows <= FEW_ROWS
    top_k = 0 if w.router is None else w.router.top_k
    few = few and _read_again(w, rows) <= MOST_READ_AGAIN
    if few and few_rows(rows, w.up_proj) and few_rows(top_k or rows, w.down_proj):
        return _experts(w, rows, hidden_dtype) if top_k else _dense(w, rows, hidden_dtype)
    return None if top_k else many.feed_forward(w, rows, hidden_dtype)


def _read_again(w: FeedForwardWeights, rows: int) -> float:
    """Bytes of experts that several rows choose, at random choices: each row reads its own experts."""
    if w.router is None:
        return 0.0
    count, top_k = w.router.weight.shape[0], w.router.top_k
    different = count * (1 - (1 - top_k / count) ** rows)
    return (rows * top_k - different) * (w.up_proj.weight[0].nbytes + w.down_proj.weight[0].nbytes)


def _dense(w: FeedForwardWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    up = product(w.up_proj, rows, hidden_dtype, before=Normed(w.norm, w.norm_epsilon), after=w.activation)
    down = product(w.down_proj, rows, hidden_dtype, add=True)
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
    if not readable([w.projection], [w.norm], []):
        return None
    if not few_rows(rows, w.projection):
        return many.head(w, rows, hidden_dtype)
    before = Normed(w.norm, w.norm_epsilon)
    logits_of = product(w.projection, rows, hidden_dtype, before=before, outputs=w.outputs)

    def step(hidden: Tensor) -> Tensor:
        logits = torch.empty(rows, w.outputs, dtype=torch.float32, device=hidden.device)
        logits_of(hidden, logits)
        return logits

    return step


def _scratch(device: torch.device) -> Callable[[int, int], Tensor]:
    def new(rows: int, size: int) -> Tensor:
        return torch.empty(rows, size, dtype=torch.float32, device=device)

    return new


def _padded(size: int) -> int:
    """Rows of scratch memory begin at multiples of 16 bytes."""
    return -(-size // 4) * 4
