"""Where the dear work of stages is done: in this process, or by the workers that a flow has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from p2d_core.aer import machine_name
from p2d_core.store import Making

Build = Callable[..., None]
"""What makes a stage's artifact: a module's function of a `Making` and the stage's inputs."""


class Workers(Protocol):
    """Processes that do the work of stages, on this machine or others; each does one at a time."""

    size: int
    """How many there are."""
    threads: int
    """Of torch in each, unless the run says how many."""
    machine: str
    """What they run on, in words."""

    def build(self, function: Build, making: Making, inputs: Mapping[str, Any]) -> None:
        """Calls ``function`` in whichever is free next; what it makes lies in ``making`` then."""

    def stop(self) -> None:
        """Ends all work at once: who waits for some gets an error."""


_workers: Workers | None = None


@contextmanager
def working_for_us(workers: Workers) -> Iterator[None]:
    """While its block runs, stages of this process give their dear work to ``workers``."""
    global _workers
    _workers = workers
    try:
        yield
    finally:
        _workers = None


def workers() -> Workers | None:
    """Who does the dear work; None: this process."""
    return _workers


def machine() -> str:
    """What the dear work is done on, in words."""
    return _workers.machine if _workers is not None else machine_name()


def stays(making: Making, **inputs: Any) -> Mapping[str, Any] | None:
    """For a stage that no worker does."""
    return None


def as_it_is(making: Making, **inputs: Any) -> Mapping[str, Any] | None:
    """For a stage that a worker does with the same inputs."""
    return inputs
