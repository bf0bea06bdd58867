"""Presets: settings that belong together; what a file gives itself goes before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Preset = Literal["default", "paper", "cheap"]

PRESETS: dict[Preset, dict[str, dict[str, Any]]] = {
    # the defaults of the settings themselves: best on the demo's world, see docs/evidence.md
    "default": {},
    # arXiv 2605.21558 and what it builds on: sPAD, attention in context, the best tenth as it is
    "paper": {
        "heads": {"ranker": "spad"},
        "scoring": {"scorer": "icl-attention", "options": {"bias": "per-token"}},
        "selection": {"match_lengths": False, "replay": 0.0},
        "training": {"with_proxy": False},
    },
    # as the default, without what is found at a cost (study presets): the search for a rate, in
    # place of which stands what it finds for the heads of the demo's base; samples that gates need
    # not measure where they let pass more than are wanted; and what it is held against
    "cheap": {
        "arms": {"random": False},
        "heads": {"proxy_learning_rate": 3e-3},
        "scoring": {"enough": 1.25},
        "training": {"adaptation": "heads", "learning_rate": 3e-3},
    },
}
PLUGINS = {"ranker", "scorer", "adaptation"}
OF_A_PLUGIN = {"options", "learning_rate"}
assert set(PRESETS) == set(get_args(Preset))


def with_preset(values: Any) -> Any:
    """The settings with those of their preset where they give none; other values as they are.

    A section's ``options`` and ``learning_rate`` belong to the plugin that it names: they are taken
    over only where the file names no other plugin.
    """
    if not isinstance(values, Mapping):
        return values
    name = values.get("preset", "default")
    preset = PRESETS.get(name) if isinstance(name, str) else None  # pydantic refuses others
    if not preset:
        return values
    filled = dict(values)
    for section, meant in preset.items():
        given = filled.get(section, {})
        if not isinstance(given, Mapping):
            continue
        if any(given[kind] != meant.get(kind) for kind in PLUGINS & given.keys()):
            meant = {name: value for name, value in meant.items() if name not in OF_A_PLUGIN}
        filled[section] = {**meant, **given}
    return filled
