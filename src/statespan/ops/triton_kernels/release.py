"""Which releases of Triton the kernels work with, and what is said where one does not."""

import os
import re
import shutil
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from statespan.errors import BackendUnavailable, UserError, first_line

OLDEST = (3, 6)
REMEDY = "pip install 'triton>=3.6,<3.10'"  # the releases that the kernels are tested with


def why_not() -> str | None:
    """Why kernels cannot run with the Triton that is installed, in words; None where they can."""
    try:
        triton, language = import_module("triton"), import_module("triton.language")
        release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    except Exception as error:
        return f"triton does not load ({first_line(error)}); {REMEDY}"
    if release < OLDEST:
        return f"triton {triton.__version__} is too old; {REMEDY}"
    missing = sorted(name for name in _names_used() if not hasattr(language, name))
    if missing:
        return f"triton {triton.__version__} has no triton.language.{missing[0]}, which the kernels need; {REMEDY}"
    if sys.platform == "linux" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler to launch kernels, and there is none; install gcc or clang, or set CC"
    return None


def _names_used() -> set[str]:
    """What the kernels take from triton.language."""
    ops = Path(__file__).parents[1]
    files = (*ops.glob("*/triton*.py"), *ops.glob("triton_kernels/*.py"))
    return {name for file in files for name in re.findall(r"\btl\.([A-Za-z]\w*)", file.read_text())}


def refusal(error: BaseException, device: torch.device) -> Exception | None:
    """What to tell the user where Triton failed to compile a kernel; None where the error tells it itself.

    Running out of memory is torch.OutOfMemoryError whoever met it; faults of the GPU stay as they are.
    """
    if not isinstance(error, Exception) or isinstance(error, (UserError, torch.OutOfMemoryError)):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    if "triton" not in modules or "torch" in modules:
        return None
    if "Triton Error [" in str(error):  # the driver's
        return torch.OutOfMemoryError(first_line(error)) if "out of memory" in str(error) else None
    kernel, cause = frames[modules.index("triton")].f_locals.get("self"), error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip() or type(cause).__name__
    if hasattr(cause, "src"):  # a compilation error shows the kernel's text before it says what is wrong
        text = text.rpartition("\n")[2]
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    return BackendUnavailable(
        f"Triton {import_module('triton').__version__} does not compile {_name(kernel)} for {place}:"
        f" {first_line(text)}; {REMEDY}, or name another backend, such as backend='reference'"
    )


def _name(kernel: Any) -> str:
    function = getattr(kernel, "fn", None)
    if function is None:
        return "a kernel"
    return f"{function.__module__.split('.')[-2]}.{function.__name__}"
