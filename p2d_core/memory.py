"""The most memory that this process holds while something is done."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
HIGH_WATER_MARK = "5"
"""Written to `CLEAR`: the mark falls to what is resident now."""

_lock = threading.Lock()
_watching = 0


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """What it yields gives the highest bytes since its block began, of all the process does.

    Of the GPU's allocator where there is one, else resident. Where blocks overlap those that begin
    later count from the first one's beginning; where the mark cannot be reset (not Linux) all
    count from the process' start.
    """
    global _watching
    with _lock:
        if not _watching:
            _forget()
        _watching += 1
    try:
        yield _peak_bytes
    finally:
        with _lock:
            _watching -= 1


def resident_bytes(name: str) -> int:
    """VmRSS, what is resident now, or VmHWM, the mark.

    Raises:
        OSError: this is not Linux.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")


def _forget() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            CLEAR.write_text(HIGH_WATER_MARK)


def _peak_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        return resident_bytes("VmHWM")
    # macOS counts in bytes, others in KiB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
