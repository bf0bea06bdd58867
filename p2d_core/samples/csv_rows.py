"""Rows of CSV and TSV files whose first line names the columns."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from p2d_core.errors import DataError
from p2d_core.samples.rows import BrokenRow, Row
from p2d_core.samples.text_stream import MAX_ROW_BYTES, numbered_lines


def csv_rows(path: Path, stream: BinaryIO, *, tab_separated: bool) -> Iterator[Row | BrokenRow]:
    """Records of text, separated by that of comma, semicolon and tab that line 1 has most of.

    Raises:
        DataError: quotes do not match, or a byte is no text.
    """

    def text_lines() -> Iterator[str]:
        for _, line in numbered_lines(path, stream):
            if isinstance(line, BrokenRow):
                # a quoted field may span lines, so that the next row cannot be found
                raise DataError(f"{line.place}: {line.problem}")
            yield line

    lines = text_lines()
    head = next(lines, "")
    delimiter = "\t" if tab_separated else max(",;\t", key=head.count)

    def with_head() -> Iterator[str]:
        yield head
        yield from lines

    # a limit of the whole process; the default of 128 KiB is shorter than some real samples
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    reader = csv.reader(with_head(), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{place}: broken CSV: {error}. Put quotes around fields that hold quotes or line "
                "breaks, and write a quote inside them twice; lines have to end with LF or CRLF."
            ) from None
        if fields is None:
            return
        if not fields:
            continue
        if names is None:
            names = _column_names(place, fields)
        elif len(fields) != len(names):
            yield BrokenRow(
                place,
                f"{len(fields)} fields, but the first line names {len(names)} columns. "
                "Put quotes around fields that hold the delimiter.",
            )
        else:
            yield Row(place, dict(zip(names, fields, strict=True)))


def _column_names(place: str, fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"{place}: the first line names the column {name!r} twice. "
                "It has to give each column one name of its own."
            )
    return names
