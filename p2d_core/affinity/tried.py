"""How many of those that pass the first gate the others are tried on: until enough pass all."""

from __future__ import annotations

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Few, so that other budgets find what was measured for one."""


def first_share(reached: int, enough: float, passing: float) -> float:
    """The smallest of `SHARES` of which enough are expected to pass, and 1 if none is.

    A gate at a quantile q of the target's own lets 1 - q of the target pass; where more of what
    reached it is something else, fewer pass, and a larger share is tried.

    Source: ours.

    Args:
        reached: samples that passed the gates before.
        enough: samples that should pass.
        passing: share of the target that passes, in [0, 1].
    """
    return next((s for s in SHARES if reached * s * passing >= enough), 1.0)


def next_share(tried: float, passed: int, enough: float) -> float:
    """The smallest larger share of which enough pass if they do as in the one that was tried.

    Source: ours.
    """
    larger = (s for s in SHARES if s > tried)
    return next((s for s in larger if passed * s / tried >= enough), 1.0)


def is_tried(sample_id: str, share: float) -> bool:
    """Whether a sample, 64 hexadecimal digits, is of a share: by chance, but always the same ones.

    Those of a share are of every larger share too.
    """
    return int(sample_id[:8], 16) < share * 16**8
