"""Where and with what something was measured, and the memory that it took at most."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["PeakMemory", "command_line", "describe_device", "device_name"]


def device_name(device: str | torch.device) -> str:
    """The processor's name, of a CPU or of a GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_device(device: str | torch.device, processes: int = 1) -> dict[str, Any]:
    """The ``device`` of a record."""
    return {
        "type": torch.device(device).type,
        "name": device_name(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def command_line(program: str, arguments: Sequence[str]) -> str:
    """A command as it would be typed, without the folders of this machine."""
    shown = [os.path.relpath(word) if os.path.isabs(word) else word for word in arguments]
    return " ".join([program, *(shlex.quote(word) for word in shown)])


class PeakMemory:
    """Highest memory from here on: what torch allocated on a GPU, else what the process holds in memory.

    Where the kernel does not let the high-water mark of a process be reset (anywhere but on Linux), the peak is that
    since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind = "allocated on the GPU by torch" if device.type == "cuda" else "resident in memory"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def read(self) -> int:
        """Bytes, or 0 where the platform does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            pass
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
