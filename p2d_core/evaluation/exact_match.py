"""Exact match: share of samples whose generated answer equals the response."""

from __future__ import annotations

import re
from typing import ClassVar

from p2d_core.errors import DataError
from p2d_core.evaluation.evidence import Evidence
from p2d_core.evaluation.metric import EvaluationSpec, Measured, metrics
from p2d_core.samples.schema import Sample


@metrics.register("exact_match")
class ExactMatch:
    """White space apart; with an answer pattern, what it finds last in both is compared."""

    version: ClassVar[str] = "2"
    higher_is_better: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("answer_pattern", "max_new_tokens")
    counts_tokens: ClassVar[bool] = False

    def check(self, sample: Sample, spec: EvaluationSpec) -> None:
        """Raises DataError where the pattern finds nothing in the response."""
        if answer_of(sample.response, spec.answer_pattern) is None:
            raise DataError(
                f"row {sample.row + 1} of source {sample.source!r}: its response has no match of "
                f"evaluation.answer_pattern {spec.answer_pattern!r}, so no answer could be right. "
                "Mend the pattern, or leave the row out."
            )

    def measure(self, seen: Evidence) -> Measured:
        """In [0, 1]."""
        pattern = seen.spec.answer_pattern
        matches = []
        for response, answer in seen.compared:
            right = answer_of(response, pattern)
            matches.append(right is not None and answer_of(answer, pattern) == right)
        return Measured(sum(matches) / len(matches), matches, {"answer": seen.answers})


def answer_of(text: str, pattern: str | None) -> str | None:
    """What of a text is compared: all of it, or what the pattern finds last (None: nothing)."""
    if pattern is None:
        return " ".join(text.split())
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    match = found[-1]
    # of alternatives such as "#### (.*)|answer is (.*)" the group of the one that was met
    group = next((group for group in match.groups() if group is not None), match.group(0))
    return " ".join(group.split())
