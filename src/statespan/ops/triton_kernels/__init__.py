"""The common ground of the Triton backends: where kernels run, how tensors are laid out for them, how large a tile is.

A backend is two files in its op's folder. `triton_kernels.py` holds the jitted functions, in the part of Triton's
language that releases 3.6 to 3.9 share; `triton_backend.py` turns tensors into their arguments. Neither is imported
before an op resolves to "triton", so that importing Statespan imports no Triton.

Rules of the house:
- Offsets that grow with the number of tokens are int64: `row.to(tl.int64) * stride`.
- The last dimension is contiguous, all other strides are arguments. `rows` and `layout.last_contiguous` see to it.
- An absent tensor is None: Triton compiles a variant of the kernel without it.
- `launcher.launch(kernel, grid, ...)` in place of kernel[grid](...) spares Triton's look-up of a kernel that ran
  before; `launcher.start`, which does not, for tensor descriptors.
- Sums over programs go to a row of partial sums for each and are added up afterwards, so that results repeat bit by
  bit on one machine.
- Kernels take what they are given: float32, bfloat16 and float16 are read and written as they are and computed with in
  float32.
"""

import torch
from torch import Tensor

from statespan.ops.layout import last_contiguous
from statespan.ops.triton_kernels.release import refusal


class on:  # noqa: N801  # reads as a word
    """Launches inside go to `device`; on the CPU they go to Triton's interpreter.

    Raises BackendUnavailable where Triton cannot compile a kernel.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        self._current = torch.cuda.device(device) if elsewhere else None

    def __enter__(self) -> None:
        if self._current is not None:
            self._current.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._current is not None:
            self._current.__exit__(kind, error, trace)
        if error is not None and (told := refusal(error, self._device)):
            raise told from error


def rows(tensor: Tensor) -> Tensor:
    """[.. d] as [rows d] with contiguous channels; a view wherever the strides allow it."""
    return last_contiguous(tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1]))


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()
