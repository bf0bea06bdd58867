"""Layers that have run on a batch and would do the same again give what they gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from p2d_core.attention.layout import AttentionLayer


@contextmanager
def recorded(model: nn.Module, layers: Sequence[AttentionLayer]) -> Iterator[list[Any]]:
    """Inside, one pass fills the list with what each layer gave, for `replayed`."""
    outputs: list[Any] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for block in _blocks(model, layers)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed(
    model: nn.Module, layers: Sequence[AttentionLayer], outputs: Sequence[Any], copies: int = 1
) -> Iterator[None]:
    """Inside, the first layers do not run but give these outputs: as many as there are outputs.

    For passes over the same batch, or over ``copies`` of it one after another in one batch, in
    which nothing is changed before what comes after them.
    """
    with ExitStack() as stack:
        for block, output in zip(_blocks(model, layers[: len(outputs)]), outputs, strict=True):
            own = {name: value for name, value in vars(block).items() if name == "forward"}
            vars(block)["forward"] = partial(_given, output, copies)
            stack.callback(vars(block).update, own)
            stack.callback(vars(block).pop, "forward")
        yield


def _given(output: Any, copies: int, *_inputs: Any, **_named: Any) -> Any:
    return tree_map_only(Tensor, lambda each: torch.cat([each] * copies), output)


def _blocks(model: nn.Module, layers: Sequence[AttentionLayer]) -> list[nn.Module]:
    """What holds each attention: the layer, or in some families a part of it."""
    return [model.get_submodule(layer.name.rpartition(".")[0]) for layer in layers]
