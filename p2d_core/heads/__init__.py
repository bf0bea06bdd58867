"""The head map, and the rankers: how much each query head has to do with a target.

A new ranker is a new file in this folder that registers a name; nothing else changes.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
