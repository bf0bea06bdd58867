"""Gradients of single samples' losses, a whole batch in one backward pass; and their sketches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from p2d_core.response_loss import token_losses

VALUES_AT_ONCE = 2**25
"""Gradients that are held at a time."""


def output_gradients(
    model: Any,
    paths: Sequence[str],
    batch: dict[str, Tensor],
    added: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What single samples' gradients with respect to linear projections are made of.

    The loss of a sample is the mean over its response tokens. No weight needs a gradient, and the
    backward pass ends at the first of the projections.

    Args:
        paths: of linear modules.
        batch: as `collate` makes it, on the model's device.
        added: what is added to the output of the module of that path, given its input.

    Returns:
        Path -> inputs ``[batch, tokens, inputs]`` and the gradient with respect to the outputs,
        ``[batch, tokens, outputs]``: a sample's gradient of the weight is ``gradient.T @ inputs``.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watcher(path: str) -> Callable[..., Tensor]:
        def watch(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if added is not None:
                output = output + added(path, inputs[0])
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            seen[path] = (inputs[0].detach(), output)
            return output

        return watch

    with ExitStack() as hooks, torch.enable_grad():
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(watcher(path))
            hooks.callback(hook.remove)
        losses, wanted = token_losses(model, batch)
        # samples do not see each other: the sum's gradient holds each one's own
        total = (losses.sum(dim=1) / wanted.sum(dim=1).clamp(min=1)).sum()
        grads = torch.autograd.grad(total, [seen[path][1] for path in paths])
    return {path: (seen[path][0], grad) for path, grad in zip(paths, grads, strict=True)}


def few_at_once(n_samples: int, n_values: int) -> Iterator[slice]:
    """Slices of a batch whose samples' gradients, of ``n_values`` each, fit into memory."""
    step = max(1, VALUES_AT_ONCE // max(1, n_values))
    for start in range(0, n_samples, step):
        yield slice(start, min(start + step, n_samples))


class Sketch:
    """A long vector in few dimensions, so that inner products stay what they were, nearly.

    Every coordinate is added, with a random sign, to one random place. The error of a cosine is
    about ``1 / sqrt(dimensions)``, whatever the length. Where the vector is no longer than that,
    it stays itself. Places and signs follow from the coordinate's number and the seed alone, on
    any device.

    Source: count sketch, Charikar et al. 2002; as feature hashing in arXiv 0902.2206.
    """

    def __init__(self, length: int, dimensions: int, seed: int = 0) -> None:
        self.width = min(length, dimensions)
        self.is_exact = length <= dimensions
        self.seed = seed

    def empty(self, n: int, device: torch.device) -> Tensor:
        """Zeros to add to, ``[n, width]`` in float32."""
        return torch.zeros(n, self.width, device=device)

    def add(self, into: Tensor, values: Tensor, start: int) -> None:
        """Adds the coordinates from ``start`` on, ``[n, coordinates]``."""
        if self.is_exact:
            into[:, start : start + values.shape[1]] += values
            return
        numbers = torch.arange(start, start + values.shape[1], device=values.device)
        mixed = _mixed(numbers + (self.seed << 40))
        signs = ((mixed & 1) * 2 - 1).to(values.dtype)
        into.index_add_(1, (mixed >> 1) % self.width, values * signs)


def _mixed(numbers: Tensor) -> Tensor:
    """A pseudo-random number, int64 and >= 0, for each; the finaliser of SplitMix64."""
    # as int64, whose products wrap around; the shifts are made logical by their masks
    x = numbers + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return (x ^ ((x >> 31) & (2**33 - 1))) & (2**63 - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
