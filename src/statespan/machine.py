"""The computer at hand: what the figures of a report depend on, and whether it has a device."""

import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from statespan.errors import UserError

if TYPE_CHECKING:
    import torch


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Rows for a report: processor or GPU, cores in use, memory format of their vectors, system and versions."""
    import torch

    processor = f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"
    if torch.device(device).type == "cuda":
        processor = f"{torch.cuda.get_device_name(torch.device(device))}, host {processor}"
    return {
        "processor": processor,
        "cores": f"{usable_cores()} usable, {torch.get_num_threads()} threads used by PyTorch",
        "system": f"{platform.system()} {platform.machine()}",
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name as its maker writes it, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def usable_device(name: "torch.device | str", remedy: str = "try cpu") -> "torch.device":
    """The device called `name`, or UserError with the remedy where this machine has none."""
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"{str(name)!r} is no device; write cpu, cuda, cuda:1 or mps") from None
    try:
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("this machine or this PyTorch has no MPS")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(name)!r} cannot be used here: {reason}; {remedy}") from None
    return device
