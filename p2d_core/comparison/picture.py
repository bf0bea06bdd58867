"""The chart of a comparison: AER against quality (the paper's figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from p2d_core.comparison.arms import BASE, EVERYTHING, NONE, RANDOM
from p2d_core.comparison.verdict import ArmLine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "comparison.png"
MARKERS = {"heads": "o", "attention": "s", "full": "D", "lora": "^"}


Selection = tuple[str, str, float]
"""How data were chosen: scorer, ranker where the scorer looks at heads, share of the corpus."""


def draw(lines: Sequence[ArmLine], metric: str, higher_is_better: bool, path: Path) -> None:
    """A PNG of `figure_of`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = figure_of(lines, metric, higher_is_better)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def figure_of(lines: Sequence[ArmLine], metric: str, higher_is_better: bool) -> Figure:
    """A colour a selection, dashed lines join its adaptations, error bars over seeds.

    What random heads chose or trained is hollow. The base and full fine-tuning on everything are
    lines across.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8.5, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    groups: dict[tuple[str, str, float], list[ArmLine]] = {}
    for line in lines:
        if line.quality is None:
            continue
        if line.arm.of.scorer in (BASE, EVERYTHING):
            name = "base" if line.arm.of.scorer == BASE else "full fine-tuning on everything"
            style = ":" if line.arm.of.scorer == BASE else "-"
            axes.axhline(line.quality.mean, color="0.45", linestyle=style, linewidth=1.2)
            axes.annotate(
                name, (0.995, line.quality.mean), xycoords=("axes fraction", "data"),
                ha="right", va="bottom", fontsize=8, color="0.35",
            )  # fmt: skip
        elif line.aer is not None:
            key = (line.arm.scorer, line.arm.ranker, line.arm.fraction)
            groups.setdefault(key, []).append(line)
    selections = {key: _selection(each[0]) for key, each in groups.items()}
    names = _names(sorted(set(selections.values())))
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours = dict(zip(names, palette.colors * 9, strict=False))  # type: ignore[attr-defined]
    for key, alone in sorted(groups.items()):
        scorer, ranker, fraction = key
        colour = colours[selections[key]]
        # an adaptation that names no ranker belongs to the scorer's every ranker
        members = [*alone, *(groups.get((scorer, NONE, fraction), []) if ranker != NONE else [])]
        members.sort(key=lambda line: line.aer or 0)
        xs = [line.aer or 0 for line in members]
        ys = [line.quality.mean for line in members if line.quality]
        axes.plot(xs, ys, linestyle="--", linewidth=1, color=colour, alpha=0.6)
        for line, x, y in zip(members, xs, ys, strict=True):
            assert line.quality is not None
            half = line.quality.high - y if line.quality.n > 1 else 0
            filled = line.arm.of.ranker != RANDOM
            axes.errorbar(
                x, y, yerr=half, color=colour, marker=MARKERS.get(line.arm.of.adaptation, "v"),
                markersize=7, capsize=3, markerfacecolor=colour if filled else "white",
            )  # fmt: skip
    axes.set_xscale("log")
    for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_formatter(lambda value, _: f"{value:.2g}")
    axes.set_xlabel("AER, cold (selection and training over full fine-tuning on everything)")
    axes.set_ylabel(metric + ("" if higher_is_better else " (lower is better)"))
    axes.grid(alpha=0.25)
    handles = [
        Line2D([], [], color=colours[each], marker="o", linestyle="", label=name)
        for each, name in names.items()
    ]
    kinds = sorted({line.arm.of.adaptation for each in groups.values() for line in each})
    handles += [
        Line2D([], [], color="0.3", marker=MARKERS.get(kind, "v"), linestyle="", label=kind)
        for kind in kinds
    ]
    rankers = {line.arm.of.ranker for each in groups.values() for line in each}
    if RANDOM in rankers and len(rankers) > 1:
        handles.append(
            Line2D([], [], color="0.3", marker="o", markerfacecolor="white", linestyle="",
                   label="random heads")
        )  # fmt: skip
    axes.legend(handles=handles, fontsize=8, loc="best", framealpha=0.9)
    return figure


def _selection(line: ArmLine) -> Selection:
    arm = line.arm
    return arm.scorer, arm.ranker if arm.of.scores_by_heads else NONE, arm.fraction


def _names(selections: Sequence[Selection]) -> dict[Selection, str]:
    """With no more than tells them apart."""
    n_rankers = len({ranker for _, ranker, _ in selections} - {NONE})
    n_fractions = len({fraction for _, _, fraction in selections})
    names = {}
    for scorer, ranker, fraction in selections:
        told = [scorer]
        told += [f"{ranker} heads"] if n_rankers > 1 and ranker != NONE else []
        told += [f"{100 * fraction:.3g}%"] if n_fractions > 1 else []
        names[scorer, ranker, fraction] = ", ".join(told)
    return names
