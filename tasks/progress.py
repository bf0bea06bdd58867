"""How far long work has come: told to whoever listens, the log if nobody does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from p2d_core.progress import Progress

Listener = Callable[[str], AbstractContextManager[Progress]]
"""Given the name of a stage, what is told of its progress while the stage runs."""

log = logging.getLogger(__name__)


@contextmanager
def _to_the_log(stage: str) -> Iterator[Progress]:
    start = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > 10 and done:
            told = now
            rate = done / (now - start)
            left = f" of {total}, {(total - done) / rate:.0f} s left" if total else ""
            log.info("%s: %d%s, %.1f/s", stage, done, left, rate)

    yield tell


_listener: Listener = _to_the_log


def listen(listener: Listener | None) -> None:
    """From now on ``listener`` is told; None: the log again."""
    global _listener
    _listener = listener or _to_the_log


def progress_of(stage: str) -> AbstractContextManager[Progress]:
    """A context in which the progress of a stage can be told."""
    return _listener(stage)
