"""Parameters that stay float32 when the rest of a module is cast."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class KeepFloat32(nn.Module):
    """A module whose `float32_parameters` change device with `.to()` but never dtype.

    The recurrence is sensitive to the precision of A_log, D and dt_bias (mamba README); `.to(torch.bfloat16)`,
    `.half()` and `.bfloat16()` leave them as they are. `.double()` is obeyed, for tests against float64.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = [getattr(self, name) for name in self.float32_parameters]

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if any(tensor is p for p in kept) and out.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(out.device) if out.device.type != "meta" else out.to(tensor.dtype)
            return out

        return super()._apply(keep, recurse)
