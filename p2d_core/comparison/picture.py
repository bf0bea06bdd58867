"""The chart of a comparison: AER against quality (the paper's figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from p2d_core.comparison.arms import BASE, EVERYTHING, NONE, RANDOM
from p2d_core.comparison.verdict import ArmLine

PICTURE = "comparison.png"
MARKERS = {"heads": "o", "attention": "s", "full": "D", "lora": "^"}


def draw(lines: Sequence[ArmLine], metric: str, higher_is_better: bool, path: Path) -> None:
    """A PNG: a colour a selection, dashed lines join its adaptations, error bars over seeds.

    The base and full fine-tuning on everything are lines across.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8.5, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    groups: dict[tuple[str, str, float], list[ArmLine]] = {}
    for line in lines:
        if line.quality is None:
            continue
        if line.arm.scorer in (BASE, EVERYTHING):
            name = "base" if line.arm.scorer == BASE else "full fine-tuning on everything"
            style = ":" if line.arm.scorer == BASE else "-"
            axes.axhline(line.quality.mean, color="0.45", linestyle=style, linewidth=1.2)
            axes.annotate(
                name, (0.995, line.quality.mean), xycoords=("axes fraction", "data"),
                ha="right", va="bottom", fontsize=8, color="0.35",
            )  # fmt: skip
        elif line.aer is not None:
            key = (line.arm.scorer, line.arm.ranker, line.arm.fraction)
            groups.setdefault(key, []).append(line)
    scorers = sorted({key[0] for key in groups})
    colours = dict(zip(scorers, matplotlib.colormaps["tab10"].colors * 3, strict=False))  # type: ignore[attr-defined]
    rankers = sorted({key[1] for key in groups})
    for (scorer, ranker, fraction), alone in sorted(groups.items()):
        members = list(alone)
        # an adaptation that names no ranker belongs to the scorer's every ranker
        members += [] if ranker == NONE else groups.get((scorer, NONE, fraction), [])
        members.sort(key=lambda line: line.aer or 0)
        xs = [line.aer or 0 for line in members]
        ys = [line.quality.mean for line in members if line.quality]
        axes.plot(xs, ys, linestyle="--", linewidth=1, color=colours[scorer], alpha=0.6)
        for line, x, y in zip(members, xs, ys, strict=True):
            assert line.quality is not None
            half = line.quality.high - y if line.quality.n > 1 else 0
            filled = line.arm.of.ranker != RANDOM
            marker = MARKERS.get(line.arm.of.adaptation, "v")
            axes.errorbar(
                x, y, yerr=half, color=colours[scorer], marker=marker, markersize=7,
                capsize=3, markerfacecolor=colours[scorer] if filled else "white",
            )  # fmt: skip
    axes.set_xscale("log")
    for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_formatter(lambda value, _: f"{value:.2g}")
    axes.set_xlabel("AER, cold (selection and training over full fine-tuning on everything)")
    axes.set_ylabel(metric + ("" if higher_is_better else " (lower is better)"))
    axes.grid(alpha=0.25)
    handles = [Line2D([], [], color=colours[s], marker="o", linestyle="", label=s) for s in scorers]
    adaptations = sorted({line.arm.adaptation for each in groups.values() for line in each})
    handles += [
        Line2D([], [], color="0.3", marker=MARKERS.get(a, "v"), linestyle="", label=a)
        for a in adaptations
    ]
    if "random" in rankers and len(rankers) > 1:
        handles.append(
            Line2D([], [], color="0.3", marker="o", markerfacecolor="white", linestyle="",
                   label="random heads")
        )  # fmt: skip
    axes.legend(handles=handles, fontsize=8, loc="best", framealpha=0.9)
    figure.savefig(path)
