"""A worker on Ray: does stages one after the other, and keeps the base model loaded between them.

Nothing is imported above that takes long: Ray loads this module before the worker's environment
stands.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2d_core.progress import Progress
    from tasks.parcels import Made

LOGGERS = ("p2d_core", "tasks")
NEWS_SECONDS = 1.0
"""After which `told` answers even if there is nothing new."""


@dataclass(frozen=True)
class Examined:
    """What a worker says of itself before it gets work."""

    pid: int
    host: str
    code: str
    """`code_hash` of its P2D."""
    libraries: dict[str, str]
    machine: str
    base: str | None
    """Hash of the base model as it sees it; None if it was not to look."""
    refused: str = ""
    """Why it cannot see the base model; empty if it can."""


class StageWorker:
    """The actor. Ray calls `build` in one of its threads and `told` in another."""

    def __init__(self, environment: Mapping[str, str], folder: str | None) -> None:
        """Imports nothing yet.

        Args:
            environment: variables of whoever has the work done, for libraries that read them when
                they are imported; what is set here stays.
            folder: for its temporary files; the machine's own if None.
        """
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._folder = folder
        self._news = threading.Condition()
        self._progress = (0, "", 0, 0)

    def examine(self, base: str | None) -> Examined:
        """Imports what the work needs, and looks at the base model's folder if one is given."""
        import socket

        import torch  # noqa: F401 (whether there is a GPU is known to the machine's name then)

        from p2d_core.aer import machine_name
        from p2d_core.errors import ModelError
        from p2d_core.models import check_model_folder, model_hash
        from p2d_core.store.manifest import library_versions

        sha256, refused = None, ""
        if base is not None:
            try:
                check_model_folder(Path(base))
                sha256 = model_hash(Path(base))
            except (ModelError, OSError) as error:
                refused = str(error)
        return Examined(
            pid=os.getpid(),
            host=socket.gethostname(),
            code=code_hash(),
            libraries=library_versions(),
            machine=machine_name(),
            base=sha256,
            refused=refused,
        )

    def build(
        self,
        module: str,
        function: str,
        inputs: Mapping[str, Any],
        contents: Mapping[str, Any],
        scratch: str | None,
    ) -> Made:
        """Makes what the stage makes.

        Args:
            module, function: where the stage is defined.
            contents: by `tasks.parcels.place_of` of an input, Ray's reference to its files.
            scratch: folder that outlives this worker, if it and the driver see the same disk.
        """
        import ray

        from p2d_core.aer import measured
        from p2d_core.store import Making
        from p2d_core.store.room import storage_error
        from tasks.parcels import Made, read_files, unpacked
        from tasks.progress import listen

        do = getattr(import_module(module), function).fn.__wrapped__
        said: list[tuple[str, int, str]] = []
        listen(self._stage)
        with TemporaryDirectory(prefix="p2d-stage-", dir=self._folder) as name, _warnings(said):
            folder = Path(name)
            making = Making(folder / "made", Path(scratch) if scratch else folder / "scratch")
            making.folder.mkdir()
            making.scratch.mkdir(parents=True, exist_ok=True)
            try:
                here = unpacked(inputs, lambda place: ray.get(contents[place]), folder / "inputs")
                with measured() as watch:
                    do(making, **here)
                    watch.samples, watch.tokens = making.samples, making.tokens
                files = read_files(making.folder)
            except Exception as error:
                what = f"the worker {os.getpid()} on Ray"
                if told := storage_error(error, folder, what):
                    raise told from error
                raise
            return Made(
                files,
                making.facts,
                making.samples,
                making.tokens,
                making.seconds_before,
                watch.cost,
                said,
            )

    def told(self, known: int) -> tuple[int, str, int, int]:
        """How far the stage is: a number, its name, how much is done and of how much.

        Waits a moment for another number than the ``known`` one.
        """
        with self._news:
            self._news.wait_for(lambda: self._progress[0] != known, NEWS_SECONDS)
            return self._progress

    @contextmanager
    def _stage(self, name: str) -> Iterator[Progress]:
        def tell(done: int, total: int) -> None:
            with self._news:
                self._progress = (self._progress[0] + 1, name, done, total)
                self._news.notify_all()

        tell(0, 0)
        yield tell


@contextmanager
def _warnings(said: list[tuple[str, int, str]]) -> Iterator[None]:
    """Collects what `LOGGERS` warn of."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.name, record.levelno, record.getMessage()))

    handler = Collect(logging.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)


def code_hash() -> str:
    """SHA-256 (hex) of the Python files that decide what a stage makes."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(f for part in LOGGERS for f in (root / part).rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
