"""What activation functions and norms give is computed again for the backward pass, not kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

REMEMBERED = 3
"""Outputs that are known by their memory: a norm's is last used after those of queries' and keys'
own norms are made."""


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Passes forward in the block keep less, and give the same gradients bit for bit.

    A module that has no matrix product in it, and whose own backward pass keeps what it was given
    (SiLU, GELU, norms; not ReLU, which keeps what it gave), runs again where its output would be
    kept too: one more pass over the numbers. In a gated MLP the gate, its activation and the other
    factor are kept for the product, each of feed-forward width; here it is two of them. The input
    of projections that are tuned is what a norm gave. Where layers are checkpointed it changes
    nothing.
    """
    watch = _Watch()
    with ExitStack() as stack:
        for module in model.modules():
            if _has_no_products(module):
                for hook in (
                    module.register_forward_pre_hook(watch.begins, with_kwargs=True),
                    module.register_forward_hook(watch.ends),
                ):
                    stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.pack, watch.unpack))
        yield
    watch.runs.clear()


def _has_no_products(module: nn.Module) -> bool:
    return (
        next(module.children(), None) is None
        and all(parameter.dim() <= 1 for parameter in module.parameters())
        and not isinstance(module, nn.RReLU)  # is random, and keeps what it was given
    )


@dataclass(frozen=True, eq=False)
class _Pass:
    """Of a module: what gives its output again."""

    module: nn.Module
    input: Tensor
    autocast: torch.dtype | None

    def again(self) -> Tensor:
        device = self.input.device.type
        enabled = self.autocast is not None
        with torch.no_grad(), torch.autocast(device, self.autocast, enabled=enabled):
            output: Tensor = self.module(self.input)
        return output


@dataclass(frozen=True, eq=False)
class _Output:
    """Of a pass, to be known when it is to be kept."""

    made_by: _Pass
    tensor: Tensor
    """While it is held, no other tensor can stand in its memory."""
    version: int

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output or has its numbers in the same order."""
        return (
            _same_memory(tensor, self.tensor)
            and tensor._version == self.version
            and tensor.is_contiguous()
            and self.tensor.is_contiguous()
        )


@dataclass(frozen=True, eq=False)
class _Again:
    made_by: _Pass
    shape: torch.Size


class _Watch:
    """What is running, what ran last, and what was made again last."""

    def __init__(self) -> None:
        self.running: _Pass | None = None
        self.keeps_its_input = False
        self.runs: deque[_Output] = deque(maxlen=REMEMBERED)
        self.made: tuple[_Pass, Tensor] | None = None

    def begins(self, module: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
        self.running, self.keeps_its_input = None, False
        if len(inputs) == 1 and not others and isinstance(inputs[0], Tensor):
            device = inputs[0].device.type
            enabled = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if enabled else None
            self.running = _Pass(module, inputs[0].detach(), dtype)

    def ends(self, module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        made_by, self.running = self.running, None
        if made_by is not None and self.keeps_its_input and isinstance(output, Tensor):
            self.runs.append(_Output(made_by, output.detach(), output._version))

    def pack(self, tensor: Tensor) -> Tensor | _Again:
        if self.running is not None and _same_memory(tensor, self.running.input):
            self.keeps_its_input = True
        for output in self.runs:
            if output.has(tensor):
                return _Again(output.made_by, tensor.shape)
        return tensor

    def unpack(self, kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        # several need the same in turn, such as the projections to queries, keys and values
        if self.made is None or self.made[0] is not kept.made_by:
            self.made = kept.made_by, kept.made_by.again()
        return self.made[1].view(kept.shape)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.numel() == other.numel()
    )
