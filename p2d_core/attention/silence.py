"""A model without the outputs of some of its heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from p2d_core.attention.capture import before, by_layer
from p2d_core.attention.layout import AttentionLayer


@contextmanager
def silenced(
    model: nn.Module, layers: Sequence[AttentionLayer], heads: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Inside, these heads' outputs are zero before the output projection."""
    with ExitStack() as hooks:
        for index, inside in by_layer(layers, heads).items():
            hooks.callback(before(model, layers[index].o, _silencer(layers[index], inside)))
        yield


@contextmanager
def silenced_in_turn(
    model: nn.Module, layer: AttentionLayer, heads: Sequence[int]
) -> Iterator[None]:
    """Inside, a batch is as many equal parts as there are heads; in each, its head is silenced."""

    def silence(inputs: Tensor) -> Tensor:
        quiet = inputs.clone(memory_format=torch.contiguous_format)
        parts = quiet.view(len(heads), -1, layer.n_query_heads, layer.head_dim)
        for part, head in zip(parts, heads, strict=True):
            part[:, head] = 0
        return quiet

    remove = before(model, layer.o, silence)
    try:
        yield
    finally:
        remove()


def _silencer(
    layer: AttentionLayer, inside: Sequence[tuple[int, int]]
) -> Callable[[Tensor], Tensor]:
    heads = [head for _, head in inside]

    def silence(inputs: Tensor) -> Tensor:
        quiet = inputs.clone(memory_format=torch.contiguous_format)
        by_head = quiet.view(*quiet.shape[:-1], layer.n_query_heads, layer.head_dim)
        by_head[..., heads, :] = 0
        return quiet

    return silence
