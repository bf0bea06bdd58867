"""`p2d` commands in processes of their own that need no start-up: forked from one that is warm.

This module run as a program is the warm process: it has imported all that a run needs, and forks
a child for each line of JSON on standard input. A child is the `p2d` entry point and nothing else,
but for a watch over the files that it touches in its store, which can end it at a given one.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

USED_BY_A_RUN = (
    "flows.adapt",
    "flows.cli.main",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking",
    "p2d_core.adaptation.exact_lora",
    "p2d_core.adaptation.training",
    "scipy.stats",
    "sklearn.feature_extraction.text",
)
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass
class Child:
    """A `p2d` command at work, or one that has ended."""

    warm: "Warm"
    pid: int
    log: Path
    started: float = field(default_factory=time.perf_counter)

    def kill(self) -> None:
        """SIGKILL; nothing happens to one that has ended."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code; minus the signal's number if one ended it."""
        return self.warm.ask(wait=self.pid)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def is_stopped(self) -> bool:
        """Whether it has come to where its watch stops it."""
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    @property
    def said(self) -> str:
        """What it wrote to standard output and standard error."""
        return self.log.read_text() if self.log.exists() else ""


class Warm:
    """The warm process, as seen from a test."""

    def __init__(self, folder: Path, store: Path, api_url: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        self.folder, self.store, self.temporary = folder, store, folder / "tmp"
        self.temporary.mkdir()
        own = {
            "OMP_NUM_THREADS": "1",
            "P2D_STORE": str(store),
            "PREFECT_API_URL": api_url,
            "PYTHONPATH": os.getcwd(),
            "TMPDIR": str(self.temporary),
        }
        self._count = 0
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm", str(store)],
            env=kept | own,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.ask(ready=True)

    def ask(self, **request: Any) -> Any:
        with self._turn:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        assert answer, "the warm process is gone"
        return json.loads(answer)

    def start(self, *words: str, **watch: Any) -> Child:
        """Starts ``p2d *words``; ``watch``: see `Watch`."""
        self._count += 1
        log = self.folder / f"said-{self._count}.txt"
        pid = self.ask(words=words, folder=str(self.folder), log=str(log), watch=watch)
        return Child(self, pid, log)

    def run(self, *words: str, **watch: Any) -> tuple[int, str]:
        """Runs ``p2d *words`` to its end: exit code and what it said."""
        child = self.start(*words, **watch)
        return child.wait(), child.said

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Watch:
    """Sees what a process does to the files of its store, and can end it in the midst of that.

    ``events``: file to which all of them are written at the end.
    ``end_at``: number of the event before which the process ends itself by SIGKILL;
    ``stop_after``: pattern; before the next event after the first that has it, the process stops
    for good, by SIGSTOP.
    ``armed_by``: from the first event whose text this pattern is found in, no file may grow larger
    than ``bytes``: the kernel lets a write go so far and then ends the process (SIGXFSZ).
    """

    def __init__(
        self,
        store: str,
        events: str | None = None,
        end_at: int | None = None,
        stop_after: str | None = None,
        armed_by: str | None = None,
        bytes: int = 0,
    ) -> None:
        self.store = store
        self.events_file = events
        self.end_at = end_at
        self.stop_after = stop_after
        self.stop_now = False
        self.armed_by = armed_by
        self.bytes = bytes
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not isinstance(path, str) or not path.startswith(self.store):
            return
        mode = f" {arguments[1]}" if event == "open" else ""
        text = f"{event}{mode} {path.removeprefix(self.store)}"
        self.seen.append(text)
        if len(self.seen) - 1 == self.end_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.stop_now:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.stop_now = self.stop_after is not None and bool(re.search(self.stop_after, text))
        if self.armed_by is not None and re.search(self.armed_by, text):
            self.armed_by = None
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.bytes))

    def end(self) -> None:
        if self.events_file is not None:
            Path(self.events_file).write_text(json.dumps(self.seen))


def _import_all(store: Path) -> None:
    from flows.environment import prepare_environment

    prepare_environment(store, verbose=True)
    for name in USED_BY_A_RUN:
        import_module(name)


def _child(request: dict[str, Any], store: str) -> int:
    os.chdir(request["folder"])
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    sys.argv = ["p2d", *request["words"]]
    watch = Watch(store, **request["watch"])
    if request["watch"]:
        sys.addaudithook(watch)
    from flows.cli.main import run

    code: Any = 0
    try:
        run()
    except SystemExit as ending:
        code = ending.code or 0
    watch.end()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def main(store: str) -> None:
    """Answers requests until standard input ends; children that are at work then are killed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import_all(Path(store))
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = True
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            children.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(status)
        elif "words" in request:
            answer = os.fork()
            if answer == 0:
                try:
                    code = _child(request, store)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    code = 70
                sys.stderr.flush()
                os._exit(code)
            children.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
