"""Rows of a data file, one at a time, by the reader of its format."""

import codecs
from collections.abc import Iterator

from p2d_core.errors import DataError
from p2d_core.samples.csv_rows import csv_rows
from p2d_core.samples.json_rows import json_array_rows, jsonl_rows
from p2d_core.samples.parquet_rows import parquet_rows
from p2d_core.samples.rows import BrokenRow, Position, Row
from p2d_core.samples.source import DataFile, not_permitted
from p2d_core.samples.text_stream import first_character

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def rows_of(file: DataFile, position: Position | None = None) -> Iterator[Row | BrokenRow]:
    """The rows of a file in order, streamed; ``position`` follows them.

    Raises:
        DataError: the file is empty, or broken in a way that hides where the next row begins.
    """
    position = position or Position()
    try:
        size = file.path.stat().st_size
        if size == 0:
            raise DataError(f"{file.path}: the file is empty. Give a file with samples in it.")
        if file.format == "parquet":
            yield from parquet_rows(file.path, position)
            return
        with file.path.open("rb") as stream:
            start = stream.read(3)
            if start.startswith(_UTF16_MARKS):
                raise DataError(f"{file.path}: the file is UTF-16. Save it as UTF-8.")
            offset = 3 if start == codecs.BOM_UTF8 else 0
            stream.seek(offset)
            if file.format == "jsonl":
                rows = jsonl_rows(file.path, stream)
            elif file.format == "json":
                first = first_character(stream)
                stream.seek(offset)
                # many files named .json hold one object a line
                reader = jsonl_rows if first == b"{" else json_array_rows
                rows = reader(file.path, stream)
            else:
                rows = csv_rows(file.path, stream, tab_separated=file.format == "tsv")
            for row in rows:
                position.share = stream.tell() / size
                yield row
    except PermissionError:
        raise not_permitted(file.path) from None
