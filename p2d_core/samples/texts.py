"""What counts as a text of a sample, and how it is written in one way only."""

import re

_LEADING_BLANK_LINES = re.compile(r"^(?:[ \t]*\n)+")


class RowProblem(Exception):
    """What is wrong with one row; its place is known to the caller."""


def canonical_text(text: str) -> str:
    """The text as it is, but for line breaks, leading blank lines and white space at its end.

    CRLF becomes LF. The indentation of the first line stays, because in code it means something.
    """
    return _LEADING_BLANK_LINES.sub("", text.replace("\r\n", "\n")).rstrip(" \t\r\n")


def checked_text(what: str, text: str) -> str:
    """The canonical text.

    Args:
        what: it is, for errors.

    Raises:
        RowProblem: it is empty, or no valid text.
    """
    if not text.strip():
        raise RowProblem(f"{what} is empty. Fill it in or remove the row.")
    if "\0" in text:
        raise RowProblem(f"{what} holds a NUL character. Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            f"{what} holds half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}), which is no character. Remove it."
        ) from None
    return canonical_text(text)
