"""A mixer's half of a block as one differentiable op: norm and in_proj, what the mixer does between, and out_proj.

Of what passes here the norm's output (unless products are bfloat16 its input, the residual stream) and in_proj's are
kept for the backward, or the former alone, for one more product; what out_proj reads is computed again, in a pass that
is made anyway. Gradients of weights are sums in the weights' dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.custom_op import define
from statespan.ops.dispatch import BACKENDS
from statespan.ops.rms_norm import in_block as block_norm


def in_dtype(dtype: torch.dtype, weights: list[Tensor]) -> list[Tensor]:
    """The weights in `dtype`, on a GPU cast by one launch."""
    others = [weight for weight in weights if weight.dtype != dtype]
    device = weights[0].device
    together = device.type == "cuda" and all(weight.is_contiguous() for weight in others)
    if others and together and BACKENDS["triton"].why_not(device, (dtype,)) is None:
        from statespan.ops.triton_kernels.weights import cast  # imports Triton, so imported when it runs

        found = iter(cast(dtype, others))
        return [weight if weight.dtype == dtype else next(found) for weight in weights]
    return [weight.to(dtype) for weight in weights]


@dataclass(frozen=True)
class Ends:
    """Norm and projections; products are made in `dtype`, which in_low and out_low have."""

    norm: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None
    in_low: Tensor
    out_low: Tensor
    epsilon: float
    dtype: torch.dtype

    def enter(self, hidden: Tensor, update: Tensor | None, keep: bool) -> tuple[Tensor, block_norm.Normed]:
        """in_proj(norm(hidden + update)) [b t i], and what the norm gives."""
        normed = block_norm.forward(hidden, update, self.norm, self.epsilon, self.dtype, keep)
        return self._project(normed.y), normed

    def project(self, stream: Tensor, inverses: Tensor | None) -> Tensor:
        """in_proj's output again, from what is kept of the norm."""
        if inverses is not None:
            return self._project(stream)
        return self.enter(stream, None, False)[0]

    def _project(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.in_low, self._low(self.in_bias))

    def leave(self, y: Tensor) -> Tensor:
        """out_proj(y) [b t h]."""
        return F.linear(y, self.out_low, self._low(self.out_bias))

    def gradients(
        self,
        grad_total: Tensor | None,
        grad_out: Tensor,
        grad_projected: Tensor,
        y: Tensor,
        stream: Tensor,
        inverses: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype | None],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and of update in `dtypes` (None: one serves both), and of the weights in their order."""
        grad_out_proj = of_weight(grad_out, y, self.out_proj.dtype)
        grad_normed = grad_projected @ self.in_low
        kept = (stream, inverses, self.norm, self.epsilon)
        grad_hidden, grad_update, normed, grad_norm = block_norm.backward(grad_normed, grad_total, *kept, *dtypes)
        grad_in_proj = of_weight(grad_projected, normed, self.in_proj.dtype)
        of_biases = (_of_bias(grad_projected, self.in_bias), _of_bias(grad_out, self.out_bias))
        return grad_hidden, grad_update, grad_norm, grad_in_proj, of_biases[0], grad_out_proj, of_biases[1]

    def _low(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.to(self.dtype)


def of_weight(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a weight [o i] in its dtype, from that of F.linear(x, weight) [.. o] and x [.. i]."""
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    if grad.is_cuda and grad.element_size() == 2 and dtype == torch.float32 and torch.version.hip is None:
        if 128 < rows.shape[1] <= 192 and len(rows) % 2 == 0:  # too few tiles for the whole GPU: halves of the tokens
            of_rows, of_inputs = (x.unflatten(0, (2, -1)) for x in (rows, inputs))
            return torch.bmm(of_rows.mT, of_inputs, out_dtype=dtype).sum(0)
        return torch.mm(rows.T, inputs, out_dtype=dtype)  # the sums as they are, neither rounded nor cast
    return (rows.T @ inputs).to(dtype)


def _of_bias(grad: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else grad.flatten(0, -2).sum(0, dtype=bias.dtype)


def _all(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs, empty tensors in place of None."""
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


class Middle(NamedTuple):
    """What a mixer does between its projections: `inputs` is a dataclass of in_proj's output, tensors and options."""

    inputs: Callable[..., Any]
    tensors: str  # as in a schema, the last one `Tensor? segments`
    options: str
    forward: Callable[..., tuple[Tensor, ...]]  # (inputs, keep) -> y, conv's and ssm's final states, what is kept
    fake: Callable[..., tuple[Tensor, ...]]  # the same with empty outputs
    # (inputs, grad_y, grad_conv, grad_state, what was kept) -> y once more, gradients of in_proj's output and tensors
    backward: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]
    num_kept: int
    # Places in `tensors` of weights that `inputs` takes last in the dtype of in_proj's output.
    matrices: tuple[int, ...] = ()


def define_block(name: str, middle: Middle) -> Callable[..., tuple[Tensor, ...]]:
    """Register the op `name` and return it.

    It takes hidden, update, the tensors of Ends and of `middle`, middle's options, Ends' epsilon and dtype, and what is
    kept for a backward: 0 nothing, 1 all but in_proj's output and the conv's, 2 the former, too, 3 both; and whether
    the products' weights are, where they were cast.

    Its outputs are hidden + update (empty without an update), out_proj's output, the final states, and what is kept.
    """
    num_tensors = 5 + middle.tensors.count("Tensor")
    num_cast = 2 + len(middle.matrices)
    num_saved = 3 + middle.num_kept + num_cast

    def weights_of(arguments: tuple[Any, ...]) -> list[Tensor]:
        return [arguments[1], arguments[3], *(arguments[5 + place] for place in middle.matrices)]

    def made(cast: list[Tensor], weights: list[Tensor], wanted: bool) -> list[Tensor | None]:
        return [low if wanted and low is not weight else None for low, weight in zip(cast, weights, strict=True)]

    def split(arguments: tuple[Any, ...], cast: Sequence[Tensor]) -> tuple[Ends, Callable[[Tensor], Any]]:
        *given, epsilon, dtype = arguments
        (norm, in_proj, in_bias, out_proj, out_bias), others = given[:5], given[5:]
        in_low, out_low, *low = cast
        ends = Ends(norm, in_proj, in_bias, out_proj, out_bias, in_low, out_low, epsilon, dtype)
        return ends, lambda projected: middle.inputs(projected, *others, *low)

    def forward(hidden: Tensor, update: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        *given, keep, keep_cast = arguments
        weights = weights_of(arguments)
        cast = in_dtype(given[-1], weights)
        ends, inputs = split(tuple(given), cast)
        with torch.autocast(hidden.device.type, enabled=False):
            projected, normed = ends.enter(hidden, update, keep > 0)
            y, *found = middle.forward(inputs(projected), keep)
            kept = (projected if keep >= 2 else None, None if normed.inverses is None else normed.y, normed.inverses)
            kept_cast = made(cast, weights, keep > 0 and keep_cast)
            return _all(y, normed.total, ends.leave(y), *found[:2], *kept, *found[2:], *kept_cast)

    def fake(hidden: Tensor, update: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        *given, keep, keep_cast = arguments
        weights = weights_of(arguments)
        cast = [weight.to(given[-1]) for weight in weights]  # not by a kernel: there is no memory behind them
        ends, inputs = split(tuple(given), cast)
        projected = hidden.new_empty(*hidden.shape[:2], ends.in_proj.shape[0], dtype=ends.dtype)
        y, *found = middle.fake(inputs(projected), keep)
        total, out = None if update is None else hidden.new_empty(hidden.shape), projected.new_empty(hidden.shape)
        with_output = keep > 0 and block_norm.keeps_output(ends.dtype)
        normed, inverses = (torch.empty_like(out), block_norm.new_inverses(hidden)) if with_output else (None, None)
        kept = (projected if keep >= 2 else None, normed, inverses)
        kept_cast = made(cast, weights, keep > 0 and keep_cast)
        return _all(y, total, out, *found[:2], *kept, *found[2:], *kept_cast)

    def backward(
        grad_total: Tensor | None,
        grad_out: Tensor | None,
        grad_conv: Tensor | None,
        grad_state: Tensor | None,
        *rest: Any,
    ) -> list[Tensor]:
        stream, inverses, projected, *kept = rest[: 3 + middle.num_kept]
        cast = rest[3 + middle.num_kept : num_saved]
        stream_dtype, update_dtype, *arguments = rest[num_saved:]
        if not any(low.numel() for low in cast):
            cast = in_dtype(arguments[-1], weights_of(tuple(arguments)))
        else:  # a weight that has the dtype was not cast
            pairs = zip(cast, weights_of(tuple(arguments)), strict=True)
            cast = [low if low.numel() else weight for low, weight in pairs]
        ends, inputs = split(tuple(arguments), cast)
        with torch.autocast(stream.device.type, enabled=False):
            projected = projected if projected.numel() else ends.project(stream, inverses)
            grad_out = torch.zeros_like(stream, dtype=ends.dtype) if grad_out is None else grad_out
            grad_y = grad_out @ ends.out_low
            y, (grad_projected, *found) = middle.backward(inputs(projected), grad_y, grad_conv, grad_state, *kept)
            assert grad_projected is not None
            dtypes = (stream_dtype, update_dtype)
            of_ends = ends.gradients(grad_total, grad_out, grad_projected, y, stream, inverses, dtypes)
        return [gradient for gradient in (*of_ends, *found) if gradient is not None]

    def fake_backward(*arguments: Any) -> list[Tensor]:
        stream, (stream_dtype, update_dtype, *rest) = arguments[4], arguments[4 + num_saved :]
        streams = [stream.new_empty(stream.shape, dtype=dtype) for dtype in (stream_dtype, update_dtype) if dtype]
        tensors = [value for value in rest[: num_tensors - 1] if value is not None]
        return [*streams, *(value.new_empty(value.shape) for value in tensors)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, update, *arguments = inputs
        ctx.has_update, ctx.options = update is not None, arguments[num_tensors:-2]
        ctx.dtypes = (hidden.dtype, None if update is None or update.dtype == hidden.dtype else update.dtype)
        ctx.mark_non_differentiable(*output[4:], *([] if ctx.has_update else output[:1]))
        ctx.set_materialize_grads(False)
        total, projected, normed, inverses = (output[0] if ctx.has_update else hidden, *output[4:7])
        norm = (normed, inverses) if normed.numel() else (total, None)
        ctx.save_for_backward(*norm, projected, *output[7:], *arguments[:num_tensors])

    def autograd(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing gives them out once
        kept, tensors = saved[:num_saved], saved[num_saved:]
        found = iter(backward_op(*gradients[:4], *kept, *ctx.dtypes, *tensors, *ctx.options))
        grad_hidden = next(found)
        grad_update = None
        if ctx.has_update:
            grad_update = grad_hidden if ctx.dtypes[1] is None else next(found)
        of_tensors = (None if value is None else next(found) for value in tensors[:-1])  # the last one is segments
        return grad_hidden, grad_update, *of_tensors, *[None] * (3 + len(ctx.options))

    tensors = f"Tensor norm, Tensor in_proj, Tensor? in_bias, Tensor out_proj, Tensor? out_bias, {middle.tensors}"
    arguments = f"{tensors}, {middle.options}, float block_epsilon, ScalarType dtype"
    outputs = ", ".join(["Tensor"] * (4 + num_saved))
    schema = f"{name}(Tensor hidden, Tensor? update, {arguments}, int keep, bool keep_cast) -> ({outputs})"
    of_outputs = "Tensor? grad_total, Tensor? grad_out, Tensor? grad_conv, Tensor? grad_state"
    kept = "Tensor stream, Tensor? inverses, Tensor projected"
    kept += "".join(f", Tensor kept_{number}" for number in range(middle.num_kept + num_cast))
    dtypes = "ScalarType stream_dtype, ScalarType? update_dtype"
    schema_backward = f"{name}_backward({of_outputs}, {kept}, {dtypes}, {arguments}) -> Tensor[]"
    backward_op = define(schema_backward, backward, fake_backward)
    return define(schema, forward, fake, setup_context=setup_context, backward=autograd)
