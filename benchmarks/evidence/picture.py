"""The charts of the studies: whom scorers choose, and what training gives for its price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from p2d_core.comparison.arms import NONE
from p2d_core.comparison.statistics import Interval

MARKERS = {"frobenius": "o", "ablation": "s", "spad": "^", "random heads": "x", NONE: "D"}


def draw_precision(worlds: Mapping[str, Mapping[tuple[str, str], Interval]], path: Path) -> None:
    """A PNG: a row a scorer, the best of the first world on top; bars are 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    first = next(iter(worlds.values()))
    best: dict[str, float] = {}
    for (scorer, _), interval in first.items():
        best[scorer] = max(best.get(scorer, 0.0), interval.mean)
    scorers = sorted(best, key=lambda scorer: best[scorer])
    rankers = sorted({ranker for rows in worlds.values() for _, ranker in rows})
    arms = sorted({arm for rows in worlds.values() for arm in rows})
    beside = {each: [ranker for scorer, ranker in arms if scorer == each] for each in scorers}
    most = max(map(len, beside.values()))
    columns = math.ceil(math.sqrt(len(worlds)))
    n_rows = math.ceil(len(worlds) / columns)
    figure = Figure(
        figsize=(
            3.6 * columns + 2,
            (max(0.36, 0.13 * most) * len(scorers) + 0.7) * n_rows + 0.5,
        ),
        dpi=130, layout="constrained",
    )  # fmt: skip
    FigureCanvasAgg(figure)
    panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (world, rows) in zip(panels, worlds.items(), strict=False):
        for (scorer, ranker), interval in rows.items():
            own = beside[scorer]
            place = scorers.index(scorer) + min(0.16, 0.8 / most) * (
                own.index(ranker) - (len(own) - 1) / 2
            )
            half = interval.high - interval.mean if interval.n > 1 else 0
            panel.errorbar(
                interval.mean, place, xerr=half, marker=MARKERS.get(ranker, "v"), markersize=4.5,
                color=f"C{rankers.index(ranker) % 10}", capsize=2, linestyle="",
            )  # fmt: skip
        panel.set_title(world, fontsize=9)
        panel.set_xlim(-0.03, 1.03)
        panel.set_yticks(range(len(scorers)), scorers, fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(alpha=0.25)
    for panel in panels[len(worlds) :]:
        panel.set_axis_off()
    figure.supxlabel("precision", fontsize=9)
    handles = [
        Line2D([], [], color=f"C{number % 10}", marker=MARKERS.get(ranker, "v"), linestyle="",
               label="looks at no heads" if ranker == NONE else ranker)
        for number, ranker in enumerate(rankers)
    ]  # fmt: skip
    ncols = min(len(handles), 3 * columns)
    figure.legend(handles=handles, fontsize=8, loc="outside upper center", ncols=ncols)
    figure.savefig(path)


@dataclass(frozen=True)
class Point:
    """A variant of training, over seeds."""

    quality: Interval
    retention: Interval
    aer: float


def draw_trained(points: Mapping[str, Point], path: Path) -> None:
    """A PNG: quality on the target and retention, each against the AER; bars are 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, what in zip(figure.subplots(1, 2, sharex=True), ("quality", "retention"),
                           strict=True):  # fmt: skip
        for number, (variant, point) in enumerate(points.items()):
            interval: Interval = getattr(point, what)
            half = interval.high - interval.mean if interval.n > 1 else 0
            panel.errorbar(
                point.aer, interval.mean, yerr=half, capsize=2, markersize=6,
                marker="osD^vP*"[number // 10], color=f"C{number % 10}",
                label=variant if what == "quality" else None,
            )  # fmt: skip
        panel.set_xscale("log")
        for formatter in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
            formatter(lambda value, _: f"{value:.3g}")
        panel.set_ylabel("exact match, " + ("target" if what == "quality" else "old skills"))
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.25)
    figure.supxlabel("AER, cold", fontsize=9)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path)
