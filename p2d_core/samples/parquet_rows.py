"""Rows of Parquet files, read a batch at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p2d_core.errors import DataError
from p2d_core.samples.rows import BrokenRow, Position, Row

BATCH_ROWS = 512


def parquet_rows(path: Path, position: Position) -> Iterator[Row | BrokenRow]:
    """The rows of all row groups in order; ``position`` follows them.

    Raises:
        DataError: the file is no Parquet, is cut short, or names a column twice.
    """
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise DataError(f"{path}: two columns have one name: {', '.join(names)}.")
            for batch in file.iter_batches(BATCH_ROWS):
                for columns in _batch_rows(batch):
                    row += 1
                    position.share = row / file.metadata.num_rows
                    place = f"{path}, row {row}"
                    if isinstance(columns, Exception):
                        yield BrokenRow(place, f"a value cannot be read ({columns}). Mend it.")
                    else:
                        yield Row(place, columns)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError) or getattr(error, "errno", None):
            raise
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}, after row {row}: not a whole Parquet file ({reason}). "
            "Write or download it again."
        ) from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """Rows, or why one cannot be read: text that is not UTF-8, a date past the year 9999, or in a
    time zone that is not known here (a KeyError)."""
    try:
        yield from batch.to_pylist()
    except (ValueError, KeyError):
        for index in range(batch.num_rows):
            try:
                columns: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
            except (ValueError, KeyError) as error:
                yield error
            else:
                yield columns
