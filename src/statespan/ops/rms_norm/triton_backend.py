"""RMS normalisation on GPUs: tensors to the kernels of `triton_kernels.py`."""

from collections.abc import Callable

import torch
from torch import Tensor

from statespan.ops.gpu import multiprocessors, shared_memory
from statespan.ops.rms_norm import triton_kernels as kernels
from statespan.ops.triton_kernels import on, power_of_two, rows
from statespan.ops.triton_kernels.launcher import launch
from statespan.ops.triton_kernels.weights import sum_of_parts
from statespan.ops.tuning import Tunable


def _tile(tunable: Tunable, num_rows: int, channels: int, device: torch.device) -> tuple[int, int, int]:
    """Rows and channels of a tile, and warps; few rows are spread over the whole machine."""
    values = tunable.best(device, channels)["tile"]
    block = power_of_two(channels)
    spread = power_of_two(num_rows // (8 * multiprocessors(device)))
    return max(1, min(values // block, spread)), block, min(32, max(4, block // 1024))


def _chunks(channels: int, most: int) -> tuple[int, int, int]:
    """Size and number of the chunks that the backward takes a row in, `most` where they fit, and warps."""
    chunk = min(1024, power_of_two(channels))
    while channels > most * chunk and chunk < 8192:
        chunk *= 2
    return chunk, -(-channels // chunk), max(1, chunk // 256)


def _stages(row_bytes: int, device: torch.device) -> int:
    """3 where the rows that are on their way fit the shared memory: one is worked on while two arrive."""
    return 3 if 7 * row_bytes <= 2 * shared_memory(device) else 1


def _programs(num_rows: int, groups: int, warps: int, warps_at_once: int, device: torch.device) -> tuple[int, int]:
    """Programs of each group and rows of each program, for so many warps at once on a multiprocessor."""
    most = max(1, multiprocessors(device) * max(1, warps_at_once // warps) // groups)
    each = -(-num_rows // most)
    return -(-num_rows // each), each


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, inverses: Tensor | None = None) -> Tensor:
    """y of `statespan.ops.rms_norm`; for `inverses` [..] see `in_block`."""
    y = x.new_empty(x.shape, dtype=dtype)
    _normalize(rows(x), None, weight, y, None, inverses, eps)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, inverses: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y and x + residual."""
    y, total = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=residual.dtype)
    _normalize(rows(x), rows(residual), weight, y, total, inverses, eps)
    return y, total


def _normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    total: Tensor | None,
    inverses: Tensor | None,
    eps: float,
) -> None:
    if x.numel() == 0:
        return
    num_rows, channels = x.shape
    tile_rows, block, warps = _tile(FORWARD, num_rows, channels, x.device)
    with on(x.device):
        launch(
            kernels.forward,
            (-(-num_rows // tile_rows),),
            x,
            residual,
            weight.contiguous(),
            y,
            total,
            inverses,
            num_rows,
            channels,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            ROWS=tile_rows,
            BLOCK=block,
            num_warps=warps,
        )


def rms_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    rounded: Tensor | None = None,
    y: Tensor | None = None,
    inverses: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype or `dtype` and with grad_total added, and weight.

    Where they are given, tensors like x: `rounded` gets that of x once more in its own dtype, and y what rms_norm gave.
    With `inverses` x is what rms_norm gave.
    """
    grad_x = x.new_empty(x.shape, dtype=dtype or x.dtype)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight)
    x, grad_y = rows(x), rows(grad_y)
    grad_total = None if grad_total is None else rows(grad_total)
    num_rows, channels = x.shape
    tuned = BACKWARD.best(x.device, channels)
    chunk, chunks, warps = _chunks(channels, tuned["chunks"])
    programs, each = _programs(num_rows, 1, warps, tuned["warps_at_once"], x.device)
    # Rows of grad_total wait in shared memory, too; where x has 32 bits, the estimate leaves room for them.
    ahead = [x, grad_y] if inverses is None or grad_total is None else [x, grad_y, grad_total]
    grad_weight = x.new_empty(programs, channels, dtype=torch.float32)
    with on(x.device):
        launch(
            kernels.backward,
            (programs,),
            grad_y,
            grad_total,
            x,
            inverses,
            weight.contiguous(),
            grad_x,
            rounded,
            y,
            grad_weight,
            num_rows,
            channels,
            each,
            grad_y.stride(0),
            0 if grad_total is None else grad_total.stride(0),
            x.stride(0),
            eps,
            CHUNK=chunk,
            CHUNKS=chunks,
            STAGES=_stages(sum(channels * loaded.element_size() for loaded in ahead), x.device),
            num_warps=warps,
        )
    of_weight = torch.empty_like(weight)
    sum_of_parts(grad_weight, of_weight)
    return grad_x, of_weight


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    """y of `statespan.ops.gated_rms_norm`."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    x, z = rows(x), rows(z)
    num_rows, groups = x.shape[0], x.shape[1] // group_size
    tile_rows, block, warps = _tile(GATED_FORWARD, num_rows * groups, group_size, x.device)
    with on(x.device):
        launch(
            kernels.gated_forward,
            (-(-num_rows * groups // tile_rows),),
            x,
            z,
            weight.contiguous(),
            y,
            num_rows,
            groups,
            group_size,
            x.stride(0),
            z.stride(0),
            eps,
            NORM_BEFORE_GATE=norm_before_gate,
            ROWS=tile_rows,
            BLOCK=block,
            num_warps=warps,
        )
    return y


def gated_rms_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    into_z: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z (in `into_z`, where it is given; its rows may be strided) and weight.

    Where it is given, y, like x, gets what gated_rms_norm gave.
    """
    grad_x, grad_z = x.new_empty(x.shape), z.new_empty(z.shape) if into_z is None else into_z
    if x.numel() == 0:
        return grad_x, grad_z, torch.zeros_like(weight)
    x, z, grad_y = rows(x), rows(z), rows(grad_y)
    num_rows, groups = x.shape[0], x.shape[1] // group_size
    tuned = GATED_BACKWARD.best(x.device, group_size)
    chunk, chunks, warps = _chunks(group_size, tuned["chunks"])
    programs, each = _programs(num_rows, groups, warps, tuned["warps_at_once"], x.device)
    grad_weight = x.new_empty(programs, x.shape[1], dtype=torch.float32)
    with on(x.device):
        launch(
            kernels.gated_backward,
            (programs * groups,),
            grad_y,
            x,
            z,
            weight.contiguous(),
            grad_x,
            grad_z,
            y,
            grad_weight,
            num_rows,
            groups,
            group_size,
            each,
            grad_y.stride(0),
            x.stride(0),
            z.stride(0),
            rows(grad_z).stride(0),
            eps,
            NORM_BEFORE_GATE=norm_before_gate,
            CHUNK=chunk,
            CHUNKS=chunks,
            STAGES=_stages(group_size * (x.element_size() + z.element_size() + grad_y.element_size()), x.device),
            num_warps=warps,
        )
    return grad_x, grad_z, grad_weight.sum(0).to(weight.dtype)


def _trial(backward: bool, gated: bool) -> Callable[[torch.device, int], Callable[[], object]]:
    def trial(device: torch.device, channels: int) -> Callable[[], object]:
        x, z, grad = (torch.randn(16384, channels, dtype=torch.bfloat16, device=device) for _ in range(3))
        weight = torch.ones(channels, device=device)
        if gated and backward:
            return lambda: gated_rms_norm_backward(grad, x, z, weight, 1e-5, channels, False)
        if gated:
            return lambda: gated_rms_norm(x, z, weight, 1e-5, channels, False)
        if backward:
            return lambda: rms_norm_backward(grad, z, x, weight, 1e-5)
        return lambda: add_rms_norm(x, z, weight, 1e-5, torch.bfloat16)

    return trial


_SIZES = (768, 1536, 2560, 5120)
_TILES = (2048, 4096, 8192)  # values that a program has in registers at once: 4096 are 32 a thread with 4 warps
_WARPS = (8, 16, 24, 32)  # on a multiprocessor
FORWARD = Tunable("rms_norm.forward", _SIZES, _trial(False, False), tile=_TILES)
BACKWARD = Tunable("rms_norm.backward", _SIZES, _trial(True, False), chunks=(2, 3, 5), warps_at_once=_WARPS)
GATED_FORWARD = Tunable("gated_rms_norm.forward", _SIZES, _trial(False, True), tile=_TILES)
GATED_BACKWARD = Tunable("gated_rms_norm.backward", _SIZES, _trial(True, True), chunks=(2, 3, 5), warps_at_once=_WARPS)
TUNABLES = (FORWARD, BACKWARD, GATED_FORWARD, GATED_BACKWARD)
