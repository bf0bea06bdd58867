"""The processes that `torchrun` or `accelerate launch` started for one run, and what they say.

The first process runs the flow; the others help it where it asks them to. They tell each other
plain JSON through the launcher's store, and exchange tensors in a group that lives as long as a
piece of work.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from p2d_core.errors import ProcessError

T = TypeVar("T")

OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_COME = 600.0
"""For another process to be connected too, once this one is."""
AGAIN = "Start the run again: it goes on from what was finished."
LONG = timedelta(days=7)
"""Until a process that says nothing counts as gone: its launcher ends the others long before."""


@dataclass(frozen=True)
class Processes:
    """All processes of a run, as one of them sees them."""

    rank: int = 0
    size: int = 1
    shards_model: bool = False
    """Each holds a share of the model that is trained (FSDP2), not a copy (DDP)."""
    store: Any = None
    """The launcher's, ``torch.distributed.Store``."""
    work: str = ""
    """Which piece of work they are at; two never use the same keys of the store."""

    @property
    def first(self) -> bool:
        """Whether this is the one that runs the flow, writes and speaks."""
        return self.rank == 0

    def sharding(self, parallel: str | None) -> Processes:
        """The same with ``ddp`` or ``fsdp``; None leaves it as the launcher said."""
        return self if parallel is None else replace(self, shards_model=parallel == "fsdp")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``size``-th item; the shares of all processes are all items."""
        return items[self.rank :: self.size]

    def tell(self, key: str, value: Any) -> None:
        """Tells all of them a plain value."""
        self.store.set(f"{self.work}/{key}", json.dumps(value))

    def heard(self, key: str, seconds: float | None = None) -> Any:
        """What was told under a key, waited for; None if it is not within ``seconds``."""
        # asked again and again: the store's own wait writes a warning whenever it was in vain
        end = math.inf if seconds is None else time.monotonic() + seconds
        while not self.store.check([f"{self.work}/{key}"]):
            if time.monotonic() > end:
                return None
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return json.loads(self.store.get(f"{self.work}/{key}"))

    def as_the_first_says(self, key: str, value: T) -> T:
        """The first process' value, in all of them."""
        if self.size == 1:
            return value
        if self.first:
            self.tell(key, value)
            return value
        told: T = self.heard(key)
        return told

    def as_the_first_decides(self, value: bool) -> bool:
        """The first process' decision, in all of them; quick enough for every step."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        # on the CPU, over gloo: a GPU is not waited for
        flag = torch.tensor([value], dtype=torch.uint8)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    @contextmanager
    def group(self) -> Iterator[None]:
        """Tensors can be exchanged while the block runs.

        Raises:
            ProcessError: they did not come together, now or for earlier work.
        """
        global _apart
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if _apart:
            raise ProcessError(f"the processes lost each other before: {_apart}. {AGAIN}")
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore(f"{self.work}/group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=LONG,
            )
        except Exception as error:
            # torch numbers groups: from now on its numbers here are others than elsewhere
            _apart = str(error)
            raise ProcessError(
                f"the processes did not find each other: {_apart}. {AGAIN}"
            ) from error
        try:
            self._wait_for_all()
            yield
        finally:
            # whoever still waits for this process hears that it is gone
            dist.destroy_process_group()

    def _wait_for_all(self) -> None:
        """Who fails at once must not be gone while another still connects to it."""
        self.tell(f"in the group: {self.rank}", True)
        for rank in range(self.size):
            if self.heard(f"in the group: {rank}", SECONDS_TO_COME) is None:
                raise ProcessError(f"process {rank} did not come to help. {AGAIN}")


ALONE = Processes()
_apart = ""
"""Why this process can be in no group any more."""
_here = ALONE
_numbers = itertools.count()


def here() -> Processes:
    """The processes of this run; `ALONE` unless a launcher started several."""
    return _here


def join() -> Processes:
    """Takes part in what a launcher started, if one did; before torch is used.

    The launcher's variables are taken out of the environment: no library is to split work by
    itself, and precision is that of the settings. A process sees one GPU, that of its local rank.
    """
    global _here
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _here
    os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(
        os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_RANK", "0"))
    )
    # as torch is loaded here already; see flows.environment
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=LONG))
    _here = Processes(rank, size, os.environ.get("ACCELERATE_USE_FSDP") == "true", store, "run")
    for name in [*os.environ]:
        if name in OF_THE_LAUNCHER or name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_")):
            del os.environ[name]
    return _here


def own_gpu(visible: str | None, local_rank: int) -> str:
    """``CUDA_VISIBLE_DEVICES`` for one process: its own of those that all are given.

    None are given where it is empty; all there are where it is None.
    """
    if visible is None:
        return str(local_rank)
    return ",".join(visible.split(",")[local_rank : local_rank + 1])


def ask(job: Mapping[str, Any]) -> Processes:
    """Asks all other processes for a piece of work; gives the processes that are at it."""
    number = next(_numbers)
    _here.tell(f"job {number}", job)
    return replace(_here, work=f"work {number}")


def asked() -> Iterator[tuple[Processes, dict[str, Any]]]:
    """What the first process asks the others for, until it dismisses them."""
    while job := _here.heard(f"job {(number := next(_numbers))}"):
        yield replace(_here, work=f"work {number}"), job


def dismiss() -> None:
    """The other processes, if there are any, have nothing more to do and end."""
    if _here.size > 1 and _here.first:
        ask({})


def is_of_a_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the group is gone."""
    import torch.distributed as dist

    # gloo's have no type of their own, but name its source
    of_gloo = type(error) is RuntimeError and "gloo/" in str(error)
    return of_gloo or isinstance(error, dist.DistError)
