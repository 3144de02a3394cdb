"""The common ground of the CPU kernels.

A kernel is a Numba function in a module of its own, imported only when it has to be compiled. It works on vectors that
it holds in registers, loads and stores by address, and handles one work item a call:

    # ops/scale/cpu_kernels.py
    from statespan.ops.numba_kernels.vector import WIDTH, jit, load_any, store_any

    @jit
    def scale_rows(item, worker, x, y, row_size, bf16, factor):
        for column in range(0, row_size, WIDTH):
            value = load_any(x, item * row_size + column, row_size - column, bf16)
            store_any(y, item * row_size + column, value * factor, row_size - column, bf16)

The host names its arguments, all int64 and then all float32, and runs it over the items; tensors become addresses:

    # ops/scale/cpu.py
    from statespan.ops.numba_kernels import Kernel

    _scale_rows = Kernel("statespan.ops.scale.cpu_kernels", "scale_rows", ints="x y row_size bf16", floats="factor")

    def scale(x: Tensor, factor: float) -> Tensor:
        y = torch.empty_like(x)
        bf16 = x.dtype == torch.bfloat16
        _scale_rows(x.shape[0], x=x, y=y, row_size=x.shape[1], bf16=bf16, factor=factor)
        return y

Rules of the house:
- Every item is run once, by any thread, in any order. Items must not write to the same memory; sums over items go to a
  row for each item, added up afterwards, so that results do not depend on the threads.
- `worker` is a number below the number of threads, for scratch memory: `memory = scratch(workers, floats)` on the host
  with `workers=num_workers(items)`, given to the kernel and to the call. Never read scratch that was not written.
- Keep the tensors alive on the host until the call returns: a kernel sees addresses only. Check shapes, strides and
  types before: a wrong address ends the process.
- Branch on flags at run time, outside of the innermost loop, instead of compiling a kernel for each case.
- Inside kernels nothing may raise or allocate: no `range` with a step that is not a constant, no lists, no arrays.
  Helpers are decorated with `jit` (always inlined); tuples of vectors may be passed around and returned.
- Work that needs all of an earlier step is a later phase of the same kernel: `phases.wait_until`.
- A kernel module is named `cpu*.py` and takes code only from this package, from modules of such names beside it or
  another op, and from the modules of `ops` itself: a change in those is what makes the cache on the disk compile anew.
- A call costs some microseconds. Give `workers=1` for work of less than about twenty.

`vector.py` holds loads, stores and arithmetic, `special_functions.py` exp, softplus, sigmoid and silu, `phases.py` the
wait of one step for another, `host.py` the
vector width, `threads.py` how items meet PyTorch's threads, `compiler.py` the cache on the disk.
"""

from statespan.ops.numba_kernels.kernel import Kernel, scratch
from statespan.ops.numba_kernels.threads import num_workers

__all__ = ["Kernel", "num_workers", "scratch"]
