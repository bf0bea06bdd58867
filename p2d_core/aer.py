"""Costs that add up, and the Alignment Efficiency Ratio made from them."""

from __future__ import annotations

import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from p2d_core.memory import peak_memory

AER_STAGES = ("proxy", "heads", "scores", "subset", "model")
"""Terms of the numerator: T_proxy, T_rank (head_proxy too), T_score, T_select, T_train."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What making something took. Costs add with ``+``; of peak memory the larger counts."""

    wall_seconds: float = 0.0
    device_seconds: float = 0.0
    """Seconds during which the device (GPU, or all CPU cores lent to torch) was held."""
    samples: int = 0
    tokens: int = 0
    seconds_before: float = 0.0
    """Of the wall seconds those of runs that were stopped, from which the last one went on."""
    peak_memory_bytes: int = 0
    """Highest while it was made: of the GPU's allocator where there is one, else resident memory of
    the process, whatever else it did meanwhile."""
    machine: str = ""

    def __add__(self, other: Cost) -> Cost:
        machines = {m for cost in (self, other) for m in cost.machine.split(" + ") if m}
        return Cost(
            self.wall_seconds + other.wall_seconds,
            self.device_seconds + other.device_seconds,
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.seconds_before + other.seconds_before,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
            " + ".join(sorted(machines)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)


@cache
def machine_name() -> str:
    """The machine in words: GPU if torch has been loaded and sees one, else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    import psutil

    cores = psutil.cpu_count(logical=True)
    return f"{_processor()} ({cores} cores)"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(slots=True)
class Stopwatch:
    """Filled in when `measured` ends; ``samples`` and ``tokens`` are counted by whoever works."""

    samples: int = 0
    tokens: int = 0
    cost: Cost = field(default_factory=Cost)


_of_thread = threading.local()


@contextmanager
def in_turn(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Holds the lock. The seconds until it is free are no cost of who waits: who holds it pays."""
    start = time.perf_counter()
    with lock:
        _of_thread.waited = _waited() + time.perf_counter() - start
        yield


def _waited() -> float:
    """Seconds that this thread has waited for its turn."""
    return float(getattr(_of_thread, "waited", 0.0))


@contextmanager
def measured() -> Iterator[Stopwatch]:
    """Measures what its block costs; the cost stands in ``cost`` of what it yields."""
    watch = Stopwatch()
    with peak_memory() as peak_bytes:
        start = time.perf_counter() - _waited()
        try:
            yield watch
        finally:
            seconds = time.perf_counter() - _waited() - start
            watch.cost = Cost(
                wall_seconds=seconds,
                device_seconds=seconds,
                samples=watch.samples,
                tokens=watch.tokens,
                peak_memory_bytes=peak_bytes(),
                machine=machine_name(),
            )


@dataclass(frozen=True, slots=True)
class Reference:
    """What full fine-tuning on the whole corpus costs: the denominator of the AER.

    ``kind`` is ``measured`` (it was run) or ``calibrated`` (a step's steady time times the steps;
    ``spread_seconds`` is then the standard deviation of that product, 0 otherwise).
    """

    kind: str
    seconds: float
    spread_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class AER:
    """AER = (T_proxy + T_rank + T_score + T_select + T_train) / T_full (P2D, arXiv 2605.21558)."""

    stages: Mapping[str, float]
    """Seconds by term, keyed as `AER_STAGES`."""
    reference: Reference

    @property
    def ratio(self) -> float:
        """Lower is better; 1 is the price of full fine-tuning on everything."""
        return sum(self.stages.values()) / self.reference.seconds

    @property
    def speedup(self) -> float:
        """1 / AER."""
        return 1 / self.ratio
