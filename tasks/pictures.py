"""The pictures that a recorded run shows: sources, quality, AER and loss curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from p2d_core.selection.picture import draw_affinities
from p2d_core.store import ArtifactRef
from tasks.summary import ARMS, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 5.6
"""Inches: no more, so that the letters can still be read where a phone makes the picture small."""


def draw_pictures(
    folder: Path,
    summary: Summary,
    refs: Mapping[str, ArtifactRef],
    curves: Mapping[str, list[dict[str, float]]],
) -> None:
    heads = refs["heads"].path / "heads.png" if "heads" in refs else None
    if heads is None and summary.heads is not None:
        heads = Path(summary.heads.picture)
    if heads is not None and heads.is_file():
        (folder / "heads.png").write_bytes(heads.read_bytes())
    if "scores" in refs and "subset" in refs:
        draw_affinities(
            refs["scores"].path / "scores.parquet",
            refs["subset"].path / "subset.parquet",
            folder / "affinities.png",
            cut_off=refs["subset"].manifest.facts.get("cut_off"),
        )
    with _picture(
        folder / "sources.png", height=1 + 0.4 * len(summary.selection.by_source)
    ) as axes:
        _draw_sources(axes, summary)
    with _picture(folder / "aer.png", height=2.8) as axes:
        _draw_aer(axes, summary)
    with _picture(folder / "quality.png", height=2.6) as axes:
        _draw_quality(axes, summary)
    if curves:
        with _picture(folder / "loss.png", height=3.2) as axes:
            for name, curve in curves.items():
                points = [point for point in curve if "loss" in point]
                axes.plot([p["step"] for p in points], [p["loss"] for p in points], label=name)
            axes.set_xlabel("step")
            axes.set_ylabel("loss of the response's tokens")
            axes.legend(frameon=False)


@contextmanager
def _picture(file: Path, height: float) -> Iterator[Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, max(1.8, min(12.0, height))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(file)


def _draw_sources(axes: Axes, summary: Summary) -> None:
    selection = summary.selection
    names = sorted(selection.corpus_by_source, key=lambda n: selection.by_source.get(n, 0))
    chosen = [selection.by_source.get(name, 0) for name in names]
    bars = axes.barh([name[:40] for name in names], chosen, color="#d1495b")
    shares = [
        f" {n:,} of {selection.corpus_by_source[name]:,}"
        for n, name in zip(chosen, names, strict=True)
    ]
    axes.bar_label(bars, shares, fontsize=9)
    axes.margins(x=0.2)
    axes.set_xlabel("chosen samples")


def _draw_aer(axes: Axes, summary: Summary) -> None:
    aer = summary.aer
    rows = {"this run": aer.stages_this_run, "cold": aer.stages}
    left = dict.fromkeys(rows, 0.0)
    for term in aer.stages:
        seconds = [stages.get(term, 0.0) for stages in rows.values()]
        axes.barh(list(rows), seconds, left=list(left.values()), label=term)
        left = {row: at + s for (row, at), s in zip(left.items(), seconds, strict=True)}
    axes.barh(["full"], [aer.full_seconds], color="#c9d3df", label=f"full ({aer.reference})")
    axes.set_xlabel("seconds")
    axes.set_title(f"AER cold {aer.cold:.3f}, this run {aer.this_run:.3f}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.3))


def _draw_quality(axes: Axes, summary: Summary) -> None:
    quality = summary.quality
    values = {arm: getattr(quality, arm) for arm in reversed(ARMS)}
    values = {arm: value for arm, value in values.items() if value is not None}
    colours = ["#d1495b" if arm == "p2d" else "#c9d3df" for arm in values]
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, [f" {value:.3f}" for value in values.values()], fontsize=9)
    axes.margins(x=0.15)
    better = "higher" if quality.higher_is_better else "lower"
    axes.set_xlabel(f"{quality.metric}, {better} is better")
