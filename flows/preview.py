"""The samples of a run as its stages will have them, read without keeping any."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass

from flows.inputs import Inputs
from flows.settings import RunSettings
from p2d_core.errors import DataError
from p2d_core.samples.read import read_samples
from p2d_core.samples.rejected import RejectedRows
from p2d_core.samples.schema import Sample
from p2d_core.samples.split import CorpusCounts, TargetSplit, assemble_corpus, draw_target
from tasks.stage import SourceInput

DRAWN = 2048
"""Samples of the corpus that are kept to be timed: the smallest ids, which are a draw."""


@dataclass
class Preview:
    """Parts of the target, and what is known of the corpus."""

    target: TargetSplit
    evaluation: list[Sample]
    retention: list[Sample]
    corpus: int
    """Samples."""
    corpus_is_estimated: bool
    """Time ran out before all of it was read."""
    drawn: list[Sample]
    """Of the corpus."""
    seconds_to_read: float
    """The corpus; scaled up where it was not read whole."""


@dataclass
class _Source:
    """Reads one source, until a time."""

    given: SourceInput
    until: float
    skip_bad_rows: int
    rows: int = 0
    expected: int = 0
    """Rows that there are, by the share of the bytes read; 0 while that is not known."""
    cut: bool = False

    def samples(self) -> Iterator[Sample]:
        rejected = RejectedRows(self.skip_bad_rows)
        for sample in read_samples(self.given.spec, on_bad_row=rejected, progress=self._told):
            if time.monotonic() > self.until and self.expected > self.rows:
                self.cut = True
                return
            self.rows += 1
            yield sample

    def _told(self, rows: int, of: int) -> None:
        self.expected = of


def preview(settings: RunSettings, inputs: Inputs, seconds: float) -> Preview:
    """Reads the target and the evaluation samples whole, and the corpus for at most ``seconds``."""

    def whole(given: SourceInput | None) -> list[Sample]:
        if given is None:
            return []
        return list(read_samples(given.spec, on_bad_row=RejectedRows(settings.skip_bad_rows)))

    evaluation, retention = whole(inputs.evaluation), whole(inputs.retention)
    target = draw_target(
        whole(inputs.target),
        n_proxy=settings.proxy.samples,
        n_held_out=settings.proxy.held_out,
        n_evaluation=0 if evaluation else settings.evaluation.samples,
        seed=settings.seed,
    )
    kept_out = [*target.proxy, *target.held_out, *target.evaluation, *evaluation, *retention]
    rest = target.rest if settings.corpus.include_target else []
    start = time.monotonic()
    share = seconds / max(1, len(inputs.corpus))
    sources = [
        _Source(each, start + share * (i + 1), settings.skip_bad_rows)
        for i, each in enumerate(inputs.corpus)
    ]
    pools = [*(source.samples() for source in sources), iter(rest)]
    counts = CorpusCounts()
    corpus = assemble_corpus(pools, {sample.sample_id for sample in kept_out}, counts)
    drawn = heapq.nsmallest(DRAWN, corpus, key=lambda sample: sample.sample_id)
    if not drawn:
        raise DataError(
            f"the corpus has no samples: {counts.excluded} were left out because they belong to "
            "the proxy, held-out, evaluation or retention samples. Add files to corpus.sources."
        )
    cut = [source for source in sources if source.cut]
    read = len(rest) + sum(source.rows for source in sources)
    scale = 1 + sum(source.expected - source.rows for source in cut) / max(1, read)
    return Preview(
        target=target,
        evaluation=evaluation or target.evaluation,
        retention=retention,
        corpus=round(counts.total * scale),
        corpus_is_estimated=bool(cut),
        drawn=drawn,
        seconds_to_read=(time.monotonic() - start) * scale,
    )
