"""How long work says how far it has come; who listens is not its business."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Progress = Callable[[int, int], None]
"""Is told how much is done, and of how much; 0 of all where that is not known."""

T = TypeVar("T")
EVERY = 500


def no_progress(done: int, total: int) -> None:
    """Nobody listens."""


def counted(items: Iterable[T], total: int, progress: Progress) -> Iterator[T]:
    """The items as they are; ``progress`` is told of every 500th and of the last."""
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        if done % EVERY == 0:
            progress(done, total)
    if done % EVERY:
        progress(done, total)
