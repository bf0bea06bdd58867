"""Tries what each stage will do to the model, with the functions that will do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from flows.inputs import Inputs
from flows.loaded import LoadedBase
from flows.preview import Preview
from flows.timing import Budget, stopwatch, time_steps
from flows.trial import Trial
from p2d_core.adaptation.adaptations import (
    Attached,
    Attention,
    Full,
    adaptations,
    adapted,
    attention_slices,
)
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.attention.layout import attention_layers
from p2d_core.evaluation import metrics
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.heads.head_map import HEADS, HeadMap
from p2d_core.heads.picture import draw
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.planning import Estimate
from p2d_core.samples.schema import Sample
from tasks.stage import Plugin, Runtime

GENERATED = 16
"""A token that is generated over one that passes with others."""


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
        mixed = inputs.base.precision == "bfloat16"
        self.trial = Trial(self.base, runtime, budget, folder / "training", mixed)
        self.heads: HeadMap | None = None
        """As it was ranked; heads drawn at random stand for it until then."""
        self.kept: Path | None = None
        """What the adaptation keeps, for evaluation."""

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

    def training(self, chosen: Sequence[Sample], n: int) -> Estimate:
        """The adaptation on ``n`` samples, of which ``chosen`` are some."""
        model, attached, before = self._attached(self.inputs.adaptation)
        trained = self.trial.training(attached.model, chosen, n, self.inputs.training)
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
        trained = self.trial.training(model, self.data.drawn, n, self.inputs.full_training)
        self.base.rest(model)
        return self.base.load() + trained

    def calibration(self, steps: int, n: int) -> tuple[Estimate, Estimate]:
        """What timing full fine-tuning takes, and what it is found to take on ``n`` samples."""
        timed, whole = self.trial.calibration(self.data.drawn, n, self.inputs.full_training, steps)
        return self.base.load() + Estimate(self.data.seconds_to_read) + timed, whole

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
        timed = self.trial.parts(
            work, samples, len(samples), passes=passes, by_tokens=not generates
        )
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

    def _tuned(self, model: Any, spec: TrainingSpec) -> Estimate:
        """On the proxy set, with the loss on the held-out samples before and after."""
        captured, proxy = self.base.captured, self.data.target.proxy
        held_out, encoding = self.trial.encoded(
            self.data.target.held_out, len(self.data.target.held_out)
        )
        losses = self.trial.parts(
            lambda size: captured.losses_of(model, held_out[:size]),
            self.data.target.held_out,
            len(held_out),
            share=0.25,
        )
        trained = self.trial.training(model, proxy, len(proxy), spec)
        return encoding + losses.times(2) + trained
