"""The summed cross-entropy under a linear head, in which no more of the logits is kept than needed.

Of a large vocabulary the logits, their softmax and its gradient outweigh the rest of a pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from p2d_core.shaping import Shaping

LOGITS_AT_ONCE = {"cpu": 2**20}
"""By device: on a CPU as many as stay in its cache."""
MANY_LOGITS = 2**25
FEWEST_WORDS = 1024
"""Narrower products are slow."""


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shaping: Shaping,
    dtype: torch.dtype,
) -> Tensor:
    """Sum over the rows of ``-log_softmax(shaped(hidden @ weight.T + bias))[target]``.

    With a frozen head nothing is kept for the backward pass but the gradient of ``hidden``, which
    is made along with the loss. With one that moves, the gradient of the raw logits is kept.

    Args:
        hidden: ``[rows, width]``.
        weight: ``[words, width]``.
        targets: ``[rows]``, int64.
        dtype: of the matrix products, as autocast would have it.

    Returns:
        A scalar, in nats; float32 or better.
    """
    moves = weight.requires_grad or (bias is not None and bias.requires_grad)
    kind = _MovingHead if moves else _FrozenHead
    total: Tensor = kind.apply(hidden, weight, bias, targets, shaping, dtype)  # type: ignore[no-untyped-call]
    return total


class _FrozenHead(torch.autograd.Function):
    """Some words at a time, with the softmax's sum and the gradient scaled as the maximum grows.

    For one row with raw logits x, logits z(x), target t and softmax p:
    ``d loss / d hidden = sum_{j != t} p_j z'(x_j) W_j - (1 - p_t) z'(x_t) W_t``.
    The target stays out of the sums: ``1 - p_t`` would round away where it is near 0.

    Source: online softmax, arXiv 1805.02867; as FlashAttention has it, arXiv 2205.14135.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shaping: Shaping,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            losses, gradient = _over_words(
                hidden.detach().to(dtype), weight.detach(), bias, targets, shaping
            )
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None


def _over_words(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shaping: Shaping
) -> tuple[Tensor, Tensor]:
    """Losses ``[rows, 1]`` and their gradients ``[rows, width]``; float32 or better."""
    rows, words = len(hidden), len(weight)
    at_once = LOGITS_AT_ONCE.get(hidden.device.type, MANY_LOGITS)
    step = max(FEWEST_WORDS, at_once // max(1, rows))
    exact = torch.promote_types(hidden.dtype, torch.float32)
    gradient = hidden.new_zeros(hidden.shape, dtype=exact)
    others = hidden.new_zeros((rows, 1), dtype=exact)
    most = torch.full_like(others, torch.finfo(exact).min)
    right, slope_there = torch.zeros_like(others), torch.full_like(others, shaping.scale)
    for start in range(0, words, step):
        part = weight[start : start + step].to(hidden.dtype)
        of_part = None if bias is None else bias[start : start + step].to(hidden.dtype)
        logits, slope = shaping.shape_(linear(hidden, part, of_part).to(exact))
        place = targets.unsqueeze(1) - start
        is_here = (place >= 0) & (place < len(part))
        place = place.clamp(0, len(part) - 1)
        there = logits.gather(1, place)
        right = torch.where(is_here, there, right)
        logits.scatter_(1, place, torch.where(is_here, -torch.inf, there))
        before, most = most, torch.maximum(most, logits.amax(1, keepdim=True))
        shrinks = (before - most).exp_()
        weights = logits.sub_(most).exp_()
        others.mul_(shrinks).add_(weights.sum(1, keepdim=True))
        if slope is not None:
            slope_there = torch.where(is_here, slope.gather(1, place), slope_there)
            weights.mul_(slope)
        gradient.mul_(shrinks)
        if weights.dtype == part.dtype:
            gradient.addmm_(weights, part)
        else:
            gradient.add_(weights.to(part.dtype) @ part)
    every = torch.logaddexp(most + others.log(), right)
    share = (most - every).exp_()
    scale = share if shaping.cap is not None else share * shaping.scale
    gradient.mul_(scale).sub_(share * others * slope_there * weight[targets].to(exact))
    return every - right, gradient


class _MovingHead(torch.autograd.Function):
    """Logits become their softmax and its gradient in place, so that there is one of them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shaping: Shaping,
        dtype: torch.dtype,
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            raw = linear(
                hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            )
            logits, slope = shaping.shape_(raw.to(exact))
        place = targets.unsqueeze(1)
        logits.sub_(logits.amax(1, keepdim=True))
        right = logits.gather(1, place)
        share = logits.exp_()
        every = share.sum(1, keepdim=True)
        share.div_(every).scatter_add_(1, place, -torch.ones_like(every))
        if slope is not None:
            share.mul_(slope)
        elif shaping.scale != 1:
            share.mul_(shaping.scale)
        ctx.save_for_backward(hidden, weight, bias, share.to(dtype))
        return (every.log_() - right).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, share = ctx.saved_tensors
        of_hidden = of_weight = of_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_hidden = ((share @ weight.to(share.dtype)) * grad).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                scaled = (hidden * grad).to(share.dtype)
                of_weight = (share.t() @ scaled).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = (share.sum(0) * grad).to(bias.dtype)
        return of_hidden, of_weight, of_bias, None, None, None
