"""ROUGE-L: how much of the generated answer and of the response is one common subsequence."""

from __future__ import annotations

import re
from typing import ClassVar

from p2d_core.errors import DataError
from p2d_core.evaluation.evidence import Evidence
from p2d_core.evaluation.metric import EvaluationSpec, Measured, metrics
from p2d_core.samples.schema import Sample

USE_STEMMER = True
"""Porter's, for English: "runs" matches "run", as most published figures for summaries have it."""


@metrics.register("rouge_l")
class RougeL:
    """Mean over samples of F1, as Google's rouge-score has it.

    It compares lower-case words of a-z and 0-9 and sees no other letters.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """

    version: ClassVar[str] = "2"
    higher_is_better: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("max_new_tokens",)
    counts_tokens: ClassVar[bool] = False

    def check(self, sample: Sample, spec: EvaluationSpec) -> None:
        """Raises DataError where the response has no word that it sees."""
        if not re.search("[a-z0-9]", sample.response.lower()):
            raise DataError(
                f"row {sample.row + 1} of source {sample.source!r}: rouge_l compares words of a-z "
                f"and 0-9, and its response {sample.response[:40]!r} has none. Take another "
                "evaluation.metric, or leave the row out."
            )

    def measure(self, seen: Evidence) -> Measured:
        """In [0, 1]."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=USE_STEMMER)
        values = [
            float(scorer.score(response, answer)["rougeL"].fmeasure)
            for response, answer in seen.compared
        ]
        return Measured(sum(values) / len(values), values, {"answer": seen.answers})
