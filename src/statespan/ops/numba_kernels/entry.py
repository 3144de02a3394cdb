"""The C entry of a kernel: takes work items off a shared counter until none is left. Imported only to compile."""

from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from statespan.ops.numba_kernels.compiler import ARGUMENTS
from statespan.ops.numba_kernels.vector import jit

_WORD = ir.IntType(64)


def _word_pointer(builder: Any, base: Any, index: int, element: Any = _WORD) -> Any:
    pointer = builder.gep(builder.bitcast(base, _WORD.as_pointer()), [ir.Constant(_WORD, index)])
    return builder.bitcast(pointer, element.as_pointer())


@intrinsic
def _take_item(typingctx: Any, call: Any) -> Any:
    """The next work item: word 0, counted up by all threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word_pointer(builder, args[0], 0), ir.Constant(_WORD, 1), "monotonic")

    return types.int64(types.voidptr), codegen


@intrinsic
def _take_worker(typingctx: Any, call: Any) -> Any:
    """A number for this thread, from 0: word 1, counted up by all threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word_pointer(builder, args[0], 1), ir.Constant(_WORD, 1), "monotonic")

    return types.int64(types.voidptr), codegen


@intrinsic
def _num_items(typingctx: Any, call: Any) -> Any:
    """How many work items there are: word 2."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_word_pointer(builder, args[0], 2))

    return types.int64(types.voidptr), codegen


def _arguments(num_ints: int, num_floats: int) -> Any:
    """An intrinsic that reads the kernel's arguments: int64 words, then float64 words that become float32."""

    @intrinsic
    def arguments(typingctx: Any, call: Any) -> Any:
        kind = types.Tuple([types.int64] * num_ints + [types.float32] * num_floats)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = [builder.load(_word_pointer(builder, args[0], ARGUMENTS + i)) for i in range(num_ints)]
            for i in range(num_ints, num_ints + num_floats):
                wide = builder.load(_word_pointer(builder, args[0], ARGUMENTS + i, ir.DoubleType()))
                words.append(builder.fptrunc(wide, ir.FloatType()))
            return context.make_tuple(builder, kind, words)

        return kind(types.voidptr), codegen

    return arguments


def entry_point(kernel: Any, num_ints: int, num_floats: int) -> Any:
    """The compiled C function of `kernel(item, worker, *ints, *floats)`, as a Numba CFunc."""
    arguments = _arguments(num_ints, num_floats)
    body = jit(getattr(kernel, "py_func", kernel))

    @cfunc(types.void(types.voidptr), error_model="numpy")
    def entry(call: Any) -> None:
        worker = _take_worker(call)
        item = _take_item(call)
        while item < _num_items(call):
            body(item, worker, *arguments(call))
            item = _take_item(call)

    return entry
