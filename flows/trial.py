"""A part of some work on a loaded model, timed, and what all of it would take."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.loaded import LoadedBase
from flows.timing import FIRST, LEAST_STEPS, Budget, stopwatch, time_parts, time_steps
from p2d_core.adaptation.calibration import calibrate_full
from p2d_core.adaptation.like_length import like_length
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.planning import Estimate, Steps, guess, padded_sizes
from p2d_core.progress import Progress
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample
from tasks.stage import Runtime

BACKWARD = 3
"""A training step over a forward pass."""
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


@dataclass
class Trial:
    """Times a few steps of a training, or some of many samples; a training has a rate of 0."""

    base: LoadedBase
    runtime: Runtime
    budget: Budget
    folder: Path
    """That a training may write to."""
    mixed_precision: bool

    def parts(
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
            return self.unseen(passes * items)
        first = max(1, min(FIRST, int(seconds / expected))) if expected else FIRST
        weights = [1] * len(samples)
        if passes and by_tokens:
            weights = [len(each) for each in self.base.captured.encoder.encode_all(samples)]
        whole = sum(weights) * items / max(1, len(samples))
        return time_parts(work, weights, whole, seconds, first)

    def training(
        self, model: Any, samples: Sequence[Sample], n: int, spec: TrainingSpec
    ) -> Estimate:
        """A training on ``n`` samples, from some steps on those at hand."""
        with stopwatch() as imported:
            from p2d_core.adaptation.training import train
        encoded, encoding = self.encoded(samples, n)
        steps = spec.steps(n)
        size = self._batch(spec.batch_size)
        if not size:
            trained = self.unseen(BACKWARD * spec.batch_size * steps)
        else:
            passes_over = steps / -(-len(encoded) // size)
            timed = self._steps(
                lambda tell: train(
                    model,
                    encoded,
                    replace(spec, epochs=passes_over, batch_size=size, learning_rate=0.0),
                    pad_id=self.base.captured.pad_id,
                    scratch=self.folder,
                    checkpoint_seconds=float("inf"),
                    mixed_precision=self.mixed_precision,
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

    def calibration(
        self, samples: Sequence[Sample], n: int, spec: TrainingSpec, steps: int
    ) -> tuple[Estimate, Estimate]:
        """What timing ``steps`` of full fine-tuning takes, and what all its steps are found to."""
        model = self.base.model("float32")
        encoded, encoding = self.encoded(samples, len(samples))
        size = self._batch(spec.batch_size)
        all_steps = spec.steps(n)
        if not size:
            step = self.unseen(BACKWARD * spec.batch_size)
            return step.times(steps), step.times(all_steps)

        def run(tell: Progress) -> None:
            calibrate_full(
                model,
                encoded,
                replace(spec, batch_size=size, learning_rate=0.0),
                pad_id=self.base.captured.pad_id,
                n_samples=n,
                steps=steps,
                mixed_precision=self.mixed_precision,
                gradient_checkpointing=self.runtime.gradient_checkpointing,
                micro_batch_tokens=self.runtime.micro_batch_tokens,
                progress=tell,
            )

        timed = self._steps(run, encoded, size, spec, n)
        self.base.rest(model)
        return encoding + timed.all, timed.step.times(all_steps)

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

    def unseen(self, passes: float) -> Estimate:
        """Of so many samples' forward passes, where none was timed."""
        return guess(passes * self.base.tokens * self.base.token_seconds)

    def encoded(self, samples: Sequence[Sample], n: int) -> tuple[_Asked, Estimate]:
        """Token ids, and what they take for ``n`` samples."""
        with stopwatch() as encoding:
            encoded = list(self.base.captured.encoder.encode_all(samples))
        return _Asked(encoded), encoding.estimate.times(n / max(1, len(samples)))
