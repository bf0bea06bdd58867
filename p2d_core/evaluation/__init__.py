"""What an adapted model can do, by metrics; and by the field's own harness.

A new metric is a new file in this folder that registers a name; nothing else changes.
"""

from importlib import import_module
from pkgutil import iter_modules

from p2d_core.evaluation.metric import EvaluationSpec, Measured, Metric, metrics

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["EvaluationSpec", "Measured", "Metric", "metrics"]
