"""The one schema that every data file is read into."""

import hashlib
import json
from dataclasses import dataclass

import pyarrow as pa

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("extra", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its response.

    ``row`` is the position in its source, from 0; ``extra`` is JSON of the columns not used.
    """

    sample_id: str
    source: str
    prompt: str
    response: str
    row: int
    extra: str = "{}"


def sample_id_of(prompt: str, response: str) -> str:
    """SHA-256 of the canonical prompt and response, hex; the same wherever the sample stands."""
    canonical = json.dumps([prompt, response], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_table(samples: list[Sample]) -> pa.Table:
    """A row a sample, in order."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in SAMPLE_SCHEMA.names}
    return pa.table(columns, schema=SAMPLE_SCHEMA)


def from_table(table: pa.Table) -> list[Sample]:
    """The inverse of `to_table`."""
    return [Sample(**row) for row in table.select(SAMPLE_SCHEMA.names).to_pylist()]
