"""The most memory that something takes while it runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def peak_megabytes(thing: Callable[[], object]) -> float:
    """MB beyond what was held before: of the GPU's allocator, or resident where there is none."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        thing()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        RESET.write_text("5")  # the high-water mark falls to what is resident now
        before = resident("VmRSS")
        thing()
        return resident("VmHWM") - before
    except OSError:
        return float("nan")


def resident(name: str) -> float:
    """VmRSS, MB resident now, or VmHWM, the most that this process had (Linux)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(name):
            return float(line.split()[1]) / 1024
    raise OSError(f"{STATUS} has no {name}")
