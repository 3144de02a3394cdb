"""A mixer's half of a block as one differentiable op: norm and in_proj, what the mixer does between, and out_proj.

Of what passes here the residual stream and in_proj's output are kept for the backward (or the stream alone, for one
more product); the norm's output and what out_proj reads are computed again, in passes that are made anyway. Gradients
of weights are sums in the weights' dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.custom_op import define
from statespan.ops.rms_norm import _add_forward, _forward, backward_in_block


@dataclass(frozen=True)
class Ends:
    """Norm and projections; products are made in `dtype`."""

    norm: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None
    epsilon: float
    dtype: torch.dtype

    def enter(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """in_proj(norm(hidden + update)) [b t i], and that sum [b t h]; without an update an empty tensor."""
        if update is None:
            return self.project(hidden), hidden.new_empty(0)
        normed, total = _add_forward(update, hidden, self.norm, self.epsilon, self.dtype, "auto")
        return self._project(normed), total

    def project(self, total: Tensor) -> Tensor:
        """in_proj(norm(total)) [b t i]."""
        return self._project(_forward(total, self.norm, self.epsilon, self.dtype, "auto"))

    def _project(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.in_proj.to(self.dtype), self._low(self.in_bias))

    def leave(self, y: Tensor) -> Tensor:
        """out_proj(y) [b t h]."""
        return F.linear(y, self.out_proj.to(self.dtype), self._low(self.out_bias))

    def gradients(
        self,
        grad_total: Tensor | None,
        grad_out: Tensor,
        grad_projected: Tensor,
        y: Tensor,
        total: Tensor,
        update_dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, of update in its dtype (None: it has hidden's), and of the weights in their order."""
        grad_out_proj = of_weight(grad_out, y, self.out_proj.dtype)
        grad_normed = grad_projected @ self.in_proj.to(self.dtype)
        found = backward_in_block(grad_normed, grad_total, total, self.norm, self.epsilon, update_dtype)
        grad_hidden, grad_update, normed, grad_norm = found
        grad_in_proj = of_weight(grad_projected, normed, self.in_proj.dtype)
        of_biases = (_of_bias(grad_projected, self.in_bias), _of_bias(grad_out, self.out_bias))
        return grad_hidden, grad_update, grad_norm, grad_in_proj, of_biases[0], grad_out_proj, of_biases[1]

    def _low(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.to(self.dtype)


def of_weight(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a weight [o i] in its dtype, from that of F.linear(x, weight) [.. o] and x [.. i]."""
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    if grad.is_cuda and grad.element_size() == 2 and dtype == torch.float32 and torch.version.hip is None:
        return torch.mm(rows.T, inputs, out_dtype=dtype)  # the sums as they are, neither rounded nor cast
    return (rows.T @ inputs).to(dtype)


def _of_bias(grad: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else grad.flatten(0, -2).sum(0, dtype=bias.dtype)


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


def define_block(name: str, middle: Middle) -> Callable[..., tuple[Tensor, ...]]:
    """Register the op `name` and return it.

    It takes hidden, update, the tensors of Ends and of `middle`, middle's options, Ends' epsilon and dtype, and what is
    kept for a backward: 0 nothing, 1 all but in_proj's output, 2 that, too.

    Its outputs are hidden + update (empty without an update), out_proj's output, the final states, and what is kept.
    """
    num_tensors = 5 + middle.tensors.count("Tensor")

    def split(arguments: tuple[Any, ...]) -> tuple[Ends, Callable[[Tensor], Any]]:
        *given, epsilon, dtype = arguments
        return Ends(*given[:5], epsilon=epsilon, dtype=dtype), lambda projected: middle.inputs(projected, *given[5:])

    def forward(hidden: Tensor, update: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        (ends, inputs), keep = split(arguments[:-1]), arguments[-1]
        with torch.autocast(hidden.device.type, enabled=False):
            projected, total = ends.enter(hidden, update)
            y, *found = middle.forward(inputs(projected), keep > 0)
            return total, ends.leave(y), *found[:2], projected if keep == 2 else y.new_empty(0), *found[2:]

    def fake(hidden: Tensor, update: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        (ends, inputs), keep = split(arguments[:-1]), arguments[-1]
        projected = hidden.new_empty(*hidden.shape[:2], ends.in_proj.shape[0], dtype=ends.dtype)
        _, *found = middle.fake(inputs(projected), keep > 0)
        total = hidden.new_empty(0 if update is None else hidden.shape)
        out = projected.new_empty(hidden.shape)
        return total, out, *found[:2], projected if keep == 2 else projected.new_empty(0), *found[2:]

    def backward(
        grad_total: Tensor | None,
        grad_out: Tensor | None,
        grad_conv: Tensor | None,
        grad_state: Tensor | None,
        *rest: Any,
    ) -> list[Tensor]:
        projected, *kept = rest[: 1 + middle.num_kept]
        total, update_dtype, *arguments = rest[1 + middle.num_kept :]
        ends, inputs = split(tuple(arguments))
        with torch.autocast(total.device.type, enabled=False):
            projected = projected if projected.numel() else ends.project(total)
            grad_out = torch.zeros_like(total, dtype=ends.dtype) if grad_out is None else grad_out
            grad_y = grad_out @ ends.out_proj.to(ends.dtype)
            y, (grad_projected, *found) = middle.backward(inputs(projected), grad_y, grad_conv, grad_state, *kept)
            assert grad_projected is not None
            of_ends = ends.gradients(grad_total, grad_out, grad_projected, y, total, update_dtype)
        return [gradient for gradient in (*of_ends, *found) if gradient is not None]

    def fake_backward(*arguments: Any) -> list[Tensor]:
        total, update_dtype, *rest = arguments[5 + middle.num_kept :]
        more = [] if update_dtype is None else [total.new_empty(total.shape, dtype=update_dtype)]
        tensors = [value for value in rest[: num_tensors - 1] if value is not None]
        return [total.new_empty(total.shape), *more, *(value.new_empty(value.shape) for value in tensors)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, update, *arguments = inputs
        ctx.has_update, ctx.options = update is not None, arguments[num_tensors:-1]
        ctx.update_dtype = None if update is None or update.dtype == hidden.dtype else update.dtype
        ctx.mark_non_differentiable(*output[4:], *([] if ctx.has_update else output[:1]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[4:], output[0] if ctx.has_update else hidden, *arguments[:num_tensors])

    def autograd(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing gives them out once
        kept, total, tensors = saved[: 1 + middle.num_kept], saved[1 + middle.num_kept], saved[2 + middle.num_kept :]
        found = iter(backward_op(*gradients[:4], *kept, total, ctx.update_dtype, *tensors, *ctx.options))
        grad_hidden = next(found)
        grad_update = None
        if ctx.has_update:
            grad_update = grad_hidden if ctx.update_dtype is None else next(found)
        of_tensors = (None if value is None else next(found) for value in tensors[:-1])  # the last one is segments
        return grad_hidden, grad_update, *of_tensors, *[None] * (2 + len(ctx.options))

    tensors = f"Tensor norm, Tensor in_proj, Tensor? in_bias, Tensor out_proj, Tensor? out_bias, {middle.tensors}"
    arguments = f"{tensors}, {middle.options}, float block_epsilon, ScalarType dtype"
    outputs = ", ".join(["Tensor"] * (5 + middle.num_kept))
    schema = f"{name}(Tensor hidden, Tensor? update, {arguments}, int keep) -> ({outputs})"
    of_outputs = "Tensor? grad_total, Tensor? grad_out, Tensor? grad_conv, Tensor? grad_state, Tensor projected"
    kept = "".join(f", Tensor kept_{number}" for number in range(middle.num_kept))
    schema_backward = (
        f"{name}_backward({of_outputs}{kept}, Tensor total, ScalarType? update_dtype, {arguments}) -> Tensor[]"
    )
    backward_op = define(schema_backward, backward, fake_backward)
    return define(schema, forward, fake, setup_context=setup_context, backward=autograd)
