"""CUDA C++ to machine code through NVRTC, once for each kernel and kind of GPU, kept on disk.

A kernel's file is compiled together with `device.cuh` and the headers it names, under a name made of all that it
depends on: the text, the macros, the kind of GPU and NVRTC's version. No header of the CUDA toolkit is needed.
"""

import hashlib
import re
import sys
import threading
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from statespan.errors import BackendUnavailable, first_line
from statespan.ops.kernel_cache import announce, cache_directory, store

HERE = Path(__file__).parent
_importing = threading.Lock()  # cuda.core's parts import each other: two threads at once would see it half made


@cache
def cuda_core() -> Any:
    """The module cuda.core; its names come from compiled code that type checkers do not see."""
    with _importing:
        return import_module("cuda.core")


@cache
def source_of(file: Path) -> str:
    """The text of device.cuh and of the file, with the files of its folder that it includes put in their places."""

    def included(match: re.Match[str]) -> str:
        return (file.parent / match[1]).read_text()

    text = re.sub(r'^#include "(.+)"\n', included, file.read_text(), flags=re.MULTILINE)
    return (HERE / "device.cuh").read_text() + text


def compile_cubin(file: Path, arch: str, macros: Mapping[str, str | int], log: list[str] | None = None) -> bytes:
    """The machine code of the file's kernels for "sm_90" and the like; the assembler's report is added to `log`."""
    core = cuda_core()

    class Log:
        def write(self, text: str) -> None:
            if log is not None:
                log.append(text)

    options = core.ProgramOptions(
        arch=arch,
        std="c++17",
        define_macro=[(name, str(value)) for name, value in macros.items()] or None,
        ptxas_options=["-v"],
    )
    return bytes(core.Program(source_of(file), "c++", options).compile("cubin", logs=Log()).code)


@cache
def nvrtc_version() -> str:
    """NVRTC's version; importing or calling it fails where it is not installed."""
    nvrtc: Any = import_module("cuda.bindings.nvrtc")
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _known_architectures() -> list[int]:
    """What NVRTC compiles for: 90 is sm_90."""
    nvrtc: Any = import_module("cuda.bindings.nvrtc")
    return nvrtc.nvrtcGetSupportedArchs()[1]


NEEDED = ("Device", "LaunchConfig", "ObjectCode", "Program", "ProgramOptions", "Stream", "launch")  # of cuda.core


def why_not(capability: tuple[int, int]) -> str | None:
    """Why kernels cannot be compiled here for a GPU of that compute capability, in words; None where they can."""
    remedy = "pip install --upgrade 'statespan[cuda]'"
    try:
        core, known = cuda_core(), _known_architectures()
    except Exception as error:
        return f"cuda-core or NVRTC does not load ({first_line(error)}); {remedy}"
    missing = [name for name in NEEDED if not hasattr(core, name)]
    if missing:
        return f"cuda-core {getattr(core, '__version__', '')} has no cuda.core.{missing[0]}, it is too old; {remedy}"
    major, minor = capability
    if 10 * major + minor not in known:
        return f"NVRTC {nvrtc_version()} does not know sm_{major}{minor}, the GPU is newer; {remedy}"
    return None


def cubin(file: Path, arch: str, macros: Mapping[str, str | int]) -> bytes:
    """As compile_cubin, from the disk if it was compiled before."""
    directory = cache_directory()
    dependencies = f"{source_of(file)} {sorted(macros.items())} {nvrtc_version()} {sys.platform}"
    digest = hashlib.sha256(dependencies.encode()).hexdigest()[:16]
    path = directory / f"{file.parent.name}.{file.stem}.{arch}.{digest}.cubin" if directory else None
    try:
        code = path.read_bytes() if path else b""
    except OSError:
        code = b""
    if not code:
        announce(f"{file.parent.name}.{file.stem} for {arch}", path)
        try:
            code = compile_cubin(file, arch, macros)
        except Exception as error:
            wrong = next((line for line in str(error).splitlines() if " error" in line), str(error))
            raise BackendUnavailable(
                f"NVRTC {nvrtc_version()} does not compile {file.parent.name}.{file.stem} for {arch}:"
                f" {first_line(wrong)}; pip install --upgrade 'statespan[cuda]', or name another backend"
            ) from error
        if path:
            store(path, code)
    return code
