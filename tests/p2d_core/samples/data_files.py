"""Data files that a test writes, and what is read of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_core.errors import DataError
from p2d_core.samples.read import SourceSpec, read_samples
from p2d_core.samples.schema import Sample

QA = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(5)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, rows: list[Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(path: str, **settings: Any) -> list[Sample]:
    return list(read_samples(SourceSpec("mine", path, **settings)))


def refused(path: str, **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        read(path, **settings)
    return str(error.value)


def formats_of_qa(folder: Path) -> dict[str, str]:
    csv_text = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in QA)
    paths = {
        "jsonl": jsonl(folder / "a.jsonl", QA),
        "json": write(folder / "a.json", json.dumps(QA, indent=2)),
        "lines named json": jsonl(folder / "lines.json", QA),
        "csv": write(folder / "a.csv", csv_text),
        "semicolons": write(folder / "b.csv", csv_text.replace(",", ";")),
        "tsv": write(folder / "a.tsv", csv_text.replace(",", "\t")),
        "parquet": str(folder / "a.parquet"),
        "BOM, CRLF, blank lines": write(
            folder / "bom.jsonl",
            b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in QA),
        ),
        "BOM in an array": write(folder / "bom.json", b"\xef\xbb\xbf" + json.dumps(QA).encode()),
        "BOM in CSV": write(folder / "bom.csv", "\ufeff" + csv_text),
    }
    pq.write_table(pa.Table.from_pylist(QA), paths["parquet"], row_group_size=2)
    return paths
