"""Affinity by gradient: would a step on a sample move the task heads as the target wants it?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from p2d_core.adaptation.slices import merged
from p2d_core.affinity.gradients import Sketch, few_at_once, output_gradients
from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.attention.layout import ROLES, Roles, slices_of
from p2d_core.attention.structure import is_transposed
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, ParameterCounts
from p2d_core.samples.schema import Sample

GRADIENT = "gradient"


@scorers.register("head-gradient")
@dataclass(frozen=True)
class HeadGradient(Scorer):
    """Cosine of the gradient over the task heads' slices to the proxy samples' mean gradient.

    The gradient is that of the response's mean loss under the base, over the q rows, o columns and
    the KV groups' k and v rows of the task heads; each proxy sample's has length 1 in their mean.

    Costs a forward and about a backward pass a sample, the latter down to the lowest task head;
    its measurement has 2 bytes for each of the dimensions.

    Source: LESS, arXiv 2402.04333, restricted to the task heads, with plain gradients of the base
    in place of Adam's of LoRA checkpoints.
    """

    dimensions: Annotated[int, Field(ge=1)] = 8192
    """A gradient of more values than this is projected to so many."""
    slices: Roles = ROLES
    """Of which of a head's slices: q and o are its own, k and v those of its KV group."""
    seed: int = 0
    """Of the projection."""

    version: ClassVar[str] = "2"
    measures_target: ClassVar[bool] = False
    needs_heads: ClassVar[bool] = True

    def bytes_a_sample(self, counts: ParameterCounts, heads: HeadMap | None) -> int:
        """A vector."""
        return 2 * self.dimensions

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """``heads`` [n_heads, 2] and, with a target, ``proxy`` [n_proxy, dimensions]."""
        assert heads is not None
        state = {"heads": torch.tensor(heads.task_heads, dtype=torch.int64)}
        if target.proxy:
            state["proxy"] = self._gradients(model, state, target.proxy)
        return state

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``gradient``: float16 list of the dimensions, of length 1."""
        gradients = self._gradients(model, state, shard)
        flat = pa.array(gradients.to(torch.float16).reshape(-1).numpy())
        return {GRADIENT: pa.FixedSizeListArray.from_arrays(flat, gradients.shape[1])}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In [-1, 1]."""
        wanted = normalize(state["proxy"].double().mean(dim=0), dim=0).numpy()
        for table in only(measured, GRADIENT):
            yield pa.array((_vectors(table) @ wanted.astype(np.float32)).astype(np.float64))

    def similarities(self, state: ScorerState, table: pa.Table) -> Tensor:
        """Cosine to each proxy sample's gradient, ``[n, n_proxy]``."""
        return torch.from_numpy(_vectors(table)).double() @ state["proxy"].double().T

    def _gradients(
        self, model: CapturedModel, state: ScorerState, samples: Sequence[Sample]
    ) -> Tensor:
        heads = [(int(layer), int(head)) for layer, head in state["heads"]]
        blocks = merged(slices_of(model.layers, heads, self.slices))
        modules = {path: model.model.get_submodule(path) for path in blocks}
        shapes = {path: list(module.weight.shape) for path, module in modules.items()}
        sizes = {path: len(index) * shapes[path][1 - dim] for path, (dim, index) in blocks.items()}
        sketch = Sketch(sum(sizes.values()), self.dimensions, self.seed)

        def of(batch: dict[str, Tensor]) -> Tensor:
            rows = {name: tensor.to(model.device) for name, tensor in batch.items()}
            parts = output_gradients(model.model, list(blocks), rows)
            vectors = sketch.empty(len(rows["labels"]), model.device)
            start = 0
            for path, (dim, index) in blocks.items():
                inputs, grads = parts.pop(path)
                where = index.to(model.device)
                if dim == (1 if is_transposed(modules[path]) else 0):
                    grads = grads.index_select(-1, where)
                else:
                    inputs = inputs.index_select(-1, where)
                for some in few_at_once(len(vectors), sizes[path]):
                    weight = grads[some].float().transpose(1, 2) @ inputs[some].float()
                    sketch.add(vectors[some], weight.flatten(1), start)
                start += sizes[path]
            return normalize(vectors, dim=1)

        gradients = torch.empty(len(samples), sketch.width)
        for positions, part in model.each_batch(model.encode(samples), of):
            gradients[positions] = part.cpu()
        return gradients


def _vectors(table: pa.Table) -> np.ndarray[Any, Any]:
    flat = table[GRADIENT].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.array(flat, np.float32).reshape(len(table), -1)
