"""Rows that are no samples: how many may be left out, and what is kept of them."""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from p2d_core.errors import DataError
from p2d_core.samples.read import BadRow

REJECTED = "rejected.parquet"
"""What they are called in the artifact of their source."""

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

NAMED = 5
"""How many of them an error names."""


@dataclass
class RejectedRows:
    """Takes up to ``most`` bad rows, for ``on_bad_row`` of `read_samples`.

    Raises:
        DataError: there are more; names the first of them.
    """

    most: int = 0
    rows: list[BadRow] = field(default_factory=list)

    def __call__(self, bad: BadRow) -> None:
        self.rows.append(bad)
        if len(self.rows) > self.most:
            raise DataError(too_many(self.rows, self.most))

    def write(self, folder: Path) -> None:
        """Writes ``rejected.parquet``, a row a rejected row; nothing if there are none."""
        if self.rows:
            rows = [
                {"source": bad.source, "row": bad.row, "place": bad.place, "reason": bad.problem}
                for bad in self.rows
            ]
            table = pa.Table.from_pylist(rows, schema=REJECTED_SCHEMA)
            pq.write_table(table, folder / REJECTED, compression="zstd")


def too_many(rows: list[BadRow], most: int) -> str:
    """The error's words: the only one, or the first of several."""
    if most == 0:
        return str(rows[0])
    named = "\n".join(f"  {bad}" for bad in rows[:NAMED])
    return (
        f"more than {most} rows are no samples, which is as many as may be left out "
        f"(--skip-bad-rows, or skip_bad_rows in the settings). Mend them, or allow more. "
        f"The first {min(NAMED, len(rows))}:\n{named}"
    )
