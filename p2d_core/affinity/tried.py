"""How many of those that reach the last gate it is tried on: until enough have passed."""

from __future__ import annotations

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Few, so that other budgets find what was measured for one."""


def first_share(reached: int, enough: float, gate: float) -> float:
    """The smallest of `SHARES` of which enough are expected to pass, and 1 if none is.

    A gate at the quantile ``gate`` of the target's own lets ``1 - gate`` of the target pass; where
    more of what reached it is something else, fewer pass, and the rest is tried too.

    Source: ours.

    Args:
        reached: samples that passed the gates before.
        enough: samples that should pass.
        gate: in [0, 1].
    """
    return next((s for s in SHARES if reached * s * (1 - gate) >= enough), 1.0)


def is_tried(sample_id: str, share: float) -> bool:
    """Whether a sample, 64 hexadecimal digits, is of a share: by chance, but always the same ones.

    Those of a share are of every larger share too.
    """
    return int(sample_id[:8], 16) < share * 16**8
