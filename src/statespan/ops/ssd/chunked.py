"""SSD as matrix products over chunks of time (Mamba-2, arXiv 2405.21060, section 6), for any device.

Inside a chunk of q tokens, with decays a, scores G_ij = C_i . B_j and scaled inputs w_j = scale_j x_j:
    y_i = sum_{j <= i} (a_i ... a_{j+1}) G_ij w_j  +  (a_i ... a_1) h C_i
    h'  = (a_q ... a_1) h + sum_j (a_q ... a_{j+1}) w_j B_j^T
where h is the state at the chunk's start and h' at its end. One chunk follows the other, so that its [q q] matrices
stay in the processor's cache. Nothing but the inputs is kept for the backward: it computes the states again, then the
matrices, from the last chunk to the first.

Heads are [g r], r heads in each of g groups; the heads of a group are columns of one product, so B and C are never
repeated. Products are taken in x's dtype; decays, states and sums in float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor

from statespan.ops.custom_op import gradients
from statespan.ops.ssd.decay import Chunk, steps
from statespan.ops.ssd.inputs import Inputs, Options

CPU_CHUNK = 64  # tokens at the most, on the CPU: longer chunks make fewer states and more [q q] work


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """y [b t h p] and the final state [b h p n] of `statespan.ops.ssd`."""
    rows = _Rows(inputs, options)
    state = rows.state
    y = inputs.x.new_empty(inputs.x.shape)
    out = _time_third(y, rows.groups)
    for chunk in rows.chunks:
        x, B, C = rows.cut(chunk)
        matrix = chunk.within().mul_(_scores(chunk, B, C)).to(B.dtype)
        part = _times_state(C, state) * chunk.from_start
        part += (matrix @ (x * chunk.scale).to(B.dtype).transpose(2, 3)).transpose(2, 3)
        chunk.cut(out).copy_(part if rows.D is None else torch.addcmul(part, x, rows.D))
        state = _next_state(chunk, state, x, B)
    if inputs.segments is not None:
        y.masked_fill_((inputs.segments < 0)[..., None, None], 0.0)
    return y, state.flatten(1, 2)


def backward(grad_y: Tensor, grad_state: Tensor, inputs: Inputs, options: Options) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state; None where the input is None."""
    rows = _Rows(inputs, options)
    if inputs.segments is not None:
        grad_y = grad_y.masked_fill((inputs.segments < 0)[..., None, None], 0.0)
    grad_y, grad_state = _time_third(grad_y, rows.groups), grad_state.to(rows.dtype).reshape(rows.state.shape)
    grad_x, grad_B, grad_C = (tensor.new_empty(tensor.shape) for tensor in (inputs.x, inputs.B, inputs.C))
    grad_log_decay, grad_scale = grad_y.new_empty(2, *inputs.dt.shape, dtype=rows.dtype)
    grad_D = grad_y.new_zeros(rows.state.shape[1:4], dtype=rows.dtype)  # [g r p]
    wholes = [_time_third(whole, rows.groups) for whole in (grad_x, grad_log_decay[..., None], grad_scale[..., None])]
    wholes += [grad_B.transpose(1, 2), grad_C.transpose(1, 2)]

    states = [rows.state]
    for chunk in rows.chunks[:-1]:
        x, B, _ = rows.cut(chunk)
        states.append(_next_state(chunk, states[-1], x, B))
    for chunk in reversed(rows.chunks):
        x, B, C = rows.cut(chunk)
        grad_out = chunk.cut(grad_y)
        *parts, grad_state = _chunk_backward(chunk, x, B, C, states.pop(), grad_out, grad_state)
        if rows.D is not None:
            parts[0] = torch.addcmul(parts[0], grad_out, rows.D)
            grad_D += (x * grad_out).sum((0, 2))
        for whole, part in zip(wholes, parts, strict=True):
            chunk.cut(whole).copy_(part)

    def log_decay_and_scale(dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        found = steps(dt, A, dt_bias, inputs.segments, options, rows.dtype)
        return found.log_decay, found.scale

    grad_dt, grad_A, grad_dt_bias = gradients(
        log_decay_and_scale, (inputs.dt, inputs.A, inputs.dt_bias), (grad_log_decay, grad_scale)
    )
    return (
        grad_x,
        grad_dt,
        grad_A,
        grad_B,
        grad_C,
        None if inputs.D is None else _sum_to(grad_D.flatten(0, 1), inputs.D),
        grad_dt_bias,
        None if inputs.initial_state is None else grad_state.flatten(1, 2).to(inputs.initial_state.dtype),
    )


def _chunk_backward(
    chunk: Chunk, x: Tensor, B: Tensor, C: Tensor, state: Tensor, grad_y: Tensor, grad_state: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x (less D's part), log_decay, scale, B, C and the state before the chunk."""
    # y = matrix @ source with matrix = within * scores
    scores, within = _scores(chunk, B, C), chunk.within()
    grad_rows = grad_y.transpose(2, 3)  # [b g r q p]
    pairs = (grad_rows @ (x * chunk.scale).to(B.dtype).permute(0, 1, 3, 4, 2)) * within
    grad_scores = chunk.mask_(pairs.sum(2)).to(B.dtype)
    # A step's decay is in the pairs on both sides of it: at j, the step from j to j + 1. Summing these and no others
    # keeps the gradient of a strong decay exact.
    crossing = pairs.mul_(scores).cumsum(-1).tril_(-1).sum(-2)  # [b g r q]
    grad_source = (within.mul_(scores).to(B.dtype).mT @ grad_rows).transpose(2, 3)

    # y += from_start * (state @ C);  next state = across * state + (to_end * source)^T @ B
    grad_out = grad_y.to(x.dtype)
    leaving = (grad_out * chunk.from_start).to(B.dtype).flatten(3)
    entering = (x * (chunk.scale * chunk.to_end)).to(B.dtype).flatten(3)
    pulled = _times_state(B, grad_state) * chunk.to_end
    grad_C = grad_scores @ B + leaving @ _as_matrix(state, B.dtype)
    grad_B = grad_scores.mT @ C + entering @ _as_matrix(grad_state, B.dtype)
    grad_source = grad_source + pulled
    grad_scale = (x * grad_source).sum(-1, keepdim=True)

    grad_from_start = (grad_out * _times_state(C, state)).sum(-1, keepdim=True) * chunk.from_start  # [b g q r 1]
    grad_to_end = (x * pulled).sum(-1, keepdim=True) * chunk.scale
    grad_log_decay = grad_from_start.flip(2).cumsum(2).flip(2)
    grad_log_decay += (chunk.across * state * grad_state).sum((3, 4))[:, :, None, :, None]
    grad_log_decay[:, :, 1:] += (crossing.mT[..., None] + grad_to_end.cumsum(2))[:, :, :-1]

    before = (leaving.mT @ C).to(state.dtype).view(state.shape)
    return (
        grad_source * chunk.scale,
        grad_log_decay,
        grad_scale,
        grad_B,
        grad_C,
        torch.addcmul(before, grad_state, chunk.across),
    )


class _Rows:
    """The inputs with time third, their first state, and their chunks."""

    def __init__(self, inputs: Inputs, options: Options) -> None:
        x, self.groups, states = inputs.x, inputs.B.shape[2], inputs.B.shape[3]
        self.dtype = inputs.sum_dtype
        self.x = _time_third(x, self.groups)  # [b g t r p]
        self.B, self.C = inputs.B.transpose(1, 2), inputs.C.transpose(1, 2)  # [b g t n]
        batch, _, length, heads, head_dim = self.x.shape
        self.D = None if inputs.D is None else inputs.D.to(self.dtype).reshape(self.groups, 1, heads, -1)
        shape = (batch, self.groups, heads, head_dim, states)
        if inputs.initial_state is None:
            self.state = x.new_zeros(shape, dtype=self.dtype)
        else:
            self.state = inputs.initial_state.to(self.dtype).reshape(shape)
        every = steps(inputs.dt, inputs.A, inputs.dt_bias, inputs.segments, options, self.dtype)
        size = min(options.chunk_size, CPU_CHUNK) if x.device.type == "cpu" else options.chunk_size
        stops = [*range(size, length, size), length]
        self.chunks = [Chunk(every, self.groups, start, stop) for start, stop in zip([0, *stops], stops, strict=False)]

    def cut(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk's x [b g q r p], in the dtype of the sums, and B and C [b g q n]."""
        return chunk.cut(self.x).to(self.dtype), chunk.cut(self.B), chunk.cut(self.C)


def _sum_to(grad_D: Tensor, D: Tensor) -> Tensor:
    """The gradient [h p] for D [h] or [h p], in its dtype."""
    return (grad_D if D.dim() == 2 else grad_D.sum(1)).to(D.dtype)


def _time_third(tensor: Tensor, groups: int) -> Tensor:
    """[b t h ..] -> [b g t r ..], a view."""
    return tensor.unflatten(2, (groups, -1)).transpose(1, 2)


def _as_matrix(state: Tensor, dtype: torch.dtype) -> Tensor:
    """[b g r p n] -> [b g rp n]."""
    return state.flatten(2, 3).to(dtype)


def _times_state(rows: Tensor, state: Tensor) -> Tensor:
    """[b g q n] times the state [b g r p n] -> [b g q r p]."""
    return (rows @ _as_matrix(state, rows.dtype).mT).unflatten(3, state.shape[2:4])


def _scores(chunk: Chunk, B: Tensor, C: Tensor) -> Tensor:
    """C_i . B_j where i sees j, else 0: [b g 1 q q]."""
    return chunk.mask_((C @ B.mT).to(chunk.dtype))[:, :, None]


def _next_state(chunk: Chunk, state: Tensor, x: Tensor, B: Tensor) -> Tensor:
    """The state after the chunk, [b g r p n]."""
    entering = (x * (chunk.scale * chunk.to_end)).to(B.dtype).flatten(3).mT @ B
    return torch.addcmul(entering.to(state.dtype).view(state.shape), state, chunk.across)
