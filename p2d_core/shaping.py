"""What a model does to the logits of its LM head before it returns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shaping:
    """``scale * raw``, squashed into (-cap, cap) by a tanh where there is a cap."""

    scale: float = 1.0
    """Cohere's logit_scale, one over Granite's logits_scaling."""
    cap: float | None = None
    """Gemma 2's final_logit_softcapping."""

    def shape_(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and their derivative with respect to ``raw`` where it is not `scale`.

        Args:
            raw: what the head gave; written over.
        """
        if self.scale != 1:
            raw.mul_(self.scale)
        if self.cap is None:
            return raw, None
        squashed = raw.div_(self.cap).tanh_()
        slope = squashed.square().neg_().add_(1).mul_(self.scale)
        return squashed.mul_(self.cap), slope


def shaping_of(config: Any, raw: Tensor, logits: Tensor) -> Shaping | None:
    """How ``logits`` came of ``raw``, as values show it; None where they show nothing known.

    Args:
        config: the model's, whose names say what it may be.
        raw: what the head gave for some position.
        logits: what the model returned for it, in the same or a higher precision.
    """
    if raw.shape != logits.shape:
        return None
    named = _named(config)
    # numbers or not: a training that diverges does so by the same path in all processes
    same = torch.allclose(raw.to(logits.dtype), logits, rtol=0, atol=0, equal_nan=True)
    if named == Shaping():
        return named if same else None
    if same and bool(raw.any()):
        return Shaping()  # the config has a name that this model does not look at
    shaped, _ = named.shape_(raw.to(torch.float32, copy=True))
    few = 4 * torch.finfo(raw.dtype).eps * float(logits.abs().max())
    return named if torch.allclose(shaped, logits.float(), rtol=0, atol=few) else None


def _named(config: Any) -> Shaping:
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    divisor = getattr(text, "logits_scaling", None) or 1.0
    cap = getattr(text, "final_logit_softcapping", None)
    return Shaping(scale / divisor, cap or None)
