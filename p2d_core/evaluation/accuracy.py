"""Accuracy over choices: share of samples whose right choice the model finds likeliest."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from p2d_core.errors import DataError, SettingsError
from p2d_core.evaluation.evidence import Evidence
from p2d_core.evaluation.metric import EvaluationSpec, Measured, metrics
from p2d_core.samples.schema import Sample
from p2d_core.samples.texts import canonical_text
from p2d_core.samples.tokens import EncodedSample, Encoder


@metrics.register("accuracy")
class Accuracy:
    """By the log-likelihood of each choice after the prompt, without an end of sequence.

    ``normalise`` divides it by the choice's tokens or bytes. None and bytes are what lm-eval calls
    ``acc`` and ``acc_bytes`` (``acc_norm`` divides by characters: the same for ASCII). Of choices
    as likely as each other the first is taken.
    """

    version: ClassVar[str] = "2"
    higher_is_better: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("choices", "answer", "normalise")
    counts_tokens: ClassVar[bool] = False

    def check(self, sample: Sample, spec: EvaluationSpec) -> None:
        """Raises InputError where it has no choices, or none of them is known to be right."""
        choices_of(sample, spec)

    def measure(self, seen: Evidence) -> Measured:
        """In [0, 1]."""
        asked = [choices_of(sample, seen.spec) for sample in seen.samples]
        flat = [
            replace(sample, response=choice)
            for sample, (choices, _) in zip(seen.samples, asked, strict=True)
            for choice in choices
        ]
        encoded = without_end(seen.encoder, flat)
        likelihoods = seen.log_likelihoods(encoded).tolist()
        scores = [
            likelihood / _length(sample.response, each, seen.spec)
            for likelihood, sample, each in zip(likelihoods, flat, encoded, strict=True)
        ]
        chosen, start = [], 0
        for choices, _ in asked:
            own = scores[start : start + len(choices)]
            chosen.append(own.index(max(own)))
            start += len(choices)
        matches = [best == right for best, (_, right) in zip(chosen, asked, strict=True)]
        return Measured(sum(matches) / len(matches), matches, {"chosen": chosen})


def without_end(encoder: Encoder, samples: Sequence[Sample]) -> list[EncodedSample]:
    """Token ids of prompt and response, and no end of sequence or turn behind them.

    Of a conversation the last answer alone counts.
    """
    return [
        replace(each, input_ids=each.input_ids[:-1], earlier=())
        if each.n_response > 1 and each.input_ids[-1] in encoder.stop_ids
        else replace(each, earlier=())
        for each in encoder.encode_all(samples)
    ]


def choices_of(sample: Sample, spec: EvaluationSpec) -> tuple[list[str], int]:
    """A sample's choices, and which is right, from 0.

    The column holds a list of texts (in CSV, JSON of one), or texts with their labels as
    ``{"text": [...], "label": [...]}``. The right one is said by a number, its position from 0 (its
    label, where labels are numbers), or by a text: its label, itself, a letter (A is the first) or
    its position, whichever fits first.

    Raises:
        SettingsError: no column is named.
        DataError: the column is not there, holds no choices, or none is said to be right.
    """
    if spec.choices is None:
        raise SettingsError(
            "the metric accuracy needs evaluation.choices: the column of the evaluation data that "
            "holds each row's choices, such as choices, endings or options."
        )
    where = f"row {sample.row + 1} of source {sample.source!r}"
    columns = json.loads(sample.extra)
    value = _column(columns, spec.choices, "evaluation.choices", where)
    texts, labels = _texts(value)
    if len(texts) < 2 or not all(isinstance(each, str) and each.strip() for each in texts):
        held = json.dumps(value, ensure_ascii=False)[:60]
        raise DataError(
            f"{where}: column {spec.choices!r} (evaluation.choices) holds {held}, "
            "not two texts or more to choose from. Make it a list of texts."
        )
    choices = [canonical_text(each) for each in texts]
    said = sample.response
    if spec.answer is not None:
        said = _column(columns, spec.answer, "evaluation.answer", where)
    right = _position(said, choices, labels)
    if right is None:
        by = f"column {spec.answer!r} (evaluation.answer)" if spec.answer else "its response"
        raise DataError(
            f"{where}: {by} is {str(said)[:40]!r}, which is none of its {len(choices)} choices: "
            f"{', '.join(repr(each[:30]) for each in choices[:6])}. It has to be the right one's "
            "text, letter, or position from 0; evaluation.answer may name another column for it."
        )
    return choices, right


def _column(columns: dict[str, Any], name: str, setting: str, where: str) -> Any:
    if name not in columns:
        raise DataError(
            f"{where}: there is no column {name!r}, which {setting} names, beside its prompt and "
            f"response. Columns found: {', '.join(sorted(columns)) or 'none'}."
        )
    return columns[name]


def _texts(value: Any) -> tuple[list[Any], list[Any]]:
    """Choices and their labels, as far as there are any."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [], []
    labels: Any = []
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label")
    return (value if isinstance(value, list) else []), (labels if isinstance(labels, list) else [])


def _position(said: Any, choices: list[str], labels: list[Any]) -> int | None:
    if isinstance(said, int) and not isinstance(said, bool):
        if labels and isinstance(labels[0], int):
            return labels.index(said) if said in labels else None
        return said if 0 <= said < len(choices) else None
    if not isinstance(said, str):
        return None
    said = canonical_text(said)
    ways = ([str(label) for label in labels], choices, [*string.ascii_uppercase])
    positions = [way.index(said) for way in ways if said in way]
    if said.isascii() and said.isdigit():
        positions.append(int(said))
    return next((each for each in positions if each < len(choices)), None)


def _length(choice: str, encoded: EncodedSample, spec: EvaluationSpec) -> int:
    if spec.normalise == "tokens":
        return encoded.n_response
    return len(choice.encode()) if spec.normalise == "bytes" else 1
