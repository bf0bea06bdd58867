"""Rows of JSON files: one object a line, or one array of objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from p2d_core.errors import DataError
from p2d_core.samples import text_stream
from p2d_core.samples.rows import BrokenRow, Row, described
from p2d_core.samples.text_stream import decoded_chunks, numbered_lines


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return columns


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
TOO_DEEP = "the JSON is nested too deeply for a sample"


def jsonl_rows(path: Path, stream: BinaryIO) -> Iterator[Row | BrokenRow]:
    """One object a line; blank lines are passed over."""
    for number, line in numbered_lines(path, stream):
        place = f"{path}, line {number}"
        if isinstance(line, BrokenRow):
            yield line
            continue
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise DataError(
                f"{place}: the file begins with '[' like a JSON array, but is read as JSON Lines "
                "(one object a line). Name it .json, or set `format: json`."
            )
        try:
            value = _DECODER.decode(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            yield BrokenRow(place, _broken_line(line, error, number))
        except RecursionError:
            yield BrokenRow(place, f"{TOO_DEEP}. Flatten or remove the row.")
        except ValueError as error:
            yield BrokenRow(place, f"{error}. Mend or remove the row.")
        else:
            yield _row_or_broken(place, value)


def _broken_line(line: str, error: json.JSONDecodeError, number: int) -> str:
    if number == 1 and line.strip() == "{":
        return (
            "the file is one JSON object over several lines. "
            "Write one object a line, or a JSON array of objects."
        )
    return (
        f"broken JSON at column {error.colno}: {error.msg}. "
        "Each line has to be one JSON object; mend or remove this one."
    )


def _row_or_broken(place: str, value: Any) -> Row | BrokenRow:
    if isinstance(value, dict):
        return Row(place, value)
    return BrokenRow(
        place,
        f"{described(value)} where an object is due. "
        'Write each row as {"prompt": "...", "response": "..."}.',
    )


class _Window:
    """The part of a JSON file that is being read; knows line and column of every position."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.text = ""
        self.position = 0
        self._line = 1
        self._column = 1
        self._exhausted = False
        self._chunks = decoded_chunks(path, stream)

    def _grow(self, characters: int) -> None:
        """Forgets what was read, then reads at least so many characters unless the file ends."""
        self._line, self._column = self._line_and_column(self.position)
        parts = [self.text[self.position :]]
        self.position = 0
        while characters > 0 and not self._exhausted:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._exhausted = True
            else:
                parts.append(chunk)
                characters -= len(chunk)
        self.text = "".join(parts)

    def _line_and_column(self, position: int) -> tuple[int, int]:
        breaks = self.text.count("\n", 0, position)
        if not breaks:
            return self._line, self._column + position
        return self._line + breaks, position - self.text.rfind("\n", 0, position)

    def next_character(self) -> str:
        """The next one that is not space, left unread; empty at the end of the file."""
        while True:
            while self.position < len(self.text):
                character = self.text[self.position]
                if character not in " \t\r\n":
                    return character
                self.position += 1
            if self._exhausted:
                return ""
            self._grow(text_stream.CHUNK_BYTES)

    def value(self, row: int) -> Any:
        """The JSON value that begins here, read to its end."""
        while True:
            held = len(self.text) - self.position
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if self._exhausted or held > text_stream.MAX_ROW_BYTES:
                    self.fail(row, error.msg, error.pos)
            except RecursionError:
                self.fail(row, TOO_DEEP)
            except ValueError as error:
                self.fail(row, str(error))
            else:
                # a number may go on behind the window
                if end < len(self.text) or self._exhausted:
                    self.position = end
                    return value
            # doubling: a row of n characters is tried log n times
            self._grow(max(text_stream.CHUNK_BYTES, held))

    def fail(self, row: int, message: str, position: int | None = None) -> NoReturn:
        line, column = self._line_and_column(self.position if position is None else position)
        raise DataError(
            f"{self.path}, row {row} (line {line}, column {column}): broken JSON: {message}. "
            "The file has to be one JSON array of objects, or one object a line."
        )


def json_array_rows(path: Path, stream: BinaryIO) -> Iterator[Row | BrokenRow]:
    """The elements of one array, parsed one by one.

    Raises:
        DataError: the file is not one whole array.
    """
    window = _Window(path, stream)
    first = window.next_character()
    if first == "":
        raise DataError(f"{path}: the file is empty. Give a file with samples in it.")
    if first != "[":
        window.fail(1, f"{first!r} where '[' is due")
    window.position += 1
    row = 0
    while True:
        character = window.next_character()
        if character == "]" and row == 0:
            break
        row += 1
        if character == "":
            window.fail(row, "the file ends inside the array")
        yield _row_or_broken(f"{path}, row {row}", window.value(row))
        character = window.next_character()
        if character == "]":
            break
        if character != ",":
            window.fail(
                row, f"{character!r} where ',' or ']' is due" if character else "the file ends"
            )
        window.position += 1
    window.position += 1
    if character := window.next_character():
        window.fail(row, f"{character!r} after the end of the array")
