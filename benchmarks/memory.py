"""The most memory that something takes while it runs, and what it leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Made(TorchDispatchMode):
    """Sees every tensor that is made while it is entered, whatever holds it afterwards."""

    def __init__(self, but: set[int]) -> None:
        super().__init__()
        self.but = but
        """Addresses of what was there before, and is only looked at in another way."""
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.but:
                    # no other storage can have its place while there is a weak reference
                    self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def still_there(self) -> int:
        """Bytes of what was made and is held."""
        gc.collect()
        return sum(n_bytes for storage, n_bytes in self.seen.values() if not storage.expired())
