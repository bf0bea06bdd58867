"""Progress of long work as Prefect's progress artifacts, for runs without a terminal."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from p2d_core.progress import Progress
from tasks.progress import listen

SECONDS_WORTH_TELLING = 3.0
SECONDS_BETWEEN = 5.0

log = logging.getLogger(__name__)


@contextmanager
def told_to_prefect() -> Iterator[None]:
    """Until it ends, the stages of this process tell Prefect and the log how far they are."""
    listen(_stage)
    try:
        yield
    finally:
        listen(None)


@contextmanager
def _stage(name: str) -> Iterator[Progress]:
    """A stage at work: told when it takes seconds, every few seconds, and at its end."""
    key = "progress-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    start = time.monotonic()
    told_at, made, last = start, None, (0, 0)
    lock = threading.Lock()

    def tell(done: int, total: int) -> None:
        nonlocal told_at, made, last
        with lock:
            last = (done, total)
            now = time.monotonic()
            wait = SECONDS_BETWEEN if made else SECONDS_WORTH_TELLING
            if total and now - told_at >= wait:
                told_at = now
                made = _told(made, key, name, done, total, now - start)

    yield tell
    if made:
        _told(made, key, name, *last, time.monotonic() - start)


def _told(
    made: UUID | None, key: str, name: str, done: int, total: int, seconds: float
) -> UUID | None:
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    left = (total - done) * seconds / done if done else 0.0
    text = f"{name}: {done:,} of {total:,} in {seconds:.0f} s" + (
        f", {left:.0f} s left" * (left > 0)
    )
    log.info(text)
    percent = 100.0 * done / total
    try:
        if made is None:
            return create_progress_artifact(percent, key=key, description=text)  # type: ignore[return-value]
        update_progress_artifact(made, progress=percent, description=text)
    except Exception as error:
        # how far work is must not stop the work
        log.warning("Prefect was not told how far %s is: %s", name, error)
    return made
