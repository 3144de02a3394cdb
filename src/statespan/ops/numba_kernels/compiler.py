"""Compiles a kernel once and keeps its machine code on disk.

A kernel becomes one C function `void kernel(int64 *call)`, see `entry.py` for the layout of `call`. Its object code is
stored under a name made of everything it depends on: the processor, the versions of Numba and llvmlite, and the source
text of this package, of the files `cpu*.py` beside the kernel and beside the kernels it takes code from, and of the
modules of `ops` itself; kernels import from nowhere else. So a changed kernel never runs stale code, and a warm start
loads the object through llvmlite without importing Numba.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from statespan.ops import kernel_cache
from statespan.ops.numba_kernels.host import cpu_features, cpu_name

lock = threading.RLock()  # one thread compiles, the others wait for what it makes
_engines: list[Any] = []  # loaded code lives as long as the process


def load(module: str, function: str, ints: tuple[str, ...], floats: tuple[str, ...]) -> int:
    """The address of the compiled kernel `function` of `module`, from the disk if it was compiled before."""
    symbol = f"statespan_{function}"
    path = _cache_path(module, function, f"{ints} {floats}")
    try:
        code = path.read_bytes() if path else b""
    except OSError:
        code = b""
    if not code:
        kernel_cache.announce(f"{module.removeprefix('statespan.ops.').split('.')[0]}.{function}", path)
        code = _compile(module, function, ints, floats, symbol)
        if path:
            kernel_cache.store(path, code)
    return _link(code, symbol)


def _cache_path(module: str, function: str, arguments: str) -> Path | None:
    directory = kernel_cache.cache_directory()
    if directory is None:
        return None
    here = Path(__file__).parent
    sources = {*here.glob("*.py"), *here.parent.glob("*.py"), *_kernel_sources(module)}
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    versions = f"{version('numba')} {version('llvmlite')} {sys.platform}"
    digest.update(f"{arguments} {cpu_name()} {cpu_features()} {versions}".encode())
    return directory / f"{module.removeprefix('statespan.ops.')}.{function}.{digest.hexdigest()[:16]}.o"


@cache
def _kernel_sources(module: str) -> frozenset[Path]:
    """The file of a kernel module, its neighbours `cpu*.py`, and those of the kernel modules it imports from."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    origin = Path(spec.origin)
    sources = {origin, *origin.parent.glob("cpu*.py")}
    for source in list(sources):
        for other in re.findall(r"^from (statespan\.ops\.\w+\.cpu\w*) import", source.read_text(), re.MULTILINE):
            if importlib.util.find_spec(other).origin not in map(str, sources):  # type: ignore[union-attr]  # it is there
                sources |= _kernel_sources(other)
    return frozenset(sources)


def _target_machine() -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu_name(), features=cpu_features(), opt=3, codemodel="jitdefault", jit=True
    )


def _initialize_llvm() -> None:
    if not _engines:
        if int(version("llvmlite").split(".")[1]) < 45:
            llvm.initialize()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()


def _compile(module: str, function: str, ints: tuple[str, ...], floats: tuple[str, ...], symbol: str) -> bytes:
    from statespan.ops.numba_kernels.entry import entry_point

    kernel = getattr(importlib.import_module(module), function)
    expected = ["item", "worker", *ints, *floats]
    actual = list(inspect.signature(getattr(kernel, "py_func", kernel)).parameters)
    assert actual == expected, f"{module}.{function} takes {actual}, its Kernel says {expected}"
    entry = entry_point(kernel, len(ints), len(floats))
    _initialize_llvm()
    compiled = llvm.parse_assembly(entry.inspect_llvm().replace(entry.native_name, symbol))
    needs = {f.name for f in compiled.functions if f.is_declaration and not f.name.startswith("llvm.")}
    assert needs <= {"memset", "memcpy", "memmove"}, f"{module}.{function} calls {sorted(needs)}: nothing may raise"
    return _target_machine().emit_object(compiled)


def _link(code: bytes, symbol: str) -> int:
    _initialize_llvm()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol)


CFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
