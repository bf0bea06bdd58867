"""Progress of long work: a live line in a terminal, plain lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_WORTH_A_LINE = 2.0


class StageProgress:
    """What a run shows of itself while it works; goes to standard error. Safe in threads.

    Plain lines come at most every ten seconds, and when a stage of some seconds is done.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.live = self.console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Counts(),
            _Pace(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> StageProgress:
        if self.live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._bars.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A stage at work; what it yields is told how much is done, and of how much."""
        bar = self._bars.add_task(name, total=None) if self.live else None
        stage = _Stage(self, name, bar)
        try:
            yield stage.tell
            stage.end()
        finally:
            if bar is not None:
                self._bars.remove_task(bar)


class _Stage:
    def __init__(self, of: StageProgress, name: str, bar: TaskID | None) -> None:
        self._of, self._name, self._bar = of, name, bar
        self._start = self._told = time.monotonic()
        self._first: tuple[int, float] | None = None
        """What was told first, and when: what came before may be the work of a run that was killed,
        so that the pace is of what comes after."""

    def tell(self, done: int, total: int) -> None:
        """``done`` of ``total``, in whatever the stage counts."""
        now = time.monotonic()
        first, at = self._first = self._first or (done, now)
        if self._bar is not None:
            self._of._bars.update(
                self._bar, completed=done, total=total or None, first=first, at=at
            )
            return
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        rate = (done - first) / (now - at) if now > at else 0.0
        if total:
            self._line(f"{self._name}: {done:,} of {total:,}{pace(rate, total - done)}")
        else:
            self._line(f"{self._name}: {done:,}" + (f", {rate:.1f}/s" if rate else ""))

    def end(self) -> None:
        """A line if it took long enough to be missed."""
        seconds = time.monotonic() - self._start
        if self._bar is None and seconds >= SECONDS_WORTH_A_LINE:
            self._line(f"{self._name}: done in {duration(seconds)}")

    def _line(self, text: str) -> None:
        self._of.console.print(
            f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True
        )


class _Counts(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Such as 1,200/3,000; or 1,200 while nobody knows of how many."""
        if not task.completed and not task.total:
            return Text("")
        of = f"/{int(task.total):,}" if task.total else ""
        return Text(f"{int(task.completed):,}{of}")


class _Pace(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Rate and time left, once they are known."""
        done = task.completed - task.fields.get("first", 0)
        seconds = time.monotonic() - task.fields.get("at", time.monotonic())
        if not task.total or not done or seconds < 1:
            return Text("")
        left = pace(done / seconds, task.total - task.completed).removeprefix(", ")
        return Text(left, style="cyan")


def pace(rate: float, rest: float) -> str:
    """Such as ", 45.2/s, 1 min 20 s left"; empty while nothing is done."""
    if rate <= 0:
        return ""
    shown = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return f", {shown}, {duration(rest / rate)} left"


def duration(seconds: float) -> str:
    """Such as 0.4 s, 12 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def listening() -> Iterator[StageProgress]:
    """Shows the progress that the tasks tell, as long as its block runs."""
    from tasks.progress import listen

    with StageProgress() as progress:
        listen(progress.stage)
        try:
            yield progress
        finally:
            listen(None)
