"""sPAD: how far a proxy run moves a head's weights, each head's taken as one distribution."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from p2d_core.attention.layout import by_role, module_weights
from p2d_core.errors import HeadMapError, SettingsError
from p2d_core.heads.ranking import RankingEvidence, rankers

Support = Literal["positions", "values"]
LOG2_E = math.log2(math.e)
FAR = 1e100
"""A sum of exponentials up to it, or down to one over it, has lost nothing in float64."""


@rankers.register("spad")
@dataclass(frozen=True, slots=True)
class Spad:
    """Wasserstein-1 distance between a head's distribution before and after the proxy run.

    The head is ``W_q W_k^T W_v`` with K and V of its KV group; the distribution is a softmax over
    all its entries. Costs the proxy run, then no pass: d_model x head_dim entries of each head.

    Args:
        temperature: softmax temperature, dimensionless, > 0.
        support: ``positions``, the mass moves along the entries' places in the flattened head, one
            step a place; or ``values``, between the two sets of probabilities.

    Source: ALPS, arXiv 2505.18799, Eqs. 5-7.
    """

    temperature: float = 1.0
    support: Support = "positions"
    version: ClassVar[str] = "2"
    needs_proxy_run: ClassVar[bool] = True
    runs_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SettingsError(f"spad: temperature is {self.temperature}; it has to be above 0.")
        if self.support not in ("positions", "values"):
            raise SettingsError(
                f"spad: support is {self.support!r}; it has to be 'positions' or 'values'."
            )

    @torch.no_grad()
    def rank(self, evidence: RankingEvidence) -> Tensor:
        """One KV group at a time, so that a few heads' matrices are all that is ever held."""
        proxy = evidence.tuned()
        scores = evidence.empty_scores()
        scratch: Tensor | None = None
        before: Tensor | None = None
        after: Tensor | None = None
        for done, layer in enumerate(evidence.layers, start=1):
            weights = module_weights(evidence.model, layer)
            base = by_role(weights, layer)
            tuned = by_role({path: proxy.patched(path, w) for path, w in weights.items()}, layer)
            per_group = layer.n_query_heads // layer.n_kv_groups
            for group in range(layer.n_kv_groups):
                of_group = slice(group * per_group, (group + 1) * per_group)
                size = layer.head_dim
                before = head_matrices(base["q"], base["k"], base["v"], group, size, before)
                after = head_matrices(tuned["q"], tuned["k"], tuned["v"], group, size, after)
                if scratch is None:
                    scratch = scratch_for(before)
                scores[layer.index, of_group] = spad(
                    before,
                    after,
                    temperature=self.temperature,
                    support=self.support,
                    scratch=scratch,
                ).cpu()
            evidence.progress(done, len(evidence.layers))
        return scores


def head_matrices(
    q: Tensor, k: Tensor, v: Tensor, group: int, head_dim: int, out: Tensor | None = None
) -> Tensor:
    """``W_q W_k^T W_v`` of the query heads that read one KV group.

    Args:
        q, k, v: projection weights as linear layers keep them, ``[heads * head_dim, d_model]``.
        out: what an earlier call returned for heads of the same shape, written over.

    Returns:
        ``[heads in the group, d_model, head_dim]`` in float32 or better.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    per_group = q.shape[0] // k.shape[0]
    of_group = slice(group * head_dim, (group + 1) * head_dim)
    # from the right: [head_dim, head_dim] first, so that nothing of [d_model, d_model] is made
    k_v = k[of_group].to(dtype) @ v[of_group].to(dtype).T
    first = group * per_group * head_dim
    rows = q[first : first + per_group * head_dim].to(dtype)
    return torch.matmul(rows.view(per_group, head_dim, -1).transpose(1, 2), k_v, out=out)


def spad(
    base: Tensor,
    proxy: Tensor,
    *,
    temperature: float = 1.0,
    support: Support = "positions",
    scratch: Tensor | None = None,
) -> Tensor:
    """Parameter-alignment distribution scores of several heads.

    Args:
        base: head matrices of the base model, ``[heads, rows, cols]``.
        proxy: the same heads after the proxy run, same shape.
        temperature: softmax temperature, dimensionless, > 0.
        scratch: as `scratch_for` makes it, written over. New memory for every call costs more than
            what is computed in it.

    Returns:
        ``[heads]`` in float64, >= 0; higher means more task-sensitive.

    Raises:
        HeadMapError: the shapes differ.
    """
    if base.shape != proxy.shape:
        raise HeadMapError(
            f"the base's heads are {list(base.shape)}, the proxy run's {list(proxy.shape)}. "
            "Train the proxy from this base."
        )
    before, after = base.flatten(1), proxy.flatten(1)
    if support == "values":
        # softmax keeps the order, so that it may as well be taken of sorted entries
        before, after = _sorted(before), _sorted(after)
    if scratch is None:
        scratch = scratch_for(base)
    moved = []
    for start in range(0, len(before), scratch.shape[1]):
        some = slice(start, start + scratch.shape[1])
        moved.append(_moved(before[some], after[some], temperature, support, scratch))
    distance = torch.cat(moved)
    return distance if support == "positions" else distance.div_(before.shape[1])


def scratch_for(heads: Tensor) -> Tensor:
    """Memory for two distributions of ``[heads, rows, cols]``: float64, ``[2, at once, entries]``.

    On a CPU of a head for each thread: they stay in its cores' caches, and no thread waits while
    another goes through a running sum.
    """
    # float64: the probabilities are near 1 / entries, and what a proxy run changes of them rounds
    # away in float32
    at_once = torch.get_num_threads() if heads.device.type == "cpu" else len(heads)
    at_once = min(at_once, len(heads))
    return heads.new_empty((2, at_once, heads[0].numel()), dtype=torch.float64)


def _moved(
    before: Tensor, after: Tensor, temperature: float, support: Support, scratch: Tensor
) -> Tensor:
    """Sum of the absolute differences of two softmaxes, or of their running sums; ``[heads]``."""
    moved, other = scratch[:, : len(before)]
    before_sum = _exponentials(before, temperature, moved)
    after_sum = _exponentials(after, temperature, other)
    moved.addcmul_(other, before_sum / after_sum, value=-1)
    if support == "positions":
        moved.cumsum_(1)
    total: Tensor = torch.abs(moved, out=other).sum(1)
    return total.div_(before_sum.squeeze(1))


def _sorted(entries: Tensor) -> Tensor:
    """Each row from its lowest."""
    if entries.device.type != "cpu":
        return entries.sort(1).values
    dtype = torch.promote_types(entries.dtype, torch.float32)  # numpy has no bfloat16
    # numpy sorts with vector instructions: on the CPU four times as fast as torch
    return torch.from_numpy(np.sort(entries.detach().to(dtype).numpy(), axis=1))


def _exponentials(entries: Tensor, temperature: float, into: Tensor) -> Tensor:
    """A softmax that is not yet divided by its sum, which is returned, ``[heads, 1]``."""
    if into.device.type == "cpu":
        # cheaper than to look for the largest entry: most sums are neither large nor small
        total = _summed(entries, temperature, into, shifted=False)
        if float(total.min()) > 1 / FAR and float(total.max()) < FAR:
            return total
    return _summed(entries, temperature, into, shifted=True)


def _summed(entries: Tensor, temperature: float, into: Tensor, *, shifted: bool) -> Tensor:
    into.copy_(entries)
    if shifted:
        into.sub_(into.amax(1, keepdim=True))
    # powers of two: exp_ goes by way of a library that is slow where the CPU is an AMD
    return into.mul_(LOG2_E / temperature).exp2_().sum(1, keepdim=True)
