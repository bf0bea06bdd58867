"""What tasks of lm-eval would take, from their first few documents."""

from __future__ import annotations

from pathlib import Path

from flows.rehearsal import GENERATED, Rehearsal
from flows.timing import FIRST, stopwatch, time_parts
from p2d_core.adaptation.adaptations import adapted
from p2d_core.evaluation.harness import HarnessSpec, documents_of, run_tasks
from p2d_core.models import load_tokenizer
from p2d_core.planning import Estimate, guess


def harness_estimate(
    tried: Rehearsal, spec: HarnessSpec, batch_size: int, *, adapter: bool
) -> Estimate:
    """Of one model, without loading it; with what `Rehearsal.training` kept or not."""
    documents = documents_of(spec)
    base, budget = tried.base, tried.budget
    model = base.seen().model
    expected = GENERATED * base.tokens * base.token_seconds * len(documents)
    if expected > max(budget.share, budget.left):
        return guess(expected / len(documents) * sum(documents))
    with stopwatch() as attached:
        if adapter and tried.kept is not None:
            model = adapted(model, tried.kept)
    tokenizer = load_tokenizer(Path(base.base.folder))

    def work(limit: int) -> None:
        run_tasks(model, tokenizer, spec, batch_size=batch_size, limit=limit)

    # a document more of every task that has one more
    weights = [sum(n > each for n in documents) for each in range(max(documents))]
    timed = time_parts(work, weights, sum(documents), budget.share, FIRST)
    if adapter:
        base.forget()
    return attached.estimate + timed
