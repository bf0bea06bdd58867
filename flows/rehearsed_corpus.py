"""Tries on some of the corpus how long it will take to score it and to draw the subset."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flows.preview import Preview
from flows.rehearsal import Rehearsal
from flows.timing import stopwatch
from flows.trial import BACKWARD
from p2d_core.affinity import Target
from p2d_core.affinity.measuring import MEASURED, MeasuredCorpus, measure_shard
from p2d_core.affinity.scoring import passing_ids, score_corpus
from p2d_core.errors import P2DError
from p2d_core.planning import Estimate
from p2d_core.samples.schema import Sample, from_table, to_table
from p2d_core.samples.shards import TARGET_ROWS
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import SUBSET, select_subset
from tasks.measurements import NO_TARGET, scorer_step

LEAST_CHOSEN = 32
"""Samples whose lengths may stand for a subset's."""


class CorpusRehearsal:
    """Steps of the scorer and the subset, tried in their order on samples that were drawn."""

    def __init__(self, rehearsal: Rehearsal, data: Preview, folder: Path) -> None:
        self.rehearsal, self.data, self.folder = rehearsal, data, folder
        self.base, self.trial = rehearsal.base, rehearsal.trial
        self.scorer = rehearsal.inputs.scorer
        self.chosen: list[Sample] = []
        """Samples of the subset, or what stands for them."""
        self.passing: dict[int, float] = {}
        """By step of the scorer, the share of the corpus that its gates let pass."""
        self.scored: tuple[Path, list[Path]] | None = None
        """Scores and shards of the corpus that are made."""
        self._scores: Path | None = None
        self._shard = folder / "shard.parquet"
        pq.write_table(to_table(data.drawn), self._shard, compression="zstd")
        self.bytes = 0.0
        """That samples, measurements and scores would take."""
        self._count(self._shard, 2 * data.corpus / len(data.drawn))  # as read, and in the corpus

    def measuring(self, step: int, rows: float) -> Estimate:
        """``rows`` samples, in shards, in one step of the scorer."""
        one = scorer_step(self.scorer, step).scorer
        load = self.base.captured_load() if one.runs_model else Estimate()
        model = self.base.seen(self.rehearsal.head_map if one.needs_head_proxy else None)
        heads = self.rehearsal.head_map if one.needs_heads else None
        drawn = self.data.drawn
        if step and self._scores is not None:
            there = set(pq.read_table(self._scores)["sample_id"].to_pylist())
            passed = passing_ids(self._scores, 0) or there
            drawn = [sample for sample in drawn if sample.sample_id in passed]
        proxy = self.data.target.proxy
        before = None
        if step and (file := self.folder / f"{step - 1}-{MEASURED}").exists():
            before = pq.read_table(file)
        state: dict[str, Any] = {}

        def prepare(size: int) -> None:
            known = Target(proxy[:size], self.data.target.held_out[:size])
            state["made"] = one.prepare(model, heads, known if one.measures_target else NO_TARGET)
            state["size"] = size

        def work(size: int) -> None:
            measured = measure_shard(one, model, state["made"], drawn[:size], before)
            pq.write_table(measured, self.folder / f"{step}-{MEASURED}", compression="zstd")
            pq.write_table(to_table(drawn[:size]), self.folder / f"{step}-shard.parquet")

        passes = 1.0 if one.runs_model else 0.0
        seen, back = (proxy, BACKWARD * passes) if one.measures_target else (proxy[:1], 0.0)
        prepared = self.trial.parts(prepare, seen, len(seen), share=0.2, passes=back)
        if not state:
            return load + prepared + self.trial.unseen(rows)
        with stopwatch() as again:  # some keep what they prepare for the next shard
            prepare(state["size"])
        measured = self.trial.parts(work, drawn[:TARGET_ROWS], rows, share=0.7, passes=passes)
        if (file := self.folder / f"{step}-{MEASURED}").exists():
            self._count(file, rows / max(1, pq.ParquetFile(file).metadata.num_rows))
        return load + prepared + again.estimate.times(rows / TARGET_ROWS) + measured

    def scoring(self, step: int, rows: int) -> Estimate:
        """Affinities of ``rows`` samples."""
        one = scorer_step(self.scorer, step)
        load = self.base.captured_load() if one.scorer.runs_model else Estimate()
        model = self.base.seen(self.rehearsal.head_map if one.scorer.needs_head_proxy else None)
        heads = self.rehearsal.head_map if one.scorer.needs_heads else None
        proxy, held_out = self.data.target.proxy, self.data.target.held_out
        state: dict[str, Any] = {}

        def prepare(size: int) -> None:
            state["made"] = one.scorer.prepare(model, heads, Target(proxy[:size], held_out[:size]))

        seen = max(proxy, held_out, key=len)
        passes = 1.0 if one.scorer.runs_model else 0.0
        prepared = self.trial.parts(prepare, seen, len(seen), share=0.8, passes=passes)
        measured = self.folder / f"{step}-{MEASURED}"
        if not measured.exists():  # those of the run are there already: a few will do
            self.measuring(step, 0)
        shard, file = self.folder / f"{step}-shard.parquet", self.folder / f"{step}-scores.parquet"
        if "made" not in state or not measured.exists():
            return load + prepared
        with stopwatch() as scored:
            corpus = MeasuredCorpus([(shard, measured)])
            outcome = score_corpus(one, state["made"], corpus, file, previous=self._scores)
        self._scores = file
        self._count(file, rows / max(1, outcome.rows))
        self.passing[step] = max(1, outcome.passed) / max(1, outcome.rows)
        return load + prepared + scored.estimate.times(rows / max(1, outcome.rows))

    def selecting(self, selection: SelectionSpec, rows: int) -> Estimate:
        """A subset; what was drawn from the samples at hand stands for it in `training`."""
        folder = self.folder / "subset"
        folder.mkdir(exist_ok=True)
        # of so few samples no such subset may be drawn; it will be like the proxy samples
        self.chosen = self.data.target.proxy
        scores, shards, more = self._scores, [self._shard], rows / len(self.data.drawn)
        if scores is None:
            if self.scored is None:
                return Estimate()
            (scores, shards), more = self.scored, 1.0
        lengths = [each.n_learnt for each in self.base.captured.encode(self.data.target.proxy)]
        with stopwatch() as read:
            pq.read_table(self._shard)
        with stopwatch() as selected, suppress(P2DError):
            select_subset(scores, shards, lengths, selection, folder)
            chosen = from_table(pq.read_table(folder / SUBSET))
            if len(chosen) >= LEAST_CHOSEN:
                self.chosen = chosen
        return selected.estimate + read.estimate.times(max(0.0, more - 1))

    def _count(self, file: Path, times: float) -> None:
        self.bytes += file.stat().st_size * times
