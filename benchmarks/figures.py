"""Two things run in turn, the ratio of their times, and the goal it is held against."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from p2d_core.aer import machine_name

RUNS = 5


@dataclass(frozen=True)
class Figure:
    """One line of the table; a ratio is always ``a`` over ``b``, and meets a goal from below."""

    name: str
    a: str
    b: str
    a_seconds: float
    """Median over the runs."""
    b_seconds: float
    ratio: float
    """Median over the pairs of neighbouring runs."""
    ratio_min: float
    ratio_max: float
    goal: float
    met: bool
    machine: str
    model: str
    runs: int
    floor: float | None
    """The ratio of the operations or bytes that were counted on both sides."""
    floor_of: str
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def figure(
    name: str,
    a: str,
    b: str,
    seconds: tuple[Sequence[float], Sequence[float]],
    *,
    goal: float,
    model: str = "",
    floor: float | None = None,
    floor_of: str = "",
    note: str = "",
    ratios: Sequence[float] | None = None,
) -> Figure:
    """From the seconds of alternating runs; ``ratios`` when it is not time that is compared."""
    if ratios is None:
        ratios = [x / y for x, y in zip(*seconds, strict=True)]
    ratio = statistics.median(ratios)
    return Figure(
        name=name,
        a=a,
        b=b,
        a_seconds=statistics.median(seconds[0]),
        b_seconds=statistics.median(seconds[1]),
        ratio=ratio,
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        goal=goal,
        met=ratio <= goal,
        machine=machine_name(),
        model=model,
        runs=len(ratios),
        floor=floor,
        floor_of=floor_of,
        note=note,
    )


def alternate(
    *things: Callable[[], object], runs: int = RUNS, warm_up: int = 1
) -> list[list[float]]:
    """Seconds of each of ``things``, run in turn ``runs`` times after ``warm_up`` untimed ones."""
    seconds: list[list[float]] = [[] for _ in things]
    for run in range(warm_up + runs):
        for place, thing in enumerate(things):
            gc.collect()
            _synchronise()
            start = time.perf_counter()
            thing()
            _synchronise()
            if run >= warm_up:
                seconds[place].append(time.perf_counter() - start)
    return seconds


def matrix_product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product on this machine, right now."""
    n = 8192 if device == "cuda" else 1536
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = alternate(lambda: left @ right, runs=5)
    return 2 * n**3 / statistics.median(seconds)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
