"""Find the layer where a loss or a gradient stops being finite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_non_finite(model: nn.Module, compute_loss: Callable[[], Tensor]) -> str | None:
    """Run forward and backward again under watch and name the first place with an infinity or NaN.

    Args:
        model: its parameters are looked at first, then its modules' outputs in the order in which they finish (inner
            ones before the ones around them), then the gradients in the order of the backward.
        compute_loss: the forward that went wrong.
    Returns:
        Such as "the output of backbone.layers.3.mixer", or None where everything is finite this time.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    found = list[str]()

    def look(tensor: Tensor, place: str) -> None:
        if not found and tensor.is_floating_point() and not tensor.isfinite().all():
            found.append(place)

    def watch_gradient(tensor: Tensor, place: str) -> Any:
        return tensor.register_hook(lambda gradient: look(gradient, place))

    def watch_module(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in filter(torch.is_tensor, output if isinstance(output, tuple) else (output,)):
                look(tensor, f"the output of {name}")
                if tensor.requires_grad:
                    watch_gradient(tensor, f"the gradient at the output of {name}")

        return hook

    handles = [module.register_forward_hook(watch_module(name)) for name, module in model.named_modules() if name]
    handles += [watch_gradient(p, f"the gradient of {n}") for n, p in model.named_parameters() if p.requires_grad]
    try:
        loss = compute_loss()
        look(loss, "the loss")
        if not found:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
