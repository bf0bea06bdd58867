"""The settings of a Ray cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from flows.settings_base import Count, Section


def _part_or_whole(number: float) -> float:
    if number > 1 and not number.is_integer():
        raise ValueError("more than one has to be a whole number")
    return number


class RaySettings(Section):
    """Which Ray cluster works, and how much of it, with engine: ray; cannot change a result."""

    address: Annotated[str, Field(pattern=r"^(auto|(ray://)?[^\s/]+:\d{1,5})$")] | None = None
    """auto, HOST:6379 or ray://HOST:10001; if empty, a cluster on this machine for the run."""
    workers: Count = 2
    """Processes that each load the base model and do one stage or shard at a time."""
    cpus_per_worker: Count = 1
    """Cores that each worker holds, and threads of torch where `threads` is 0."""
    gpus_per_worker: Annotated[float, Field(ge=0), AfterValidator(_part_or_whole)] = 0
    """GPUs that each worker holds; 0.5 lets two share one."""
