"""A conversation as a sample: its last assistant turn is the response, all before it the prompt.

The sample keeps its turns beside the texts (`extra.TURNS`), so that a chat template can be applied
to them; whatever compares texts sees ``prompt`` and ``response`` as of any other sample.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from p2d_core.samples.extra import TURNS
from p2d_core.samples.schema import Sample, sample_id_of


@dataclass(frozen=True, slots=True)
class Turn:
    """Who says what; the role is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


def turns_of(sample: Sample) -> list[Turn]:
    """All turns, the response last; of a sample that is no conversation a user's and the answer."""
    before = json.loads(sample.extra)[TURNS] if is_conversation(sample) else None
    if before is None:
        before = [{"role": "user", "content": sample.prompt}]
    return [*(Turn(**each) for each in before), Turn("assistant", sample.response)]


def is_conversation(sample: Sample) -> bool:
    """Whether it was read from messages."""
    return TURNS in sample.extra and TURNS in json.loads(sample.extra)


def conversation_id(before: Sequence[Turn], response: str) -> str:
    """SHA-256 (hex) of the turns; that of prompt and response where a single user turn came before.

    So one question with its answer is the same sample in whatever shape it was written.
    """
    if [turn.role for turn in before] == ["user"]:
        return sample_id_of(before[0].content, response)
    canonical = [[asdict(turn) for turn in before], response]
    text = json.dumps(canonical, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def text_of(before: Sequence[Turn]) -> str:
    """The turns as one text: a single user turn as it is, of several each with its role."""
    if [turn.role for turn in before] == ["user"]:
        return before[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in before)
