"""What activation functions give is computed again for the backward pass, and not kept for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEEP_THEIR_INPUT = ("SiluBackward0", "GeluBackward0")
"""Their own backward pass needs what they were given: what they gave costs one more pass over it.
Of others (ReLU) it needs what they gave."""


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Passes forward in the block keep less, and give the same gradients bit for bit.

    In a gated MLP the gate, its activation and the other factor are kept for the product, each of
    feed-forward width; here it is two of them. Where layers are checkpointed it changes nothing.
    """
    watch = _Watch()
    with ExitStack() as stack:
        for module in model.modules():
            if next(module.children(), next(module.parameters(), None)) is None:
                stack.callback(module.register_forward_hook(watch.saw).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.pack, _unpack))
        yield
    watch.last = None


@dataclass(frozen=True, eq=False)
class _Run:
    """Of an activation: enough to know its output when it is to be kept, and to make it again."""

    module: nn.Module
    input: Tensor
    output: Tensor
    """While it is held, no other tensor can stand in its memory."""
    version: int

    def gave(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output or has its numbers in the same order."""
        return (
            tensor.data_ptr() == self.output.data_ptr()
            and tensor.dtype == self.output.dtype
            and tensor.numel() == self.output.numel()
            and tensor._version == self.version
            and tensor.is_contiguous()
            and self.output.is_contiguous()
        )


@dataclass(frozen=True, eq=False)
class _Again:
    module: nn.Module
    input: Tensor
    shape: torch.Size


class _Watch:
    """The activation that ran last: what it gave is used before the next one runs."""

    def __init__(self) -> None:
        self.last: _Run | None = None

    def saw(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        made_by = getattr(output, "grad_fn", None)
        if made_by is not None and made_by.name() in KEEP_THEIR_INPUT:
            self.last = _Run(module, inputs[0].detach(), output.detach(), output._version)

    def pack(self, tensor: Tensor) -> Tensor | _Again:
        last = self.last
        if last is not None and last.gave(tensor):
            return _Again(last.module, last.input, tensor.shape)
        return tensor


def _unpack(kept: Tensor | _Again) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        output: Tensor = kept.module(kept.input)
    return output.view(kept.shape)
