"""UTF-8 text of a file, by lines or by chunks; an error names line and offset."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from p2d_core.errors import DataError
from p2d_core.samples.rows import BrokenRow

MAX_ROW_BYTES = 16 * 2**20
"""A longer row is refused: it is no sample, and would be held in memory as a whole."""

CHUNK_BYTES = 2**20


def first_character(stream: BinaryIO) -> bytes:
    """The first byte that is not space; empty if there is none."""
    while chunk := stream.read(CHUNK_BYTES):
        if stripped := chunk.lstrip():
            return stripped[:1]
    return b""


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return (
        f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset + error.start} "
        "of the file). Save the file as UTF-8."
    )


def _holds_nul(offset: int) -> str:
    return f"a NUL byte at offset {offset} of the file. Save the file as plain UTF-8 text."


def numbered_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, str | BrokenRow]]:
    """Number (from 1) and text of every line, line break included."""
    number = 0
    offset = stream.tell()
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        place = f"{path}, line {number}"
        length = len(raw)
        if length > MAX_ROW_BYTES:
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(CHUNK_BYTES)
                length += len(rest)
            problem = (
                f"the line has {length} bytes; a row may have {MAX_ROW_BYTES}. Cut or remove it."
            )
            yield number, BrokenRow(place, problem)
        elif (nul := raw.find(b"\0")) >= 0:
            yield number, BrokenRow(place, _holds_nul(offset + nul))
        else:
            try:
                yield number, raw.decode()
            except UnicodeDecodeError as error:
                yield number, BrokenRow(place, _not_utf8(error, offset))
        offset += length


def decoded_chunks(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The text in pieces of about `CHUNK_BYTES`.

    Raises:
        DataError: it is not UTF-8, or holds a NUL byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    final = False
    while not final:
        pending = len(decoder.getstate()[0])
        offset = stream.tell() - pending
        raw = stream.read(CHUNK_BYTES)
        final = not raw
        if (nul := raw.find(b"\0")) >= 0:
            at = line + raw.count(b"\n", 0, nul)
            raise DataError(f"{path}, line {at}: {_holds_nul(offset + pending + nul)}")
        try:
            text = decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            at = line + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{path}, line {at}: {_not_utf8(error, offset)}") from None
        line += raw.count(b"\n")
        yield text
