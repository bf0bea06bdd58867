"""A base model that is loaded to be timed, and what loading it takes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flows.timing import stopwatch
from p2d_core.adaptation.slices import TunedSlices
from p2d_core.attention.layout import slices_of
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, load_model
from p2d_core.planning import Estimate
from p2d_core.samples.schema import Sample
from tasks.stage import BaseModel, Runtime

PROBED, PROBE_SECONDS = 16, 0.5
"""Tokens of a first pass; if it takes less, a whole sample's are tried, too."""
WORTH_LOADING_AGAIN = 0.05
"""Of the time there is: a model that loads in less is loaded twice, the first time takes longer."""


class LoadedBase:
    """The base in one precision at a time, and seconds as a run would have them."""

    def __init__(
        self, base: BaseModel, runtime: Runtime, drawn: Sequence[Sample], seconds: float
    ) -> None:
        """Loads nothing yet.

        Args:
            drawn: samples of the corpus.
            seconds: that there are for everything.
        """
        self.base, self.drawn, self.seconds = base, drawn, seconds
        # one of its own: the process may keep the other for a run
        self.captured = replace(base.captured(runtime))
        self.token_seconds = 0.0
        """Of a forward pass, about; known once a model is loaded."""
        self._loaded: dict[str, Any] = {}
        self._load_seconds: list[float] = []
        self._loads = 0
        self._captured_is_paid = False

    def load(self) -> Estimate:
        """What the next load of the base takes: the first of the process, or a later one."""
        self.model(self.base.precision)
        self._loads += 1
        return Estimate(self._load_seconds[0 if self._loads == 1 else -1])

    def captured_load(self) -> Estimate:
        """Of the one that ranking, scoring and evaluation share: whoever comes first pays."""
        self.seen()
        if self._captured_is_paid:
            return Estimate()
        self._captured_is_paid = True
        return self.load()

    @cached_property
    def tokens(self) -> float:
        """Of a sample of the corpus, on average."""
        return sum(len(each) for each in self.captured.encode(self.drawn)) / len(self.drawn)

    def seen(self, tuned: HeadMap | None = None) -> CapturedModel:
        """The base as scorers see it; with the slices of task heads, as they are, where given."""
        self.captured.__dict__["model"] = self.model(self.base.precision)
        if tuned is None:
            return self.captured
        pieces = slices_of(self.captured.layers, tuned.task_heads)
        return self.captured.with_tuned(TunedSlices.from_model(self.captured.model, pieces))

    def model(self, precision: str) -> Any:
        """The base in that precision; loaded once, and kept until another is asked for."""
        if precision not in self._loaded:
            self.forget()
            with stopwatch() as loading:
                _ = self.captured.encoder
                self._loaded[precision] = self._fresh(precision)
            self._load_seconds.append(loading.seconds)
            if loading.seconds < WORTH_LOADING_AGAIN * self.seconds:
                with stopwatch() as again:
                    self._fresh(precision)
                self._load_seconds.append(again.seconds)
            self.captured.__dict__["model"] = self._loaded[precision]
            self._probe(self._loaded[precision])
        return self._loaded[precision]

    def rest(self, model: Any) -> None:
        """After a training: no gradients, nothing moves."""
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False).eval()

    def forget(self) -> None:
        """Gives the memory back; the next use loads anew."""
        self._loaded.clear()
        self.captured.__dict__.pop("model", None)
        gc.collect()

    def _probe(self, model: Any) -> None:
        """What a forward pass takes a token, as a quick look has it: how much may be begun with."""
        for length in (PROBED, max(PROBED, round(self.tokens))):
            ids = torch.zeros((1, length), dtype=torch.long, device=self.captured.device)
            with torch.inference_mode(), stopwatch() as passed:
                model(input_ids=ids).logits.cpu()
            self.token_seconds = passed.seconds / length
            if passed.seconds > PROBE_SECONDS:
                break

    def _fresh(self, precision: str) -> Any:
        model = load_model(Path(self.base.folder), precision, self.captured.device)
        return model.requires_grad_(False)
