"""Times a few steps of what each stage will do, with the functions that will do it."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from flows.inputs import Inputs
from flows.preview import Preview
from flows.settings import RunSettings
from p2d_core.adaptation.adaptations import (
    Attention,
    Full,
    adaptations,
    adapted,
    attention_slices,
    n_trainable,
)
from p2d_core.adaptation.calibration import calibrate_full
from p2d_core.adaptation.masked import attach_head_deltas
from p2d_core.adaptation.slices import TunedSlices
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.affinity import Step, Target
from p2d_core.affinity.measuring import MEASURED, MeasuredCorpus, measure_shard
from p2d_core.affinity.scoring import SCORES, passing_ids, score_corpus
from p2d_core.attention.layout import attention_layers, slices_of
from p2d_core.errors import P2DError
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.heads.head_map import HEADS, HeadMap
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.models import load_model
from p2d_core.planning import Estimate, Pace, pace_of, saves, scaled
from p2d_core.progress import Progress
from p2d_core.samples.schema import Sample, from_table, to_table
from p2d_core.samples.tokens import EncodedSample
from p2d_core.selection.subset import SUBSET, SelectionSpec, select_subset
from p2d_core.store.recipe import hash_file
from tasks.measurements import NO_TARGET, scorer_step
from tasks.room import COPIES, NUMBER
from tasks.stage import Runtime

LEAST_STEPS, MOST_STEPS = 2, 60
"""Steps of a training that are timed: the least even when time is short; beyond the most, no more
after `ENOUGH_SECONDS`."""
ENOUGH_SECONDS = 3.0
FIRST, GROWTH = 8, 4
"""Samples of the first part that is timed, and how much larger the next is."""
WORTH_LOADING_AGAIN = 0.05
"""Of the time there is: a model that loads in less is loaded twice, the first time takes longer."""
DISK_BYTES = 16 * 2**20
BYTES_SAVED = COPIES * NUMBER
"""Of a number that is trained, in a checkpoint."""


class _Enough(Exception):
    """Enough steps are timed."""


@dataclass
class Budget:
    """Seconds for all that is to be timed; each gets an even share of what is left."""

    seconds: float
    parts: int = 1
    """Still to come."""
    _began: float = field(default_factory=time.monotonic)

    def share(self) -> float:
        """Of the next part; at least a moment."""
        left = self.seconds - (time.monotonic() - self._began)
        share = left / max(1, self.parts)
        self.parts -= 1
        return max(0.1, share)


def time_steps(run: Callable[[Progress], object], seconds: float) -> Pace:
    """Times the steps that ``run`` tells of, and stops it once that is enough."""
    begin = time.perf_counter()
    marks: list[float] = []
    steps = 1

    def tell(done: int, of: int) -> None:
        nonlocal steps
        steps = of
        marks.append(time.perf_counter() - begin)
        if done == of or len(marks) < LEAST_STEPS:
            return
        if marks[-1] > seconds or (len(marks) >= MOST_STEPS and marks[-1] > ENOUGH_SECONDS):
            raise _Enough

    try:
        run(tell)
    except _Enough:
        return pace_of(marks, steps)
    return pace_of(marks, steps, ended=time.perf_counter() - begin)


def time_parts(
    work: Callable[[int], object], available: int, items: float, seconds: float
) -> Estimate:
    """Seconds that ``work`` takes for ``items``, from growing parts of those ``available``."""
    timed: list[tuple[int, float]] = []
    size = min(FIRST, available)
    end = time.perf_counter() + seconds
    while size:
        start = time.perf_counter()
        work(size)
        took = time.perf_counter() - start
        timed.append((size, took))
        if size == available or time.perf_counter() + took * GROWTH > end:
            break
        size = min(available, size * GROWTH)
    return scaled(timed, items) if timed else Estimate()


class _Repeated(Sequence[EncodedSample]):
    """``n`` samples, of which those that are there come again and again."""

    def __init__(self, encoded: Sequence[EncodedSample], n: int) -> None:
        self.encoded, self.n = encoded, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        return self.encoded[index % len(self.encoded)]


@dataclass
class Rehearsal:
    """One model, and the stages of a run tried on it in their order.

    What a process does for the first time (imports, the first load) then falls to the same stage
    as in the run. The weights stay as they are: trainings have a learning rate of 0.
    """

    settings: RunSettings
    inputs: Inputs
    runtime: Runtime
    data: Preview
    folder: Path
    """For files that nobody needs afterwards."""
    budget: Budget
    heads: HeadMap | None = None
    """As it was ranked; heads drawn at random stand for it until then."""

    def __post_init__(self) -> None:
        # one of its own: the process may keep the other for a run
        self.captured = replace(self.inputs.base.captured(self.runtime))
        self.kept: Path | None = None
        """What the adaptation keeps, for evaluation."""
        self.chosen: list[Sample] = []
        """Samples of the subset, or what stands for them."""
        self._loaded: dict[str, Any] = {}
        self._load_seconds: list[float] = []
        self._loads = 0
        self._captured_is_paid = False
        self._disk_rate = 0.0
        self._scores: Path | None = None
        self._shard = self.folder / "shard.parquet"
        pq.write_table(to_table(self.data.drawn), self._shard, compression="zstd")
        self.bytes = self._shard.stat().st_size * self.data.corpus / len(self.data.drawn)
        """That artifacts would take; of the corpus so far."""
        self.most_trained = 0
        """Numbers, in the largest training that is long enough for checkpoints."""

    def proxy(self) -> Estimate:
        """All attention projections, tuned on the proxy set."""
        model = self._model("float32")
        with _timed() as whole:
            layers = attention_layers(model)
            Attention().attach(model, layers, None, self.inputs.base.folder)
        tuned = self._tuned(model, self.inputs.proxy_training)
        with _timed() as kept:
            attention_slices(model, layers).save(self.folder / "slices")
        self._count("slices")
        self._at_rest(model)
        return self.load() + whole.estimate + tuned + kept.estimate

    def ranking(self) -> Estimate:
        """The heads, by slices that have not moved: the cost is the same."""
        load = self.captured_load()
        captured = self.captured
        with _timed() as before:
            evidence = RankingEvidence(
                model=captured.model,
                layers=captured.layers,
                proxy=attention_slices(captured.model, captured.layers),
                samples=captured.encode(self.data.target.proxy),
                pad_id=captured.pad_id,
            )
        plugin = self.inputs.ranker
        ranker = rankers.make(plugin.name, plugin.options)
        pace = time_steps(
            lambda tell: ranker.rank(replace(evidence, progress=tell)), self.budget.share()
        )
        return load + before.estimate + pace.total + self._picture()

    def average(self) -> Estimate:
        """One head map of several draws' maps."""
        return self._picture()

    def head_proxy(self) -> Estimate:
        """The task heads alone, tuned on the proxy set."""
        model = self._model(self.inputs.base.precision)
        include_kv = self.settings.heads.include_kv
        with _timed() as before:
            layers = attention_layers(model)
            deltas = attach_head_deltas(
                model, layers, self.head_map.task_heads, include_kv=include_kv
            )
        tuned = self._tuned(model, self.inputs.head_proxy_training)
        with _timed() as kept:
            deltas.tuned().save(self.folder / "head_slices")
        self._count("head_slices")
        deltas.detach(merge=False)
        self._at_rest(model)
        return self.load() + before.estimate + tuned + kept.estimate

    def measuring(self, step: int, rows: float, shards: int) -> Estimate:
        """``rows`` samples in so many shards, in one step of the scorer."""
        one = self._step(step).scorer
        drawn = self._drawn_for(step)
        load = self.captured_load() if one.runs_model else Estimate()
        model = self._captured(tuned=one.needs_head_proxy)
        heads = self.head_map if one.needs_heads else None
        known = self._target if one.measures_target else NO_TARGET
        with _timed() as first:
            state = one.prepare(model, heads, known)
        with _timed() as again:
            one.prepare(model, heads, known)

        def work(size: int) -> None:
            measured = measure_shard(one, model, state, drawn[:size])
            pq.write_table(measured, self.folder / MEASURED, compression="zstd")

        available = min(len(drawn), max(1, self.data.rows_in_shard))
        measured = time_parts(work, available, rows, self.budget.share())
        if (self.folder / MEASURED).exists():
            self._count(MEASURED, rows / pq.ParquetFile(self.folder / MEASURED).metadata.num_rows)
        prepared = first.estimate + again.estimate.times(max(0, shards - 1))
        return load + prepared + measured

    def scoring(self, step: int, rows: int) -> tuple[Estimate, float]:
        """Affinities of ``rows`` samples; and the share of them that pass the gates so far."""
        one = self._step(step)
        load = self.captured_load() if one.scorer.runs_model else Estimate()
        model = self._captured(tuned=one.scorer.needs_head_proxy)
        heads = self.head_map if one.scorer.needs_heads else None
        proxy, held_out = self.data.target.proxy, self.data.target.held_out
        most = max(len(proxy), len(held_out))
        prepared = time_parts(
            lambda size: one.scorer.prepare(model, heads, Target(proxy[:size], held_out[:size])),
            most,
            most,
            self.budget.share(),
        )
        drawn = self._drawn_for(step)
        state = one.scorer.prepare(model, heads, self._target)
        known = self._target if one.scorer.measures_target else NO_TARGET
        of_measure = one.scorer.prepare(model, heads, known)
        measured = self.folder / MEASURED
        pq.write_table(measure_shard(one.scorer, model, of_measure, drawn), measured)
        file = self.folder / f"scores-{step}.parquet"
        with _timed() as scored:
            outcome = score_corpus(
                one,
                state,
                MeasuredCorpus([(self._shard, measured)]),
                file,
                previous=self._scores,
            )
        self._scores = file
        self._count(file.name, rows / max(1, outcome.rows))
        share = outcome.passed / max(1, outcome.rows)
        return load + prepared + scored.estimate.times(rows / max(1, outcome.rows)), share

    def selecting(self, selection: SelectionSpec, rows: int) -> Estimate:
        """A subset; what was drawn from the samples at hand stands for it in `training`."""
        folder = self.folder / "subset"
        folder.mkdir(exist_ok=True)
        lengths = [each.n_response for each in self.captured.encode(self.data.target.proxy)]
        with _timed() as read:
            pq.read_table(self._shard)
        if self._scores is None:
            self._scores = self._random_scores()
            selection = replace(selection, at_random=True)
        with _timed() as selected:
            try:
                select_subset(self._scores, [self._shard], lengths, selection, folder)
                self.chosen = from_table(pq.read_table(folder / SUBSET))
                self._count(f"subset/{SUBSET}", rows / len(self.data.drawn))
            except P2DError:
                # of so few samples no such subset can be drawn; of the corpus it may
                self.chosen = self.data.drawn
        more = max(0.0, rows / max(1, len(self.data.drawn)) - 1)
        return selected.estimate + read.estimate.times(more)

    def training(self, chosen: Sequence[Sample], n: int) -> Estimate:
        """The adaptation on ``n`` samples, of which ``chosen`` are some."""
        plugin = adaptations.make(self.inputs.adaptation.name, self.inputs.adaptation.options)
        precision = "float32" if plugin.moves_weights else self.inputs.base.precision
        model = self._model(precision)
        heads = self.head_map if plugin.needs_heads else None
        with _timed() as before:
            attached = plugin.attach(model, attention_layers(model), heads, self.inputs.base.folder)
        encoded, encoding = self._encoded(chosen or self.data.drawn, n)
        trained = self._trained(attached.model, encoded, n, self.inputs.training).total
        self.kept = self.folder / "kept"
        self.kept.mkdir(exist_ok=True)
        with _timed() as kept:
            attached.keep(self.kept)
        for file in self.kept.rglob("*.safetensors"):
            self._count(str(file.relative_to(self.folder)))
        if attached.model is not model:
            self._forget()
        else:
            self._at_rest(model)
        return self.load() + before.estimate + encoding + trained + kept.estimate

    def full(self) -> Estimate:
        """Full fine-tuning on the whole corpus, as it is run."""
        model = self._model("float32")
        Full().attach(model, attention_layers(model), None, self.inputs.base.folder)
        encoded, encoding = self._encoded(self.data.drawn, self.data.corpus)
        pace = self._trained(model, encoded, self.data.corpus, self.inputs.full_training)
        size = n_trainable(model) * NUMBER
        self.bytes += size
        kept = Estimate(size / self.disk_rate)
        self._at_rest(model)
        return self.load() + encoding + pace.total + kept

    def calibration(self) -> tuple[Estimate, Estimate]:
        """What timing full fine-tuning takes, and what full fine-tuning is found to take."""
        model = self._model("float32")
        spec = replace(self.inputs.full_training, learning_rate=0.0)
        steps = self.settings.arms.calibration_steps
        encoded, encoding = self._encoded(self.data.drawn, len(self.data.drawn))

        def run(tell: Progress) -> None:
            calibrate_full(
                model,
                encoded,
                spec,
                pad_id=self.captured.pad_id,
                n_corpus=self.data.corpus,
                steps=steps,
                mixed_precision=self._mixed,
                progress=tell,
            )

        pace = time_steps(run, self.budget.share())
        self._at_rest(model)
        reading = Estimate(self.data.seconds_to_read)
        all_steps = pace.step.times(spec.steps(self.data.corpus))
        return self.load() + reading + encoding + pace.total, all_steps

    def evaluating(self, samples: Sequence[Sample], *, adapter: bool) -> Estimate:
        """A model on evaluation samples, without loading it; with what `training` kept or not."""
        self._captured(tuned=False)
        model = self.captured.model
        with _timed() as attached:
            if adapter and self.kept is not None:
                model = adapted(model, self.kept)

        def work(size: int) -> None:
            evaluate(
                model,
                self.captured.encoder,
                samples[:size],
                self.inputs.evaluating,
                device=self.captured.device,
                tokens_per_batch=self.runtime.tokens_per_batch,
            )

        timed = time_parts(work, len(samples), len(samples), self.budget.share())
        if adapter:
            self._forget()
        return attached.estimate + timed

    def load(self) -> Estimate:
        """What the next load of the base takes: the first of the process, or a later one."""
        self._model(self.inputs.base.precision)
        self._loads += 1
        return Estimate(self._load_seconds[0 if self._loads == 1 else -1])

    def captured_load(self) -> Estimate:
        """Of the one that ranking, scoring and evaluation share: whoever comes first pays."""
        self._captured(tuned=False)
        if self._captured_is_paid:
            return Estimate()
        self._captured_is_paid = True
        return self.load()

    @property
    def head_map(self) -> HeadMap:
        """The run's, or one of as many heads drawn at random."""
        if self.heads is None:
            layers = self.captured.layers
            scores = torch.rand(
                len(layers), layers[0].n_query_heads, generator=torch.Generator().manual_seed(0)
            )
            self.heads = self.inputs.pick.of(scores, layers[0].n_kv_groups)
        return self.heads

    @property
    def disk_rate(self) -> float:
        """Bytes a second that are written and hashed."""
        if not self._disk_rate:
            file = self.folder / "disk"
            with _timed() as written:
                file.write_bytes(random.Random(0).randbytes(DISK_BYTES))
                hash_file(file)
            file.unlink()
            self._disk_rate = DISK_BYTES / written.seconds
        return self._disk_rate

    @property
    def tokens(self) -> float:
        """Of a sample of the corpus, on average."""
        encoded = list(self.captured.encoder.encode_all(self.data.drawn))
        return sum(len(each) for each in encoded) / len(encoded)

    @property
    def _mixed(self) -> bool:
        return self.inputs.base.precision == "bfloat16"

    @property
    def _target(self) -> Target:
        return Target(self.data.target.proxy, self.data.target.held_out)

    def _step(self, step: int) -> Step:
        return scorer_step(self.inputs.scorer, step)

    def _drawn_for(self, step: int) -> list[Sample]:
        """Those at hand, or of them what passed the step before."""
        if not step or self._scores is None:
            return self.data.drawn
        passed = passing_ids(self._scores, 0)
        return [each for each in self.data.drawn if each.sample_id in passed]

    def _random_scores(self) -> Path:
        """Where the scores are there already: any will do to see how long a draw takes."""
        from p2d_core.affinity.random import Random

        step = Step("affinity", Random())
        measured, file = self.folder / "any.parquet", self.folder / SCORES
        table = measure_shard(step.scorer, self.captured, {}, self.data.drawn)
        pq.write_table(table, measured)
        state = step.scorer.prepare(self.captured, None, self._target)
        score_corpus(step, state, MeasuredCorpus([(self._shard, measured)]), file)
        return file

    def _captured(self, *, tuned: bool) -> Any:
        """The base; with the task heads' slices, as they are, where tuned ones will be used."""
        self.captured.__dict__["model"] = self._model(self.inputs.base.precision)
        if not tuned:
            return self.captured
        pieces = slices_of(self.captured.layers, self.head_map.task_heads)
        slices = TunedSlices.from_model(self.captured.model, pieces)
        model = replace(self.captured, tuned=slices)
        model.__dict__.update({k: v for k, v in self.captured.__dict__.items() if k != "tuned"})
        return model

    def _picture(self) -> Estimate:
        from p2d_core.heads.picture import draw

        with _timed() as drawn:
            pq.write_table(self.head_map.to_table(), self.folder / HEADS)
            draw(self.head_map, self.folder / "heads.png", self.inputs.ranker.name)
        return drawn.estimate

    def _tuned(self, model: Any, spec: TrainingSpec) -> Estimate:
        """On the proxy set, with the loss on the held-out samples before and after."""
        data, captured = self.data.target, self.captured
        with _timed() as encoding:
            encoded = captured.encoder.encode_all(data.proxy)
            encoded, held_out = list(encoded), list(captured.encoder.encode_all(data.held_out))
        losses = time_parts(
            lambda size: captured.losses_of(model, held_out[:size]),
            len(held_out),
            len(held_out),
            self.budget.share() / 4,
        )
        trained = self._trained(model, encoded, len(encoded), spec)
        return encoding.estimate + losses.times(2) + trained.total

    def _trained(
        self, model: Any, encoded: Sequence[EncodedSample], n: int, spec: TrainingSpec
    ) -> Pace:
        """Some steps of a training on ``n`` samples, as many as there is time for."""
        start = time.perf_counter()
        from p2d_core.adaptation.training import train

        imported = time.perf_counter() - start
        scratch = self.folder / "training"
        share = self.budget.share()
        pace = time_steps(
            lambda tell: train(
                model,
                _Repeated(encoded, n),
                replace(spec, learning_rate=0.0),
                pad_id=self.captured.pad_id,
                scratch=scratch,
                checkpoint_seconds=float("inf"),
                mixed_precision=self._mixed,
                progress=tell,
            ),
            share,
        )
        n_saves = saves(pace.total.seconds, self.runtime.checkpoint_seconds)
        saved = n_saves * n_trainable(model) * BYTES_SAVED / self.disk_rate if n_saves else 0.0
        if n_saves:
            self.most_trained = max(self.most_trained, n_trainable(model))
        whole = None if pace.whole is None else pace.whole + imported
        return replace(pace, start=pace.start + Estimate(imported + saved), whole=whole)

    def _encoded(self, samples: Sequence[Sample], n: int) -> tuple[list[EncodedSample], Estimate]:
        """Token ids, and what they take for ``n`` samples."""
        with _timed() as encoding:
            encoded = list(self.captured.encoder.encode_all(samples))
        return encoded, encoding.estimate.times(n / max(1, len(samples)))

    def _model(self, precision: str) -> Any:
        """The base in that precision; loaded once, and kept until another is asked for."""
        if precision not in self._loaded:
            self._forget()
            with _timed() as loading:
                _ = self.captured.encoder
                self._loaded[precision] = self._fresh(precision)
            self._load_seconds.append(loading.seconds)
            if loading.seconds < WORTH_LOADING_AGAIN * self.budget.seconds:
                with _timed() as again:
                    self._fresh(precision)
                self._load_seconds.append(again.seconds)
            self.captured.__dict__["model"] = self._loaded[precision]
        return self._loaded[precision]

    def _fresh(self, precision: str) -> Any:
        return load_model(Path(self.inputs.base.folder), precision, self.captured.device)

    def _count(self, file: str, times: float = 1.0) -> None:
        self.bytes += (self.folder / file).stat().st_size * times

    def _at_rest(self, model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False).eval()

    def _forget(self) -> None:
        self._loaded.clear()
        self.captured.__dict__.pop("model", None)
        gc.collect()


@dataclass
class _Timed:
    seconds: float = 0.0

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.seconds)


@contextmanager
def _timed() -> Iterator[_Timed]:
    timed = _Timed()
    start = time.perf_counter()
    yield timed
    timed.seconds = time.perf_counter() - start
