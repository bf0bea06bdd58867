"""Reads a source into samples, one at a time."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from p2d_core.errors import DataError
from p2d_core.progress import EVERY, Progress, no_progress
from p2d_core.samples.columns import RowMap, column_map
from p2d_core.samples.formats import rows_of
from p2d_core.samples.hub import hub_rows
from p2d_core.samples.rows import BrokenRow, Position, Row
from p2d_core.samples.schema import Sample
from p2d_core.samples.source import DataFile, SourceSpec, content_hash, files_of
from p2d_core.samples.texts import RowProblem

__all__ = ["BadRow", "SourceSpec", "content_hash", "read_samples"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no sample; ``row`` is its position in the source, from 0."""

    source: str
    row: int
    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


def read_samples(
    source: SourceSpec,
    *,
    on_bad_row: Callable[[BadRow], None] | None = None,
    progress: Progress = no_progress,
) -> Iterator[Sample]:
    """The samples of a source in order, streamed.

    Texts are kept as they are, but for CRLF, leading blank lines and white space at the end
    (`texts.canonical_text`). Rows that were set aside by ``skip`` keep their numbers, and count.

    Args:
        on_bad_row: is told of a row that is no sample, which is then left out; without it the
            first such row is an error. What makes a whole file unreadable always is, and so is a
            source without a single sample.
        progress: is told of rows, and of how many there will be by the share of the files' bytes
            that is read; of a hub dataset that is not known.

    Raises:
        DataError: a file or a row cannot be read as samples; names file and line or row, from 1.
    """
    if source.is_on_hub:
        return _samples(source, [hub_rows(source)], on_bad_row, progress)
    files = files_of(source)  # here, so that a missing file is known before the first sample
    read = _FilesRead(files)
    rows = (_rows_of_file(file, read.begin(file)) for file in files)
    return _samples(source, rows, on_bad_row, progress, read)


class _FilesRead:
    """How far the reading of a source's files has come, in their bytes."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        self._sizes = {file.path: file.path.stat().st_size for file in files}
        self._total = sum(self._sizes.values())
        self._before = self._size = 0
        self._position = Position()

    def begin(self, file: DataFile) -> Position:
        """The position in the next file."""
        self._before += self._size
        self._size = self._sizes[file.path]
        self._position = Position()
        return self._position

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return (self._before + self._position.share * self._size) / max(1, self._total)


def _rows_of_file(file: DataFile, position: Position) -> Iterator[Row | BrokenRow]:
    empty = True
    for row in rows_of(file, position):
        empty = False
        yield row
    if empty:
        raise DataError(f"{file.path}: the file has no rows. Give a file with samples in it.")


def _samples(
    source: SourceSpec,
    files: Iterable[Iterator[Row | BrokenRow]],
    on_bad_row: Callable[[BadRow], None] | None,
    progress: Progress,
    read: _FilesRead | None = None,
) -> Iterator[Sample]:
    stop = None if source.limit is None else source.skip + source.limit
    n_rows = n_samples = 0
    for number, (mapping, row) in enumerate(islice(_mapped(source, files), stop)):
        n_rows = number + 1
        if n_rows % EVERY == 0:
            share = max(read.share if read else 0.0, n_rows / stop if stop else 0.0)
            progress(n_rows, round(n_rows / share) if share else 0)
        if number < source.skip:
            continue
        if isinstance(row, BrokenRow):
            problem = row.problem
        else:
            assert mapping is not None
            try:
                sample = mapping.sample_of(row.columns, source.name, number)
            except RowProblem as error:
                problem = str(error)
            else:
                n_samples += 1
                yield sample
                continue
        bad = BadRow(source.name, number, row.place, problem)
        if on_bad_row is None:
            raise DataError(str(bad))
        on_bad_row(bad)
    if n_rows <= source.skip:
        raise DataError(
            f"source {source.name!r}: skip is {source.skip}, but {source.path} has {n_rows} rows. "
            "Set a smaller `skip:`."
        )
    if not n_samples:
        raise DataError(
            f"source {source.name!r}: none of the {n_rows - source.skip} rows read of "
            f"{source.path} is a sample, the last one because {problem} "
            "Name its columns with `prompt:` and `response:`, or give another file."
        )


def _mapped(
    source: SourceSpec, files: Iterable[Iterator[Row | BrokenRow]]
) -> Iterator[tuple[RowMap | None, Row | BrokenRow]]:
    """Every row with its file's map, which the first row with the right columns decides."""
    for rows in files:
        mapping: RowMap | None = None
        for row in rows:
            if mapping is None and isinstance(row, Row):
                try:
                    mapping = column_map(row.columns, source)
                    log.debug("%s: %s", row.place, mapping)
                except RowProblem as problem:
                    row = BrokenRow(row.place, str(problem))
            yield mapping, row
