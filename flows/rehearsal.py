"""Times a few steps of what each stage will do, with the functions that will do it."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from flows.inputs import Inputs
from flows.loaded import LoadedBase
from flows.preview import Preview
from flows.timing import FIRST, LEAST_STEPS, Budget, stopwatch, time_parts, time_steps
from p2d_core.adaptation.adaptations import (
    Attached,
    Attention,
    Full,
    adaptations,
    adapted,
    attention_slices,
)
from p2d_core.adaptation.calibration import calibrate_full
from p2d_core.adaptation.like_length import like_length
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.affinity import Target
from p2d_core.affinity.measuring import MEASURED, MeasuredCorpus, measure_shard
from p2d_core.affinity.scoring import passing_ids, score_corpus
from p2d_core.attention.layout import attention_layers
from p2d_core.errors import P2DError
from p2d_core.evaluation import metrics
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.heads.head_map import HEADS, HeadMap
from p2d_core.heads.picture import draw
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.planning import Estimate, Steps, guess, padded_sizes
from p2d_core.progress import Progress
from p2d_core.samples.schema import Sample, from_table, to_table
from p2d_core.samples.shards import TARGET_ROWS
from p2d_core.samples.tokens import EncodedSample
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import SUBSET, select_subset
from tasks.measurements import NO_TARGET, scorer_step
from tasks.stage import Plugin, Runtime

BACKWARD = 3
"""A training step over a forward pass."""
GENERATED = 16
"""A token that is generated over one that passes with others."""
LEAST_CHOSEN = 32
"""Samples whose lengths may stand for a subset's."""
SHUFFLES = 8
"""Passes over the samples whose batches say how large one is on average."""


class _Asked(Sequence[EncodedSample]):
    """Samples that note which are asked for, one by one, by their lengths."""

    def __init__(self, samples: list[EncodedSample]) -> None:
        self.samples = samples
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[EncodedSample]:
        return iter(self.samples)

    def __getitem__(self, index: Any) -> Any:
        found = self.samples[index]
        if isinstance(index, int):
            self.lengths.append(len(found))
        return found


class Rehearsal:
    """One model, and the stages of a run tried on it in their order.

    What a process does for the first time (imports, the first load) then falls to the same stage
    as in the run. The weights stay as they are: trainings have a learning rate of 0.
    """

    def __init__(
        self, inputs: Inputs, runtime: Runtime, data: Preview, folder: Path, budget: Budget
    ) -> None:
        self.inputs, self.runtime, self.data = inputs, runtime, data
        self.folder, self.budget = folder, budget
        self.base = LoadedBase(inputs.base, runtime, data.drawn, budget.seconds)
        self.heads: HeadMap | None = None
        """As it was ranked; heads drawn at random stand for it until then."""
        self.kept: Path | None = None
        """What the adaptation keeps, for evaluation."""
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

    def proxy(self) -> Estimate:
        """All attention projections, tuned on the proxy set."""
        model = self.base.model("float32")
        Attention().attach(model, attention_layers(model), None, self.inputs.base.folder)
        tuned = self._tuned(model, self.inputs.proxy_training)
        self.base.rest(model)
        return self.base.load() + tuned

    def ranking(self) -> Estimate:
        """The heads, by slices that have not moved: the cost is the same."""
        load = self.base.captured_load()
        captured, plugin = self.base.captured, self.inputs.ranker
        with stopwatch() as before:
            evidence = RankingEvidence(
                model=captured.model,
                layers=captured.layers,
                proxy=attention_slices(captured.model, captured.layers),
                samples=captured.encode(self.data.target.proxy),
                pad_id=captured.pad_id,
            )
        ranker = rankers.make(plugin.name, plugin.options)
        ranked = time_steps(
            lambda tell: ranker.rank(replace(evidence, progress=tell)), self.budget.share
        )
        return load + before.estimate + ranked.all + self.picture()

    def picture(self) -> Estimate:
        """The head map as it is kept."""
        with stopwatch() as drawn:
            pq.write_table(self.head_map.to_table(), self.folder / HEADS)
            draw(self.head_map, self.folder / "heads.png", self.inputs.ranker.name)
        return drawn.estimate

    def tuning(self, adaptation: Plugin, training: TrainingSpec) -> Estimate:
        """An adaptation on the proxy set, as head_proxy and each rate of a search have it."""
        model, attached, before = self._attached(adaptation)
        tuned = self._tuned(attached.model, training)
        kept = self._kept(model, attached, self.folder / "tuned")
        return self.base.load() + before + tuned + kept

    def measuring(self, step: int, rows: float) -> Estimate:
        """``rows`` samples, in shards, in one step of the scorer."""
        one = scorer_step(self.inputs.scorer, step).scorer
        load = self.base.captured_load() if one.runs_model else Estimate()
        model = self.base.seen(self.head_map if one.needs_head_proxy else None)
        heads = self.head_map if one.needs_heads else None
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
        prepared = self._parts(prepare, seen, len(seen), share=0.2, passes=back)
        if not state:
            return load + prepared + self._unseen(rows)
        with stopwatch() as again:  # some keep what they prepare for the next shard
            prepare(state["size"])
        measured = self._parts(work, drawn[:TARGET_ROWS], rows, share=0.7, passes=passes)
        if (file := self.folder / f"{step}-{MEASURED}").exists():
            self._count(file, rows / max(1, pq.ParquetFile(file).metadata.num_rows))
        return load + prepared + again.estimate.times(rows / TARGET_ROWS) + measured

    def scoring(self, step: int, rows: int) -> Estimate:
        """Affinities of ``rows`` samples."""
        one = scorer_step(self.inputs.scorer, step)
        load = self.base.captured_load() if one.scorer.runs_model else Estimate()
        model = self.base.seen(self.head_map if one.scorer.needs_head_proxy else None)
        heads = self.head_map if one.scorer.needs_heads else None
        proxy, held_out = self.data.target.proxy, self.data.target.held_out
        state: dict[str, Any] = {}

        def prepare(size: int) -> None:
            state["made"] = one.scorer.prepare(model, heads, Target(proxy[:size], held_out[:size]))

        seen = max(proxy, held_out, key=len)
        passes = 1.0 if one.scorer.runs_model else 0.0
        prepared = self._parts(prepare, seen, len(seen), share=0.8, passes=passes)
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

    def training(self, chosen: Sequence[Sample], n: int) -> Estimate:
        """The adaptation on ``n`` samples, of which ``chosen`` are some."""
        model, attached, before = self._attached(self.inputs.adaptation)
        trained = self._trained(attached.model, chosen, n, self.inputs.training)
        self.kept = self.folder / "kept"
        kept = self._kept(model, attached, self.kept)
        return self.base.load() + before + trained + kept

    def _attached(self, adaptation: Plugin) -> tuple[Any, Attached, Estimate]:
        plugin = adaptations.make(adaptation.name, adaptation.options)
        model = self.base.model("float32" if plugin.moves_weights else self.inputs.base.precision)
        heads = self.head_map if plugin.needs_heads else None
        with stopwatch() as attaching:
            attached = plugin.attach(model, attention_layers(model), heads, self.inputs.base.folder)
        return model, attached, attaching.estimate

    def _kept(self, model: Any, attached: Attached, folder: Path) -> Estimate:
        """Keeping what moved, after which the model is as it was."""
        folder.mkdir(exist_ok=True)
        with stopwatch() as keeping:
            attached.keep(folder)
        if attached.model is not model:
            self.base.forget()
        self.base.rest(model)
        return keeping.estimate

    def full(self, n: int) -> Estimate:
        """Full fine-tuning on ``n`` samples, as it is run."""
        model = self.base.model("float32")
        Full().attach(model, attention_layers(model), None, self.inputs.base.folder)
        trained = self._trained(model, self.data.drawn, n, self.inputs.full_training)
        self.base.rest(model)
        return self.base.load() + trained

    def calibration(self, steps: int, n: int) -> tuple[Estimate, Estimate]:
        """What timing full fine-tuning takes, and what it is found to take on ``n`` samples."""
        model = self.base.model("float32")
        spec = replace(self.inputs.full_training, learning_rate=0.0)
        encoded, encoding = self._encoded(self.data.drawn, len(self.data.drawn))
        size = self._batch(spec.batch_size)
        all_steps = spec.steps(n)
        if not size:
            step = self._unseen(BACKWARD * spec.batch_size)
            return self.base.load() + step.times(steps), step.times(all_steps)

        def run(tell: Progress) -> None:
            calibrate_full(
                model,
                encoded,
                replace(spec, batch_size=size),
                pad_id=self.base.captured.pad_id,
                n_samples=n,
                steps=steps,
                mixed_precision=self._mixed,
                gradient_checkpointing=self.runtime.gradient_checkpointing,
                micro_batch_tokens=self.runtime.micro_batch_tokens,
                progress=tell,
            )

        timed = self._steps(run, encoded, size, spec, n)
        self.base.rest(model)
        before = self.base.load() + Estimate(self.data.seconds_to_read) + encoding
        return before + timed.all, timed.step.times(all_steps)

    def evaluating(self, samples: Sequence[Sample], *, adapter: bool) -> Estimate:
        """A model on evaluation samples, without loading it; with what `training` kept or not."""
        model = self.base.seen().model
        with stopwatch() as attached:
            if adapter and self.kept is not None:
                model = adapted(model, self.kept)

        def work(size: int) -> None:
            evaluate(
                model,
                self.base.captured.encoder,
                samples[:size],
                self.inputs.evaluating,
                device=self.base.captured.device,
                tokens_per_batch=self.runtime.tokens_per_batch,
            )

        generates = any(metrics.get(name).generates for name in self.inputs.evaluating.measured)
        passes = 1.0 + GENERATED * generates
        timed = self._parts(work, samples, len(samples), passes=passes, by_tokens=not generates)
        if adapter:
            self.base.forget()
        return attached.estimate + timed

    @property
    def head_map(self) -> HeadMap:
        """The run's, or one of as many heads drawn at random."""
        if self.heads is None:
            layers = self.base.seen().layers
            scores = torch.rand(
                len(layers), layers[0].n_query_heads, generator=torch.Generator().manual_seed(0)
            )
            self.heads = self.inputs.pick.of(scores, layers[0].n_kv_groups)
        return self.heads

    @property
    def _mixed(self) -> bool:
        return self.inputs.base.precision == "bfloat16"

    def _parts(
        self,
        work: Callable[[int], object],
        samples: Sequence[Sample],
        items: float,
        *,
        share: float = 1.0,
        passes: float = 1.0,
        by_tokens: bool = True,
    ) -> Estimate:
        """`time_parts` within a share of the time; a model too slow for that is not begun with.

        Args:
            samples: those at hand, of ``items`` like them.
            passes: forward passes that a sample takes, about; 0 if the model is not run.
            by_tokens: the work grows with their tokens, not with their number.
        """
        seconds = share * self.budget.share
        expected = passes * self.base.tokens * self.base.token_seconds
        if expected > max(seconds, self.budget.left):
            return self._unseen(passes * items)
        first = max(1, min(FIRST, int(seconds / expected))) if expected else FIRST
        weights = [1] * len(samples)
        if passes and by_tokens:
            weights = [len(each) for each in self.base.captured.encoder.encode_all(samples)]
        whole = sum(weights) * items / max(1, len(samples))
        return time_parts(work, weights, whole, seconds, first)

    def _tuned(self, model: Any, spec: TrainingSpec) -> Estimate:
        """On the proxy set, with the loss on the held-out samples before and after."""
        captured, proxy = self.base.captured, self.data.target.proxy
        held_out, encoding = self._encoded(
            self.data.target.held_out, len(self.data.target.held_out)
        )
        losses = self._parts(
            lambda size: captured.losses_of(model, held_out[:size]),
            self.data.target.held_out,
            len(held_out),
            share=0.25,
        )
        trained = self._trained(model, proxy, len(proxy), spec)
        return encoding + losses.times(2) + trained

    def _trained(
        self, model: Any, samples: Sequence[Sample], n: int, spec: TrainingSpec
    ) -> Estimate:
        """A training on ``n`` samples, from some steps on those at hand."""
        with stopwatch() as imported:
            from p2d_core.adaptation.training import train
        encoded, encoding = self._encoded(samples, n)
        steps = spec.steps(n)
        size = self._batch(spec.batch_size)
        if not size:
            trained = self._unseen(BACKWARD * spec.batch_size * steps)
        else:
            passes_over = steps / -(-len(encoded) // size)
            timed = self._steps(
                lambda tell: train(
                    model,
                    encoded,
                    replace(spec, epochs=passes_over, batch_size=size, learning_rate=0.0),
                    pad_id=self.base.captured.pad_id,
                    scratch=self.folder / "training",
                    checkpoint_seconds=float("inf"),
                    mixed_precision=self._mixed,
                    gradient_checkpointing=self.runtime.gradient_checkpointing,
                    micro_batch_tokens=self.runtime.micro_batch_tokens,
                    progress=tell,
                ),
                encoded,
                size,
                spec,
                n,
            )
            trained = timed.all
        return imported.estimate + encoding + trained

    def _steps(
        self,
        run: Callable[[Progress], object],
        encoded: _Asked,
        size: int,
        spec: TrainingSpec,
        n_in_all: int,
    ) -> Steps:
        """Steps of ``size`` samples, as they would be with as many as ``spec`` has."""
        timed = time_steps(run, self.budget.share)
        n, asked = len(encoded), encoded.lengths
        passes = [asked[i : i + n] for i in range(0, len(asked), n)]
        sizes = [each for lengths in passes for each in padded_sizes(lengths, size)]
        rng, lengths = random.Random(0), [len(each) for each in encoded.samples]
        usual = []
        for seed in range(SHUFFLES):
            shuffled = rng.sample(lengths, n)
            if spec.group_by_length:
                order = like_length(shuffled, spec.batch_size, seed, n_in_all)
                shuffled = [shuffled[i] for i in order]
            usual += padded_sizes(shuffled, spec.batch_size)
        return replace(
            timed,
            sizes=sizes[: len(timed.marks)],
            size=statistics.fmean(usual),
            ended=timed.ended if size == spec.batch_size or not timed.marks else 0.0,
        )

    def _batch(self, batch_size: int) -> int:
        """How many samples a step that is timed may have; 0: not one would be done in time."""
        expected = BACKWARD * self.base.tokens * self.base.token_seconds
        seconds = max(self.budget.share, self.budget.left / 4)
        return min(batch_size, int(seconds / (LEAST_STEPS * expected)))

    def _unseen(self, passes: float) -> Estimate:
        """Of so many samples' forward passes, where none was timed."""
        return guess(passes * self.base.tokens * self.base.token_seconds)

    def _encoded(self, samples: Sequence[Sample], n: int) -> tuple[_Asked, Estimate]:
        """Token ids, and what they take for ``n`` samples."""
        with stopwatch() as encoding:
            encoded = list(self.base.captured.encoder.encode_all(samples))
        return _Asked(encoded), encoding.estimate.times(n / max(1, len(samples)))

    def _count(self, file: Path, times: float) -> None:
        self.bytes += file.stat().st_size * times
