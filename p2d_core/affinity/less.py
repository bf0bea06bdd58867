"""Affinity as in LESS: the step Adam would make on a sample, against the target's gradients."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from p2d_core.aer import in_turn
from p2d_core.affinity.gradients import Sketch, few_at_once, output_gradients
from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.attention.structure import sizes_of
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, ParameterCounts
from p2d_core.response_loss import batch_loss
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample, collate

STEP = "adam_step"
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@scorers.register("less")
@dataclass(frozen=True)
class Less(Scorer):
    """Mean cosine of the step that Adam would make on a sample to the proxy samples' gradients.

    Gradients are those of a LoRA of q, k, v and o in every layer, one a module where they are
    fused, randomly projected. A short warm-up makes the LoRA and Adam's second moment.

    Costs the warm-up, once a process, then a forward and a backward pass a sample; its measurement
    has 2 bytes for each of the dimensions. Another target measures everything again.

    Source: LESS, arXiv 2402.04333. Differs: one checkpoint and not one an epoch; a warm-up on the
    proxy samples and not on 5% of the corpus, so that a sample's affinity does not depend on the
    others; no first moment of Adam, which after such a warm-up points to the target and would draw
    along every sample that has a small gradient of its own; a count sketch for the projection.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    """Of the LoRA."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Of the LoRA: what it adds is scaled by alpha over rank."""
    epochs: Annotated[int, Field(ge=1)] = 4
    """Passes over the proxy samples to warm up."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Of the warm-up's Adam."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Samples in a step of the warm-up."""
    dimensions: Annotated[int, Field(ge=1)] = 8192
    """A gradient of more values than this is projected to so many."""
    seed: int = 0
    """Of the LoRA's random half, of the warm-up's order and of the projection."""

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = True

    def bytes_a_sample(self, counts: ParameterCounts, heads: HeadMap | None) -> int:
        """A vector."""
        return 2 * self.dimensions

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """The LoRA's ``a.N`` and ``b.N``, Adam's second moment ``square``, and ``proxy``.

        ``proxy`` are the proxy samples' gradients, projected, [n_proxy, dimensions].
        """
        asked = (self, model.text, tuple(target.proxy))
        with in_turn(_preparing):
            # every shard asks for the same
            known = _prepared.get(model.model)
            if known is None or known[0] != asked:
                state = self._warmed_up(model, model.encode(target.proxy))
                state["proxy"] = self._vectors(model, state, target.proxy, as_adam=False)
                known = _prepared[model.model] = (asked, state)
            return dict(known[1])

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``adam_step``: float16 list of the dimensions, of length 1."""
        steps = self._vectors(model, state, shard, as_adam=True)
        flat = pa.array(steps.to(torch.float16).reshape(-1).numpy())
        return {STEP: pa.FixedSizeListArray.from_arrays(flat, steps.shape[1])}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In [-1, 1]."""
        wanted = state["proxy"].mean(dim=0).numpy()
        for table in only(measured, STEP):
            flat = table[STEP].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors = np.asarray(flat, np.float32).reshape(len(table), -1)
            yield pa.array((vectors @ wanted).astype(np.float64))

    def _warmed_up(self, model: CapturedModel, encoded: Sequence[EncodedSample]) -> ScorerState:
        generator = torch.Generator().manual_seed(self.seed)
        lora = _Lora.fresh(model, self.rank, self.alpha, generator)
        parameters = [*lora.a.values(), *lora.b.values()]
        for parameter in parameters:
            parameter.requires_grad_()
        adam = torch.optim.Adam(
            parameters, lr=self.learning_rate, betas=(BETA1, BETA2), eps=EPSILON
        )
        with model.looking_through(tuned=False), torch.enable_grad(), lora.attached(model):
            for _ in range(self.epochs):
                order = torch.randperm(len(encoded), generator=generator).tolist()
                for start in range(0, len(order), self.batch_size):
                    chosen = [encoded[i] for i in order[start : start + self.batch_size]]
                    batch = collate(chosen, model.pad_id)
                    loss = batch_loss(
                        model.model, {k: v.to(model.device) for k, v in batch.items()}
                    )
                    adam.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    adam.step()
        state = lora.state()
        parts = [adam.state[p]["exp_avg_sq"].flatten() for path in lora.a for p in lora.of(path)]
        return state | {"square": torch.cat(parts).cpu()}

    def _vectors(
        self, model: CapturedModel, state: ScorerState, samples: Sequence[Sample], *, as_adam: bool
    ) -> Tensor:
        """Unit vectors, ``[n, dimensions]`` float32 on the CPU."""
        lora = _Lora.of_state(model, state, self.alpha / self.rank)
        square = state["square"].to(model.device)
        sketch = Sketch(len(square), self.dimensions, self.seed)

        def of(batch: dict[str, Tensor]) -> Tensor:
            rows = {name: tensor.to(model.device) for name, tensor in batch.items()}
            parts = output_gradients(model.model, list(lora.a), rows, lora.added)
            vectors = sketch.empty(len(rows["labels"]), model.device)
            start = 0
            for path in lora.a:
                inputs, grads = parts.pop(path)
                stop = start + sum(each.numel() for each in lora.of(path))
                for some in few_at_once(len(vectors), stop - start):
                    values = lora.gradient(path, inputs[some].float(), grads[some].float())
                    if as_adam:
                        values = _adam_step(values, square[start:stop])
                    sketch.add(vectors[some], values, start)
                start = stop
            return normalize(vectors, dim=1)

        vectors = torch.empty(len(samples), sketch.width)
        for positions, part in model.each_batch(model.encode(samples), of):
            vectors[positions] = part.cpu()
        return vectors


_preparing = threading.RLock()
_prepared: WeakKeyDictionary[Any, tuple[Any, ScorerState]] = WeakKeyDictionary()
"""What was prepared last for a model, and what was asked for."""


def _adam_step(gradient: Tensor, square: Tensor) -> Tensor:
    return gradient / (BETA2 * square + (1 - BETA2) * gradient.square() + EPSILON).sqrt()


@dataclass(eq=False)
class _Lora:
    """Low-rank updates of linear modules by path: ``scale * inputs @ a.T @ b.T`` is added."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scale: float

    @classmethod
    def fresh(
        cls, model: CapturedModel, rank: int, alpha: float, generator: torch.Generator
    ) -> _Lora:
        a, b = {}, {}
        for path in _paths(model):
            outputs, inputs = sizes_of(model.model.get_submodule(path))
            bound = inputs**-0.5
            drawn = torch.rand(rank, inputs, generator=generator) * 2 * bound - bound
            a[path] = drawn.to(model.device)
            b[path] = torch.zeros(outputs, rank, device=model.device)
        return cls(a, b, alpha / rank)

    @classmethod
    def of_state(cls, model: CapturedModel, state: ScorerState, scale: float) -> _Lora:
        paths = _paths(model)
        a, b = (
            {path: state[f"{name}.{i}"].to(model.device) for i, path in enumerate(paths)}
            for name in "ab"
        )
        return cls(a, b, scale)

    def state(self) -> ScorerState:
        return {
            f"{name}.{i}": tensor.detach().cpu()
            for name, part in (("a", self.a), ("b", self.b))
            for i, tensor in enumerate(part.values())
        }

    def of(self, path: str) -> tuple[Tensor, Tensor]:
        return self.a[path], self.b[path]

    def added(self, path: str, inputs: Tensor) -> Tensor:
        a, b = (each.to(inputs.dtype) for each in self.of(path))
        return self.scale * (inputs @ a.T) @ b.T

    def gradient(self, path: str, inputs: Tensor, grads: Tensor) -> Tensor:
        """Of a and b of each sample, ``[n, values]``."""
        a, b = self.of(path)
        of_a = self.scale * (grads @ b).transpose(1, 2) @ inputs
        of_b = self.scale * grads.transpose(1, 2) @ (inputs @ a.T)
        return torch.cat([of_a.flatten(1), of_b.flatten(1)], dim=1)

    @contextmanager
    def attached(self, model: CapturedModel) -> Iterator[None]:
        with ExitStack() as hooks:
            for path in self.a:

                def add(
                    _module: Any, inputs: tuple[Tensor, ...], output: Tensor, path: str = path
                ) -> Tensor:
                    return output + self.added(path, inputs[0])

                hook = model.model.get_submodule(path).register_forward_hook(add)
                hooks.callback(hook.remove)
            yield


def _paths(model: CapturedModel) -> list[str]:
    return [path for layer in model.layers for path in layer.modules]
