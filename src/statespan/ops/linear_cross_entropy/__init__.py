"""Cross entropy of a linear head, without ever holding all its logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_dim, check_name, check_shape, needs_gradients
from statespan.ops.autocast import product_dtype
from statespan.ops.custom_op import define, gradients
from statespan.ops.dispatch import resolve
from statespan.ops.linear_cross_entropy import chunked, in_place, reference

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "none", "sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    valid_vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of a linear head: loss_t = logsumexp_v(W h_t) - (W h_t)[label_t]   (cut down: arXiv 2411.09009).

    The logits of some tokens at a time are computed, turned into the loss and, where gradients are wanted, at once
    into gradients: one chunk of at most 256 MiB in float32 is alive, whatever the vocabulary.

    Args:
        hidden: [.. h], float.
        weight: [v h], float.
        labels: [..], int64 in [0, valid_vocab_size), or ignore_index.
        ignore_index: the label of tokens that do not count.
        reduction: "mean" over the tokens that count (0 where none does), "sum", or "none".
        valid_vocab_size: rows of weight beyond it are padding and get no probability; None for all v.
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        The loss in float32: a scalar, or [..] with 0 for ignored tokens when reduction is "none". Differentiable with
        respect to hidden and weight.

    Raises:
        UserError: shapes or devices disagree, or a label is out of range (on a GPU, where the check would wait for the
            device, its loss is NaN).
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: products in weight.dtype (under autocast in its dtype), softmax and sums in float32. "none" computes the
    logits again in the backward, the others do not.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> linear_cross_entropy(hidden, weight, torch.randint(0, 100, (2, 5))).backward()
    """
    op = "linear_cross_entropy"
    check_dim(op, "weight", weight, "[v h]")
    vocab_size, hidden_size = weight.shape
    check_shape(op, "hidden", hidden, "[.. h]", (*hidden.shape[:-1], hidden_size))
    check_shape(op, "labels", labels, "[..]", tuple(hidden.shape[:-1]))
    check_devices(op, hidden=hidden, weight=weight, labels=labels)
    check_name(f"reduction of {op}", reduction, REDUCTIONS)
    valid = vocab_size if valid_vocab_size is None else valid_vocab_size
    if not 0 < valid <= vocab_size:
        raise UserError(f"{op}: valid_vocab_size must be in 1 .. {vocab_size}, the rows of weight; got {valid}")
    rows = hidden.reshape(-1, hidden_size).to(product_dtype(weight))
    loss, _, _ = _linear_cross_entropy(
        rows,
        weight,
        labels.reshape(-1).to(torch.int64),
        ignore_index,
        reduction,
        valid,
        needs_gradients(rows),
        needs_gradients(weight),
        backend,
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def _check_labels(labels: Tensor, valid: int) -> None:
    """Raise UserError for a label that is no row of the vocabulary."""
    if labels.numel() == 0:
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= valid:
        wrong = low if low < 0 else high
        raise UserError(f"linear_cross_entropy: label {wrong} is out of range; the vocabulary is 0 to {valid - 1}")


def _gradients_wait(reduction: str, backend: str) -> bool:
    """Whether gradients are computed in the backward: where they are no multiples of the scalar that arrives there."""
    return reduction == "none" or backend == "reference"


def _mean_at_once(reduction: str, name: str) -> bool:
    """Whether the kernel divides by the count: its own pass over the weight's gradient shows on a CPU."""
    return reduction == "mean" and name == "cpu"


def _losses_and_gradients(name: str) -> Any:
    """The chunked form of a backend; all take the same arguments."""
    if name == "torch":
        return chunked.losses_and_gradients
    if name == "cpu":
        from statespan.ops.linear_cross_entropy import cpu  # loads compiled kernels, so imported when it runs

        return partial(in_place.losses_and_gradients, cpu.losses_and_gradients, chunked.LOGIT_BYTES)
    from statespan.ops.linear_cross_entropy import triton_backend  # imports Triton, so imported when it runs

    return partial(in_place.losses_and_gradients, triton_backend.losses_and_gradients, triton_backend.LOGIT_BYTES)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    valid: int,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if not hidden.is_cuda:  # there the check would wait for the device; a wrong label makes the loss NaN
        _check_labels(labels[labels != ignore_index], valid)
    with torch.autocast(hidden.device.type, enabled=False):
        name, low = resolve("linear_cross_entropy", backend, hidden.device, hidden.dtype), weight.to(hidden.dtype)
        if name == "reference":
            loss = reference.linear_cross_entropy(hidden, low, labels, ignore_index, reduction, valid)
            return loss, hidden.new_empty(0), weight.new_empty(0)
        now, scale = not _gradients_wait(reduction, backend), None
        if _mean_at_once(reduction, name):
            scale = labels.new_ones(labels.shape, dtype=torch.float32) / _count(labels, ignore_index)
        losses, grad_hidden, grad_weight = _losses_and_gradients(name)(
            hidden, low, labels, ignore_index, valid, scale, now and need_hidden, now and need_weight, weight.dtype
        )
    if reduction != "none":
        losses = losses.sum() / (1 if reduction == "sum" else _count(labels, ignore_index))
    return losses, grad_hidden, grad_weight


def _backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    valid: int,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        name = resolve("linear_cross_entropy", backend, hidden.device, hidden.dtype)
        if name != "reference":
            low = weight.to(hidden.dtype)
            return _losses_and_gradients(name)(
                hidden, low, labels, ignore_index, valid, grad_loss, need_hidden, need_weight, weight.dtype
            )[1:]
        found = gradients(
            lambda hidden, weight: (
                reference.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels, ignore_index, reduction, valid),
            ),
            (hidden, weight),
            (grad_loss,),
        )
    pairs = zip((need_hidden, need_weight), found, strict=True)
    grad_hidden, grad_weight = (hidden.new_empty(0) if not need or value is None else value for need, value in pairs)
    return grad_hidden, grad_weight


def _fake_forward(hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, reduction, _, need_hidden, need_weight, backend = options
    now = not _gradients_wait(reduction, backend)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=dtype)
    return loss, *_fake_gradients(hidden, weight, now and need_hidden, now and need_weight)


def _fake_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _, _, _, need_hidden, need_weight, _ = options
    return _fake_gradients(hidden, weight, need_hidden, need_weight)


def _fake_gradients(hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _count(labels: Tensor, ignore_index: int) -> Tensor:
    """How many tokens the mean is over; 1 where none counts, so that the loss is 0."""
    return (labels != ignore_index).sum().clamp(min=1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels, *ctx.options = inputs
    _, reduction, _, _, _, backend = ctx.options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # only the loss has a gradient
    if _gradients_wait(reduction, backend):
        ctx.save_for_backward(hidden, weight, labels)
    else:
        ctx.save_for_backward(*output[1:], labels)


def _autograd(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    ignore_index, reduction, _, need_hidden, need_weight, backend = ctx.options
    if _gradients_wait(reduction, backend):
        found = _linear_cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    else:
        *found, labels = ctx.saved_tensors
        name = resolve("linear_cross_entropy", backend, found[0].device, found[0].dtype)
        divide = reduction == "mean" and not _mean_at_once(reduction, name)
        scale = grad_loss / _count(labels, ignore_index) if divide else grad_loss
        if name != "cpu" or is_in_torch_dispatch_mode() or scale != 1:  # a traced tensor has no value
            found = [gradient * scale for gradient in found]
    return (found[0] if need_hidden else None, found[1] if need_weight else None, None, *[None] * len(ctx.options))


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor labels, int ignore_index, str reduction, int valid, bool need_hidden,"
    " bool need_weight, str backend"
)
_linear_cross_entropy = define(
    f"linear_cross_entropy({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
_linear_cross_entropy_backward = define(
    f"linear_cross_entropy_backward(Tensor grad_loss, {_ARGUMENTS}) -> (Tensor, Tensor)", _backward, _fake_backward
)
