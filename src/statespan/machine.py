"""What the figures of a report depend on: the computer, its cores and the versions."""

import os
import platform
import subprocess
from pathlib import Path


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
