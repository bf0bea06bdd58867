"""The example that ships with P2D: a synthetic world whose right answer is known."""

from __future__ import annotations

from pathlib import Path

import yaml

from flows.adapt import run_adapt
from flows.settings import RunSettings, parse_settings
from p2d_core.synthetic.world import BASE_FOLDER, write_world
from tasks.summary import Summary

SETTINGS = Path(__file__).parent / "demo.yaml"


def run_demo(store: Path, seed: int = 0) -> Summary:
    """Writes the world's files into the store and adapts the base that ships with P2D to it.

    ``seed`` is that of the world, of every draw and of training; the base stays the same.
    """
    return run_adapt(demo_settings(store / "demo" / f"seed-{seed}", seed), store=store)


def demo_settings(folder: Path, seed: int) -> RunSettings:
    """Writes the world's files into a folder; the settings of a run on them."""
    write_world(folder, seed)
    values = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    return parse_settings(values | {"base": str(BASE_FOLDER), "seed": seed}, folder / SETTINGS.name)
