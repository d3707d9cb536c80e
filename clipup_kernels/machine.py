"""The machine of a measurement: the processor or card, the instructions that the kernels use, and versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from .backend_info import backend_info, package_version


def processor_name(device: str | torch.device = "cpu") -> str:
    """The name of the CPU or of the CUDA card.

    On Linux the CPU's name is that in /proc/cpuinfo; elsewhere, and for CPUs without a name there, Python's.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """A record of the machine for results computed on this device. All values are JSON."""
    backends = backend_info()
    return {
        "processor": processor_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "compiled": backends["compiled"],
        "instructions": backends["instructions"],
        "matmul_dtypes": backends["matmul_dtypes"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": package_version("open_clip_torch"),
        "clipup": backends["version"],
    }
