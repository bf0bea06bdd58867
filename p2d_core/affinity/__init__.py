"""Scorers: one affinity for each sample of the corpus; higher means more useful for the target.

A new scorer is a new file in this folder that registers a name; nothing else changes.
"""

from importlib import import_module
from pkgutil import iter_modules

from p2d_core.affinity.protocol import (
    Chain,
    Scorer,
    ScorerState,
    Step,
    TakesOver,
    Target,
    scorers,
    steps_of,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Chain",
    "Scorer",
    "ScorerState",
    "Step",
    "TakesOver",
    "Target",
    "scorers",
    "steps_of",
]
