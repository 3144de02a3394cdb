"""The C entry of a kernel: takes work items off a shared counter until none is left. Imported only to compile.

The call buffer is an array of 8-byte words: 0 the next item, 1 the next worker's number, 2 the finished items, all
counted up by all threads, 3 the number of items, and from ARGUMENTS on the kernel's int64 arguments, then its float64
ones, which become float32.
"""

from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from statespan.ops.numba_kernels.threads import ARGUMENTS, FINISHED
from statespan.ops.numba_kernels.vector import F32, I64, jit, typed


def _word(builder: Any, call: Any, index: int, element: Any = I64) -> Any:
    pointer = builder.gep(builder.bitcast(call, I64.as_pointer()), [I64(index)])
    return builder.bitcast(pointer, element.as_pointer())


@typed(types.int64, types.voidptr)
def _take_item(builder: Any, call: Any) -> Any:
    return builder.atomic_rmw("add", _word(builder, call, 0), I64(1), "monotonic")


@typed(types.int64, types.voidptr)
def _take_worker(builder: Any, call: Any) -> Any:
    return builder.atomic_rmw("add", _word(builder, call, 1), I64(1), "monotonic")


@typed(types.void, types.voidptr)
def _finish_item(builder: Any, call: Any) -> None:
    builder.atomic_rmw("add", _word(builder, call, FINISHED), I64(1), "release")


@typed(types.int64, types.voidptr)
def _num_items(builder: Any, call: Any) -> Any:
    return builder.load(_word(builder, call, 3))


def _arguments(num_ints: int, num_floats: int) -> Any:
    """An intrinsic that reads the kernel's arguments into a tuple."""

    def arguments(typingctx: Any, call: Any) -> Any:
        kind = types.Tuple([types.int64] * num_ints + [types.float32] * num_floats)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = [builder.load(_word(builder, args[0], ARGUMENTS + i)) for i in range(num_ints)]
            for i in range(num_ints, num_ints + num_floats):
                wide = builder.load(_word(builder, args[0], ARGUMENTS + i, ir.DoubleType()))
                words.append(builder.fptrunc(wide, F32))
            return context.make_tuple(builder, kind, words)

        return kind(types.voidptr), codegen

    return intrinsic(arguments)


def entry_point(kernel: Any, num_ints: int, num_floats: int) -> Any:
    """The compiled C function of `kernel(item, worker, *ints, *floats)`, as a Numba CFunc."""
    arguments: Any = _arguments(num_ints, num_floats)
    body = jit(getattr(kernel, "py_func", kernel))

    @cfunc(types.void(types.voidptr), error_model="numpy")
    def entry(call: Any) -> None:
        worker = _take_worker(call)
        item = _take_item(call)
        while item < _num_items(call):
            body(item, worker, *arguments(call))
            _finish_item(call)
            item = _take_item(call)

    return entry
