"""Which columns of a row are the prompt and the response, and the texts that they hold."""

import difflib
import json
import math
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from p2d_core.errors import DataError
from p2d_core.samples.extra import extra_of
from p2d_core.samples.messages import MESSAGE_COLUMNS, MessageMap, holds_messages
from p2d_core.samples.rows import described, listed
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.source import SourceSpec
from p2d_core.samples.texts import RowProblem, checked_text

KNOWN_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("input", "target"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("source", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
)
"""Columns that are found by themselves, whatever their case; the first pair that is there counts.

With ``instruction``, a column ``input`` (or ``context``, as Dolly has it) is appended after a blank
line where it is not empty.
"""


FURTHER = ("input", "context")
CASES = (str.lower, str.capitalize, str.upper)


class Text(Protocol):
    """A way from a row to a text."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""

    def render(self, row: Mapping[str, Any]) -> str:
        """The text in that row; raises `RowProblem`."""


@dataclass(frozen=True, slots=True)
class Column:
    """The text of one column."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def render(self, row: Mapping[str, Any]) -> str:
        value = _value(row, self.name)
        if value is None:
            raise RowProblem(f"column {self.name!r} is null; fill it in or remove the row")
        if isinstance(value, str):
            return value
        cure = (
            f'put it in quotes, or write `"{{{self.name}}}"` in place of {self.name!r} '
            "in the settings to have it turned into text"
            if isinstance(value, (int, float)) and _is_plain(value)
            else "write it as text"
        )
        raise RowProblem(f"column {self.name!r} holds {described(value)} where text is due; {cure}")


@dataclass(frozen=True, slots=True)
class Template:
    """Literal text with columns in it; a number is written out, null is empty."""

    parts: tuple[tuple[str, str | None], ...]
    """Literal text, each followed by a column or None."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for _, column in self.parts if column is not None)

    def render(self, row: Mapping[str, Any]) -> str:
        pieces = []
        for literal, column in self.parts:
            pieces.append(literal)
            if column is not None:
                pieces.append(self._written(column, _value(row, column)))
        return "".join(pieces)

    @staticmethod
    def _written(column: str, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if _is_plain(value):
            return json.dumps(value)
        raise RowProblem(
            f"column {column!r} holds {described(value)} where text is due; write it as text"
        )


@dataclass(frozen=True, slots=True)
class InstructionWithInput:
    """The instruction, and after a blank line the input where there is one."""

    instruction: str
    input: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.instruction, self.input)

    def render(self, row: Mapping[str, Any]) -> str:
        instruction = Column(self.instruction).render(row)
        if row.get(self.input) is None:
            return instruction
        given = Column(self.input).render(row)
        return f"{instruction}\n\n{given}" if given.strip() else instruction


class RowMap(Protocol):
    """How the rows of one file become samples."""

    def sample_of(self, row: Mapping[str, Any], source: str, number: int) -> Sample:
        """The sample in that row; raises `RowProblem`."""


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Prompt and response are texts in columns."""

    prompt: Text
    response: Text

    def sample_of(self, row: Mapping[str, Any], source: str, number: int) -> Sample:
        """The sample in that row; its texts are canonical.

        Raises:
            RowProblem: one of them is missing, empty, of a wrong type, or no valid text; or the
                other columns are nested too deeply.
        """
        prompt = self._text("prompt", self.prompt, row)
        response = self._text("response", self.response, row)
        used = {*self.prompt.columns, *self.response.columns}
        return Sample(
            sample_id=sample_id_of(prompt, response),
            source=source,
            prompt=prompt,
            response=response,
            row=number,
            extra=extra_of(row, used),
        )

    @staticmethod
    def _text(role: str, text: Text, row: Mapping[str, Any]) -> str:
        try:
            rendered = text.render(row)
        except RowProblem as problem:
            raise RowProblem(f"no {role}: {problem}.") from None
        columns = " and ".join(repr(column) for column in text.columns)
        return checked_text(f"the {role} (column {columns})", rendered)


def column_map(row: Mapping[str, Any], source: SourceSpec) -> RowMap:
    """What the source asks for, or what its columns are recognised as.

    Args:
        row: the file's first.

    Raises:
        RowProblem: a column that was asked for is not there, or none is recognised.
        DataError: what was asked for is neither a column nor a template.
    """
    columns = list(row)
    if source.messages is not None:
        _there("messages", source.messages, columns, source)
        return MessageMap((source.messages,))
    found = _text_columns(columns, source)
    if found is None:
        names = {name.lower(): name for name in reversed(columns)}
        for known in MESSAGE_COLUMNS:
            if known in names and source.prompt is None and source.response is None:
                return MessageMap((names[known],))
        raise RowProblem(
            f"no columns are recognised as prompt and response. "
            f"Columns found: {listed(columns)}. Name them in the settings with `prompt:` "
            f"and `response:` of source {source.name!r}; each is a column's name or a template "
            'such as "{title}\\n\\n{body}". A column with lists of messages is named with '
            "`messages:`." + _rows_within(row)
        )
    columns_of_both = (*found.prompt.columns, *found.response.columns)
    if isinstance(found.prompt, Column) and holds_messages(row[found.prompt.name]):
        return MessageMap(columns_of_both)
    return found


def _rows_within(row: Mapping[str, Any]) -> str:
    """What to do where the file is one object that holds all rows."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f" If the rows are what stands under {name!r}, write that array alone."
    return ""


def _text_columns(columns: Collection[str], source: SourceSpec) -> ColumnMap | None:
    prompt = _asked_for("prompt", source.prompt, columns, source)
    response = _asked_for("response", source.response, columns, source)
    if prompt is not None and response is not None:
        return ColumnMap(prompt, response)
    found = {name.lower(): name for name in reversed(list(columns))}
    for known_prompt, known_response in KNOWN_PAIRS:
        if prompt is None and known_prompt not in found:
            continue
        if response is None and known_response not in found:
            continue
        return ColumnMap(
            prompt or _recognised_prompt(found, known_prompt),
            response or Column(found[known_response]),
        )
    return None


def _recognised_prompt(found: Mapping[str, str], known: str) -> Text:
    if known == "instruction":
        further = next((found[each] for each in FURTHER if each in found), None)
        # JSON leaves it out where there is none, perhaps in the first row: written as this one is
        written = next((way for way in CASES if way(known) == found[known]), str.lower)
        return InstructionWithInput(found[known], further or written(FURTHER[0]))
    return Column(found[known])


def _asked_for(
    role: str, asked: str | None, columns: Collection[str], source: SourceSpec
) -> Text | None:
    if asked is None:
        return None
    text = _parsed(role, asked, source) if "{" in asked and asked not in columns else Column(asked)
    for column in text.columns:
        _there(role, column, columns, source)
    return text


def _there(role: str, column: str, columns: Collection[str], source: SourceSpec) -> None:
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        raise RowProblem(
            f"there is no column {column!r}, which `{role}:` of source "
            f"{source.name!r} names. Columns found: {listed(columns)}."
            + (f" Did you mean {near[0]!r}?" if near else " Name one of them.")
        )


def _parsed(role: str, template: str, source: SourceSpec) -> Template:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"`{role}:` of source {source.name!r} is not a template: {error} in {template!r}. "
            "Write a column as {name}, and a brace itself as {{ or }}."
        ) from None
    for _, column, format_spec, conversion in pieces:
        if column is not None and (not column or format_spec or conversion):
            raise DataError(
                f"`{role}:` of source {source.name!r}: {template!r} may hold names of columns in "
                "braces and nothing else in them. Write it such as {instruction}."
            )
    return Template(tuple((literal, column) for literal, column, _, _ in pieces))


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise RowProblem(
            f"there is no column {column!r} (found: {listed(row)}); fill it in or remove the row"
        )
    return row[column]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
