"""A query in a process of its own, that is ended when it takes too long or too much memory.

DuckDB's own limits do not do: a single call such as ``repeat('x', 2000000000)`` heeds neither its
memory limit nor an interruption.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import pyarrow as pa

from p2d_core.errors import InputError
from p2d_core.store.query import open_reader
from p2d_core.store.store import Store

LOOK_SECONDS = 0.05
SHARE_OF_DUCKDB = 0.5
"""Of the memory; the rest is for what DuckDB does not count."""
REFUSED = 2
"""Exit code of the process when the query cannot be run as it is."""


@dataclass(frozen=True)
class Bounds:
    """What a query may take."""

    seconds: float = 60.0
    """Of waiting for it; not those in which its rows are being read."""
    memory_bytes: int = 2 * 10**9
    """Of its process. It may put as much aside on the disk."""


@contextmanager
def bounded_query(
    store: Store, sql: str, bounds: Bounds = Bounds()
) -> Iterator[pa.RecordBatchReader]:
    """The rows of one SELECT over the store's views, streamed; see `query.open_reader`.

    Raises:
        InputError: also while the rows are read: the query is refused, fails, or is stopped.
    """
    spill = store.root / ".scratch" / f"sql-{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-P", "-m", __name__, str(store.root), str(spill)]
    command += [str(bounds.memory_bytes), str(os.getpid())]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        )
        watch = _Watch(process, bounds)
        threading.Thread(target=watch.look, daemon=True).start()
        try:
            yield _rows(process, watch, sql, said)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            shutil.rmtree(spill, ignore_errors=True)


@dataclass
class _Watch:
    """Looks at the process as long as it is there, and ends it at a bound."""

    process: subprocess.Popen[bytes]
    bounds: Bounds
    waiting: bool = True
    """Whether someone waits for it at the moment."""
    stopped: str = ""
    """Why it was ended, if it was."""

    def look(self) -> None:
        seconds = 0.0
        before = time.monotonic()
        with_memory = psutil.Process(self.process.pid)
        while self.process.poll() is None and not self.stopped:
            time.sleep(LOOK_SECONDS)
            now = time.monotonic()
            seconds += (now - before) if self.waiting else 0.0
            before = now
            try:
                held = with_memory.memory_info().rss
            except psutil.Error:
                return
            if seconds > self.bounds.seconds:
                self._stop(
                    f"the query was stopped: it took more than {self.bounds.seconds:g} seconds. "
                    "Ask for less (WHERE, LIMIT), or give it longer with --seconds."
                )
            elif held > self.bounds.memory_bytes:
                self._stop(
                    "the query was stopped: it took more than "
                    f"{self.bounds.memory_bytes / 10**9:g} GB of memory. Ask for less (WHERE, "
                    "LIMIT, fewer columns), or give it more with --memory."
                )

    def _stop(self, why: str) -> None:
        self.stopped = why
        self.process.kill()


def _rows(
    process: subprocess.Popen[bytes], watch: _Watch, sql: str, said: IO[bytes]
) -> pa.RecordBatchReader:
    assert process.stdin is not None
    try:
        process.stdin.write(sql.encode(errors="replace"))
        process.stdin.close()
        stream = pa.ipc.open_stream(process.stdout)
    except (OSError, pa.ArrowException) as error:
        raise _why(process, watch, said) from error

    def batches() -> Iterator[pa.RecordBatch]:
        while True:
            watch.waiting = True
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                break
            except (OSError, pa.ArrowException) as error:
                raise _why(process, watch, said) from error
            watch.waiting = False
            yield batch
        # a stream that is cut off between two batches looks as if it had ended
        if process.wait() != 0:
            raise _why(process, watch, said)
        sys.stderr.write(_told(said))

    return pa.RecordBatchReader.from_batches(stream.schema, batches())


def _why(process: subprocess.Popen[bytes], watch: _Watch, said: IO[bytes]) -> Exception:
    code = process.wait()
    if watch.stopped:
        return InputError(watch.stopped)
    told = _told(said).strip()
    if code == REFUSED:
        return InputError(told)
    if code < 0:
        return InputError(
            f"the query was stopped by the system (signal {-code}): it probably took more memory "
            "than there is. Ask for less (WHERE, LIMIT, fewer columns)."
        )
    return RuntimeError(f"the process of the query failed with code {code}: {told}")


def _told(said: IO[bytes]) -> str:
    said.seek(0)
    return said.read().decode(errors="replace")


def _serve(root: str, spill: str, memory_bytes: str, asked_by: str) -> None:
    """In the process: the query from stdin, its rows as an Arrow stream to stdout."""
    threading.Thread(target=_end_with, args=(int(asked_by), spill), daemon=True).start()
    sql = sys.stdin.buffer.read().decode()
    memory = int(int(memory_bytes) * SHARE_OF_DUCKDB)
    try:
        with open_reader(Store(Path(root)), Path(spill), memory) as reader:
            rows: Any = reader.run(sql)
            with pa.ipc.new_stream(sys.stdout.buffer, rows.schema) as writer:
                for batch in rows:
                    writer.write_batch(batch)
                    sys.stdout.buffer.flush()
    except InputError as error:
        sys.stderr.buffer.write(str(error).encode(errors="replace"))
        sys.exit(REFUSED)


def _end_with(asked_by: int, spill: str) -> None:
    """Who asked may be killed, and would then stop this process at no bound."""
    while os.getppid() == asked_by:
        time.sleep(LOOK_SECONDS)
    shutil.rmtree(spill, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
