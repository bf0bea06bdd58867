"""Whom single heads attend to on a batch.

The model runs only as deep as the deepest head that is asked for; its final norm and its LM head
never run.
"""

import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from p2d_core.attention.capture import (
    Seen,
    by_layer,
    capture_head_outputs,
    device_of,
    in_order,
    run_backbone,
)
from p2d_core.attention.layout import AttentionLayer
from p2d_core.errors import UnsupportedModelError

PAID = "p2d_attention_paid"

log = logging.getLogger(__name__)


class _NeedsEager(Exception):
    """What heads attend to cannot be told from queries and keys alone; the message says why."""


def attention_paid(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    heads: Sequence[tuple[int, int]],
    input_ids: Tensor,
    attention_mask: Tensor,
    query_rows: Tensor,
    segments: Tensor,
    n_segments: int,
) -> Tensor:
    """The share of each head's attention that the query rows pay to each segment's tokens.

    The probabilities are computed from the queries and keys as they enter attention (after rotary
    embedding), for these heads and rows alone; the forward pass itself keeps SDPA. Where attention
    is more than a softmax over scaled products (soft-capping, sinks, position biases) or does not
    pass through transformers' registry, the model's own eager attention gives them, which keeps
    all heads' probabilities of a layer in memory; it is logged. Calls wait for each other;
    meanwhile other threads may use the model as usual, unless it has to be switched to eager.

    Args:
        query_rows: True for the tokens that pay; averaged over. ``[batch, tokens]``; a sample
            needs at least one.
        segments: the segment from 0 that a token belongs to, -1 for none. ``[batch, tokens]``.

    Returns:
        ``[batch, n_heads, n_segments]`` in float32, in the order of ``heads``; over the segments
        it sums to at most 1.

    Raises:
        ValueError: a sample has no query row.
        HeadMapError: there are no heads, or one is not in the model.
        UnsupportedModelError: its eager attention does not give its probabilities either, or is
            not the same attention.
    """
    membership = _one_hot(segments.to(device_of(model)), n_segments)

    def summed(probabilities: Tensor, _rows: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bhrt,br->bht", probabilities, weights) @ membership

    return _looked_at(model, layers, heads, input_ids, attention_mask, query_rows, summed)


def attention_to_copies(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    heads: Sequence[tuple[int, int]],
    input_ids: Tensor,
    attention_mask: Tensor,
    query_rows: Tensor,
) -> Tensor:
    """The share of attention that goes to tokens equal to the one that comes next, beyond chance.

    Chance is attention to all tokens alike. Heads that copy have much of it (retrieval heads, arXiv
    2404.15574). As `attention_paid` otherwise.

    Args:
        query_rows: True for the tokens that look, never a sample's last; averaged over.
            ``[batch, tokens]``; a sample needs at least one.

    Returns:
        ``[batch, n_heads]`` in float32, in [-1, 1], in the order of ``heads``.
    """
    device = device_of(model)
    ids, real = input_ids.to(device), attention_mask.to(device).bool()
    places = torch.arange(ids.shape[1], device=device)

    def summed(probabilities: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        comes_next = ids.gather(1, (rows + 1).clamp(max=ids.shape[1] - 1))
        visible = (places <= rows[..., None]) & real[:, None]
        copies = visible & (ids[:, None] == comes_next[..., None])
        chance = copies.sum(2) / visible.sum(2).clamp(min=1)
        there = torch.einsum("bhrt,brt->bhr", probabilities, copies.float())
        return ((there - chance[:, None]) * weights[:, None]).sum(2, keepdim=True)

    looked = _looked_at(model, layers, heads, input_ids, attention_mask, query_rows, summed)
    return looked.squeeze(2)


Summed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From probabilities ``[batch, heads, rows, tokens]``, the rows' positions and weights, both
``[batch, rows]``, to ``[batch, heads, n]``."""


def _looked_at(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    heads: Sequence[tuple[int, int]],
    input_ids: Tensor,
    attention_mask: Tensor,
    query_rows: Tensor,
    summed: Summed,
) -> Tensor:
    if not bool(query_rows.bool().any(1).all()):
        raise ValueError("attention: every sample needs at least one query row")
    collector = _PaidCollector(
        heads_by_module={
            id(model.get_submodule(layers[index].name)): (index, [head for _, head in inside])
            for index, inside in by_layer(layers, heads).items()
        },
        query_rows=query_rows.to(device_of(model)).bool(),
        summed=summed,
    )
    if model not in _in_eager:
        try:
            with _paid_attention(model), _collecting(collector), torch.inference_mode():
                run_backbone(model, input_ids, attention_mask)
        except _NeedsEager as reason:
            _check_eager_is_the_same(model, layers, input_ids, attention_mask)
            log.warning(
                "%s %s: what its heads attend to is read in eager mode, which is slower",
                type(model).__name__,
                reason,
            )
            _in_eager.add(model)
    if model in _in_eager:
        _pay_in_eager(model, layers, collector, input_ids, attention_mask)
    if not collector.has_all:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not give its attention probabilities, so that what heads "
            "attend to cannot be seen. Choose a scorer that looks at head outputs."
        )
    return in_order(collector.paid, layers, heads)


@dataclass
class _PaidCollector:
    """What one call looks for, and what it has seen."""

    heads_by_module: dict[int, tuple[int, list[int]]]
    query_rows: Tensor
    summed: Summed
    paid: dict[int, Tensor] = field(default_factory=dict)

    @property
    def has_all(self) -> bool:
        return len(self.paid) == len(self.heads_by_module)

    def see(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float | None,
    ) -> None:
        """Query ``[batch, heads, tokens, head_dim]``, key the same with KV groups for heads."""
        if id(module) not in self.heads_by_module:
            return
        index, heads = self.heads_by_module[id(module)]
        per_group = query.shape[1] // key.shape[1]
        q = query[:, heads].float()
        k = key[:, [head // per_group for head in heads]].float()
        rows, weights = _packed_rows(self.query_rows)
        q = _of_rows(q, rows)
        logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = _masked(logits, mask, rows)
        self._keep(index, logits.softmax(-1), rows, weights)

    def see_probabilities(self, module: nn.Module, probabilities: Tensor) -> None:
        """Of all heads, ``[batch, heads, tokens, tokens]``."""
        index, heads = self.heads_by_module[id(module)]
        rows, weights = _packed_rows(self.query_rows)
        self._keep(index, _of_rows(probabilities[:, heads].float(), rows), rows, weights)

    def _keep(self, index: int, probabilities: Tensor, rows: Tensor, weights: Tensor) -> None:
        self.paid[index] = self.summed(probabilities, rows, weights)
        if self.has_all:
            raise Seen


_current: ContextVar[_PaidCollector | None] = ContextVar("p2d_paid_collector", default=None)
_switching = threading.Lock()
_in_eager: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose attention was found to be more than `_attention_forward` can tell."""


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """SDPA, seen by the collector of the calling context where there is one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (collector := _current.get()) is not None:
        beyond = [
            name for name in ("softcap", "s_aux", "position_bias") if settings.get(name) is not None
        ]
        if beyond:
            raise _NeedsEager(f"computes attention with {', '.join(beyond)}")
        collector.see(module, query, key, attention_mask, settings.get("scaling"))
    outputs: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **settings
    )
    return outputs


@contextmanager
def _paid_attention(model: Any) -> Iterator[None]:
    """Inside, the model's attention goes through `_attention_forward`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if not model._can_set_attn_implementation():
        raise _NeedsEager("does not compute its attention through transformers' registry")
    with _switching:
        AttentionInterface.register(PAID, _attention_forward)
        # without a mask function of the same name, the mask would be lost
        AttentionMaskInterface.register(PAID, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        before = model.config._attn_implementation
        model.set_attn_implementation(PAID)
        try:
            yield
        finally:
            model.set_attn_implementation(before)


def _pay_in_eager(
    model: Any,
    layers: Sequence[AttentionLayer],
    collector: _PaidCollector,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> None:
    """Lets the collector see the probabilities that eager attention gives beside its output."""

    def hook(module: nn.Module, _inputs: Any, outputs: Any) -> None:
        if isinstance(outputs, tuple) and len(outputs) > 1 and isinstance(outputs[1], Tensor):
            collector.see_probabilities(module, outputs[1])

    with _eager(model), ExitStack() as undo, torch.inference_mode():
        for index, _ in collector.heads_by_module.values():
            attention = model.get_submodule(layers[index].name)
            undo.callback(attention.register_forward_hook(hook).remove)
        run_backbone(model, input_ids, attention_mask, output_attentions=True)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Inside, the model's attention is eager; where it has no other, it is left alone."""
    with _switching:
        before = model.config._attn_implementation
        # where the registry is not used, transformers' own switch does nothing
        model.config._attn_implementation = "eager"
        try:
            yield
        finally:
            model.config._attn_implementation = before


def _check_eager_is_the_same(
    model: Any, layers: Sequence[AttentionLayer], input_ids: Tensor, attention_mask: Tensor
) -> None:
    """That the first layer gives the same both ways, for the first sample.

    Raises:
        UnsupportedModelError: it does not, as in transformers 5.23 for Falcon with ALiBi; or its
            outputs are all 0 or no numbers, so that it cannot be told.
    """
    usual = str(model.config._attn_implementation)
    if usual == "eager":
        return
    first = [(0, head) for head in range(layers[0].n_query_heads)]
    sample = input_ids[:1], attention_mask[:1]
    outputs = capture_head_outputs(model, layers, first, *sample)
    with _eager(model):
        eager = capture_head_outputs(model, layers, first, *sample)
    real = attention_mask[0].bool().to(outputs.device)
    off = float((outputs - eager)[0, real].abs().max() / outputs[0, real].abs().max())
    if math.isnan(off):
        raise UnsupportedModelError(
            f"whether {type(model).__name__}'s eager attention is its {usual} attention cannot be "
            "told: the outputs of its first layer's heads are all 0 or no numbers. Look at the "
            "weights of the model, or use precision: float32."
        )
    if off > 0.05:
        raise UnsupportedModelError(
            f"{type(model).__name__}'s eager attention is not its {usual} attention (outputs are "
            f"{off:.0%} off), so that what heads attend to cannot be seen. "
            "Choose a scorer that looks at head outputs."
        )


@contextmanager
def _collecting(collector: _PaidCollector) -> Iterator[None]:
    token = _current.set(collector)
    try:
        yield
    finally:
        _current.reset(token)


def _packed_rows(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of each sample's chosen rows, ``[batch, most]``, and the weight of each.

    Samples with fewer than the most are filled up with rows of weight 0.
    """
    counts = chosen.sum(1, keepdim=True)
    most = int(counts.max())
    rows = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    place = torch.arange(most, device=chosen.device)
    return rows, (place < counts) / counts


def _of_rows(by_token: Tensor, rows: Tensor) -> Tensor:
    """``[batch, heads, tokens, n]`` at each sample's rows, ``[batch, heads, rows, n]``."""
    index = rows[:, None, :, None].expand(-1, by_token.shape[1], -1, by_token.shape[-1])
    return by_token.gather(2, index)


def _masked(logits: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
    """Logits ``[batch, heads, rows, tokens]`` with what a row may not see as low as can be."""
    n_tokens = logits.shape[-1]
    # not minus infinity: a row of padding sees nothing, and its weight of 0 would not undo a NaN
    lowest = torch.finfo(logits.dtype).min
    if mask is None:
        seen = torch.arange(n_tokens, device=rows.device) <= rows[..., None]
        return logits.masked_fill(~seen[:, None], lowest)
    mask = mask.expand(logits.shape[0], -1, -1, -1)
    of_rows = _of_rows(mask, rows)[..., :n_tokens]
    if of_rows.dtype == torch.bool:
        return logits.masked_fill(~of_rows, lowest)
    return logits + of_rows.float()


def _one_hot(segments: Tensor, n_segments: int) -> Tensor:
    """``[batch, tokens, n_segments]``; a row of zeros where a token belongs to none."""
    return (segments[..., None] == torch.arange(n_segments, device=segments.device)).float()
