"""The turns of a conversation in a row, in the shapes that data sets have them in."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from p2d_core.samples.conversation import Turn, conversation_id, text_of
from p2d_core.samples.extra import extra_of
from p2d_core.samples.rows import described, listed
from p2d_core.samples.schema import Sample
from p2d_core.samples.texts import RowProblem, checked_text

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that are found by themselves, whatever their case; the first that is there counts."""

KEYS = (("role", "content"), ("from", "value"))
"""Of a message: OpenAI's and ShareGPT's."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""Role of a message, whatever its case -> role of a turn."""

TOOL_ROLES = frozenset(
    ("tool", "tools", "tool_call", "tool_response", "function", "function_call",
     "function_response", "observation", "ipython")
)  # fmt: skip

CARRIED_BESIDE = (
    "tool_calls", "tool_call_id", "function_call", "audio", "images", "reasoning_content",
    "reasoning", "thinking",
)  # fmt: skip
"""Of a message: more than text. To leave it out in silence would teach half of a turn."""


@dataclass(frozen=True, slots=True)
class MessageMap:
    """How the rows of one file become conversations."""

    columns: tuple[str, ...]
    """Lists of messages, in order. The system's text may stand in a column ``system``, whatever its
    case, of rows whose messages have none; JSON leaves it out where there is none."""

    def sample_of(self, row: Mapping[str, Any], source: str, number: int) -> Sample:
        """Raises `RowProblem`: a message is none, or there is nothing to answer or no answer."""
        turns = [turn for column in self.columns for turn in _turns(row, column)]
        used = {*self.columns, "tools"}
        if _says_something(row.get("tools")):
            raise RowProblem(_no("column 'tools'", "tools"))
        system = next((name for name in row if name.lower() == "system"), None)
        if system is not None and system not in self.columns:
            used.add(system)
            text = row[system]
            if text is not None and not isinstance(text, str):
                raise RowProblem(
                    f"column {system!r} holds {described(text)} where text is due. Mend it."
                )
            if text and text.strip() and turns[0].role != "system":
                turns = [Turn("system", checked_text(f"column {system!r}", text)), *turns]
        where = " and ".join(repr(column) for column in self.columns)
        if any(turn.role == "system" for turn in turns[1:]):
            raise RowProblem(f"{where} has a system turn that is not the first. Move it there.")
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
        if last is None:
            raise RowProblem(f"{where} has no assistant turn to learn. Remove the row.")
        before, response = turns[:last], turns[last].content
        if not any(turn.role == "user" for turn in before):
            raise RowProblem(
                f"{where} has no user turn before its last assistant turn. Remove the row."
            )
        return Sample(
            sample_id=conversation_id(before, response),
            source=source,
            prompt=text_of(before),
            response=response,
            row=number,
            extra=extra_of(row, used, [asdict(turn) for turn in before]),
        )


def holds_messages(value: Any) -> bool:
    """Whether it is a list whose first element looks like a message."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(role in first for role, _ in KEYS)


def _turns(row: Mapping[str, Any], column: str) -> list[Turn]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else described(value)
        raise RowProblem(
            f"column {column!r} holds {found} where a list of messages is due. Write it as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
        )
    turns = []
    for number, message in enumerate(value, 1):
        where = f"message {number} of {column!r}"
        turn = _turn(message, where)
        if turn is not None:
            turns.append(turn)
    if not turns:
        raise RowProblem(f"column {column!r} has no message with text. Remove the row.")
    return turns


def _turn(message: Any, where: str) -> Turn | None:
    """None for a system turn without text, which says nothing."""
    if not isinstance(message, dict):
        raise RowProblem(
            f"{where} is {described(message)} where an object is due. "
            'Write it as {"role": "user", "content": "..."}.'
        )
    keys = next((keys for keys in KEYS if keys[0] in message), None)
    if keys is None:
        raise RowProblem(
            f"{where} has neither `role` nor `from` (it has: {listed(message)}). "
            'Write it as {"role": "user", "content": "..."}.'
        )
    role_key, content_key = keys
    named = message[role_key]
    if isinstance(named, str) and named.lower() in TOOL_ROLES:
        raise RowProblem(_no(where, "tools"))
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        shown = repr(named[:40]) if isinstance(named, str) else described(named)
        raise RowProblem(
            f"{where}: the {role_key} {shown} is unknown. Known: {', '.join(ROLES)}. "
            "Rename it, or remove the row."
        )
    for key in CARRIED_BESIDE:
        if _says_something(message.get(key)):
            raise RowProblem(_no(where, f"`{key}`"))
    if message.get("weight") == 0:
        raise RowProblem(
            f"{where} has weight 0; every assistant turn is learnt. Remove the weight or the row."
        )
    text = _text(message.get(content_key), where, content_key)
    if role == "system" and not text.strip():
        return None
    return Turn(role, checked_text(where, text))


def _text(content: Any, where: str, key: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem(
            f"{where}: `{key}` holds {described(content)} where text or a list of text parts is "
            "due. Fill it in or remove the row."
        )
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        if part.get("type", "text") in ("text", "input_text", "output_text"):
            return str(part["text"])
    elif isinstance(part, dict) and "text" in part and part.get("type") == "text":
        raise RowProblem(f"{where}: a part's `text` holds {described(part['text'])}. Mend it.")
    kind = part.get("type") if isinstance(part, dict) else None
    raise RowProblem(_no(where, f"a part of type {kind!r}" if kind else "a part that is no text"))


def _says_something(value: Any) -> bool:
    """False of what exporters write for nothing: empty lists, also as JSON text, and nulls."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return any(_says_something(each) for each in value.values())
    return bool(value)


def _no(where: str, what: str) -> str:
    return (
        f"{where} holds {what}: conversations are text between system, user and assistant alone "
        "(no tools, no images). Remove the row."
    )
