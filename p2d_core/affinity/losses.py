"""Affinity by the loss of the response, before and after the task heads are tuned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample


@scorers.register("head-proxy-loss")
@dataclass(frozen=True)
class HeadProxyLoss(Scorer):
    """Minus the response's loss under the base with task heads tuned on the proxy set.

    A response that does not follow from its prompt as in the target has a high loss.
    Costs one forward pass a sample.

    Source: ours.
    """

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    needs_head_proxy: ClassVar[bool] = True

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """``held_out`` [n]: losses of the held-out target samples, with a target."""
        return {"held_out": _tuned_losses(model, target.held_out)} if target.held_out else {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``tuned_loss``: nats a response token, float32."""
        return {"tuned_loss": _tuned_losses(model, shard).numpy()}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Minus nats a response token."""
        for table in only(measured, "tuned_loss"):
            yield pc.negate(table["tuned_loss"].combine_chunks().cast(pa.float64()))

    def own_affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Tensor:
        """Of the held-out target samples."""
        return -state["held_out"].double()


@scorers.register("loss-shift")
@dataclass(frozen=True)
class LossShift(Scorer):
    """What tuning the task heads on the proxy set took off the response's loss.

    Costs two forward passes a sample, and one where the step before has measured the tuned loss.

    Source: ours; near to the excess loss of RHO-1 (arXiv 2404.07965) with heads alone tuned.
    """

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    needs_head_proxy: ClassVar[bool] = True
    takes_over: ClassVar[tuple[str, ...]] = ("tuned_loss",)

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """``held_out`` [n]: shifts of the held-out target samples, with a target."""
        return {"held_out": _shifts(model, target.held_out)} if target.held_out else {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``base_loss`` and ``tuned_loss``: nats a response token, float32."""
        tuned = pa.table({"tuned_loss": _tuned_losses(model, shard).numpy()})
        return self.measure_rest(model, state, shard, tuned)

    def measure_rest(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample], there: pa.Table
    ) -> dict[str, Any]:
        """The same with the tuned losses of head-proxy-loss."""
        base = model.response_losses(model.encode(shard)).numpy()
        return {"base_loss": base, "tuned_loss": there["tuned_loss"]}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Nats a response token; above 0 where the tuned heads know better."""
        for table in only(measured, "base_loss", "tuned_loss"):
            difference = np.asarray(table["base_loss"], dtype=np.float64) - np.asarray(
                table["tuned_loss"], dtype=np.float64
            )
            yield pa.array(difference)

    def own_affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Tensor:
        """Of the held-out target samples, which no tuning saw."""
        return state["held_out"].double()


def _shifts(model: CapturedModel, samples: Sequence[Sample]) -> Tensor:
    base = model.response_losses(model.encode(samples)).to(torch.float32)
    return base - _tuned_losses(model, samples)


def _tuned_losses(model: CapturedModel, samples: Sequence[Sample]) -> Tensor:
    encoded = model.encode(samples)
    with model.looking_through(tuned=True):
        return model.response_losses(encoded).to(torch.float32)
