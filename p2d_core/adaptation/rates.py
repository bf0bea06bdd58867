"""The learning rate under which samples that training does not see fare best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from p2d_core.errors import TrainingError

MOST = 8
"""Rates that are tried at most: from 1e-3 to 3, or down to 3e-7."""


def rate_at(notch: int) -> float:
    """..., 3e-4, 1e-3, 3e-3, ...: about half a power of ten apart; 0 is 1e-3."""
    return float(f"{3 if notch % 2 else 1}e{notch // 2 - 3}")


START = rate_at(0)


def rate_for(rate: float, tried: int, steps: int) -> float:
    """What a rate that was found in ``tried`` steps is for a training of ``steps``.

    Longer trainings want lower rates: as their length to the power of -0.32. Shorter ones keep it.
    Two significant digits. Source: arXiv 2409.19913, which found it in pre-training.
    """
    return float(f"{rate * min(1.0, tried / steps) ** 0.32:.2g}")


GOOD_ENOUGH = 0.95
"""Of what the best rate takes off the loss."""


def gentle_rate(losses: Mapping[float, float], untuned: float) -> float:
    """The best rate; next to one that is not good enough any more the lower one, if that is.

    At the edge of what a training bears the last few percent on few samples are bought with more
    that is forgotten, and another draw of the data can run away. Source: ours; docs/evidence.md,
    studies rates and presets.

    Args:
        losses: by rate.
        untuned: without training.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda each: losses[rates[each]])
    best = losses[rates[place]]

    def is_good_enough(rate: float) -> bool:
        return untuned - losses[rate] >= GOOD_ENOUGH * (untuned - best)

    at_the_edge = not all(map(is_good_enough, rates[place + 1 : place + 2]))
    if best < untuned and at_the_edge and place > 0 and is_good_enough(rates[place - 1]):
        return rates[place - 1]
    return rates[place]


def best_rate(loss_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Climbs from 1e-3, up if that is better, else down, until the next rate is no better.

    The optimum lies elsewhere for every size of model and way to adapt it, and losses have one
    valley over the rate: too low a rate learns too little, too high a one runs away. Source: ours.

    Args:
        loss_at: of a training with that rate, on samples it did not see; infinite if it ran away.

    Returns:
        The best rate (of equal ones the lowest), and the loss of each that was tried.

    Raises:
        TrainingError: training ran away with every rate.
    """
    losses = {START: loss_at(START)}
    best = 0
    for way in (1, -1):
        while len(losses) < MOST and (rate := rate_at(best + way)) not in losses:
            losses[rate] = loss_at(rate)
            # of trainings that ran away the slower is the better
            if (losses[rate], rate) > (losses[rate_at(best)], rate_at(best)):
                break
            best += way
    if not math.isfinite(losses[rate_at(best)]):
        raise TrainingError(
            f"training on the proxy samples runs away with every learning rate from {START:g} down "
            f"to {min(losses):g}. Look for broken samples among the target's, or set the learning "
            "rates yourself."
        )
    return rate_at(best), losses
