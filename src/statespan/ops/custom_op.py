"""Registering an op with torch.library at the least cost a call, and gradients taken inside a kernel.

`torch.library.custom_op` costs about 20 us a call, `Library.define` and `impl` about 5: with some hundred op calls a
generated token this decides. An op defined here has one kernel for every device (it picks the backend when it runs),
a fake kernel for torch.compile and, where asked, an autograd formula.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LIBRARY = torch.library.Library("statespan", "FRAGMENT")


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register `statespan::name(...)` and return a function that calls it with positional arguments.

    Where nobody looks on (no compilation, no dispatch mode, no functorch), the function calls the kernel itself, under
    autograd with a node of its own: it saves the dispatcher's 3 to 6 us, and the 100 to 400 that torch.library's
    autograd takes for an op of 15 to 30 arguments.

    Args:
        schema: the signature as torch.library writes it, starting with the name.
        kernel: computes the outputs; they are new tensors, never views of the inputs.
        fake: the same with empty outputs.
        setup_context, backward: as for torch.library.register_autograd; without them the op has no gradients.
    """
    name = f"statespan::{schema.split('(')[0]}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.statespan, name.split("::")[1]).default

    recorded = None if backward is None or setup_context is None else _recorded(name, kernel, setup_context, backward)

    def call(*args: Any) -> Any:
        if traced():
            return op(*args)
        if not torch.is_grad_enabled():
            return kernel(*args) if type(args[0]) is Tensor else op(*args)
        tensors = [value for value in args if isinstance(value, Tensor)]
        if not all(type(value) in _PLAIN for value in tensors):
            return op(*args)
        if not any(value.requires_grad for value in tensors):
            return kernel(*args)
        return op(*args) if recorded is None else recorded(*args)

    return call


_PLAIN = (Tensor, torch.nn.Parameter)
_functorch_is_on = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]  # no other name


def traced() -> bool:
    """Whether somebody looks on: compilation, a dispatch mode or functorch."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _functorch_is_on()


def _recorded(
    name: str, kernel: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The kernel as a function that can be differentiated once: a second time is an error, not zeros."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(name.replace("::", "_"), (torch.autograd.Function,), members).apply


def gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    output_gradients: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product of a differentiable function, for use inside a kernel: None where an input is None.

    Zeros where no output depends on an input. Kernels may run below autograd's dispatch keys or in
    inference mode; inference_mode(False) lifts both.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [None if value is None else value.detach().requires_grad_() for value in inputs]
        pairs = [
            (output, gradient)
            for output, gradient in zip(function(*leaves), output_gradients, strict=True)
            if output.requires_grad
        ]
        if not pairs:
            return tuple(None if leaf is None else torch.zeros_like(leaf) for leaf in leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        outputs, gradients_in = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients_in, materialize_grads=True, allow_unused=True))
    return tuple(None if leaf is None else next(found).contiguous() for leaf in leaves)
