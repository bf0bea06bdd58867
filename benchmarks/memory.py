"""The most memory that something takes while it runs, and what it leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from p2d_core.memory import peak_memory, resident_bytes


def peak_megabytes(thing: Callable[[], object]) -> float:
    """MB beyond what was held before: of the GPU's allocator, or resident where there is none."""
    gc.collect()
    # what earlier runs gave back, and the allocator kept, would count as held before
    with suppress(OSError, AttributeError):
        CDLL("libc.so.6").malloc_trim(0)
    with peak_memory() as peak_bytes:
        try:
            on_gpu = torch.cuda.is_available()
            before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS")
        except OSError:
            return float("nan")
        thing()
        if on_gpu:
            torch.cuda.synchronize()
        return (peak_bytes() - before) / 2**20


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
