"""How the affinities of a corpus are spread, and which of them were chosen."""

from pathlib import Path

import duckdb

BINS = 60

# Infinite and missing affinities have no place on the axis; the ends hold what lies beyond.
BOUNDS = """
SELECT quantile_cont(affinity, 0.001), quantile_cont(affinity, 0.999), count(*)
FROM read_parquet($scores) WHERE isfinite(affinity)
"""

COUNTS = """
SELECT least(greatest(floor((affinity - $low) / $width), 0), $bins - 1)::INTEGER AS bin,
       count(*), count(chosen.sample_id)
FROM read_parquet($scores) AS scores
LEFT JOIN (SELECT DISTINCT sample_id FROM read_parquet($subset)) AS chosen USING (sample_id)
WHERE isfinite(affinity)
GROUP BY bin
"""


def draw_affinities(
    scores: Path, subset: Path, picture: Path, *, cut_off: float | None = None
) -> None:
    """Writes a histogram as PNG: the whole corpus, on it the chosen samples, and the cut-off.

    Args:
        scores: ``scores.parquet``; read in a stream.
        subset: ``subset.parquet``.
        picture: the file to write.
        cut_off: lowest affinity that was chosen for itself; no line if empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, width, everything, chosen = _histogram(scores, subset)
    edges = [low + i * width for i in range(BINS + 1)]
    figure = Figure(figsize=(5.6, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for counts, what, color in ((everything, "corpus", "#c9d3df"), (chosen, "chosen", "#d1495b")):
        label = f"{what} ({sum(counts):,})"
        axes.stairs(counts, edges, fill=True, color=color, label=label)
    if cut_off is not None:
        # on the side where there is room
        is_right = cut_off > low + BINS * width / 2
        axes.axvline(cut_off, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"cut-off {cut_off:.3g}",
            (cut_off, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if is_right else 4, -12),
            textcoords="offset points",
            ha="right" if is_right else "left",
            fontsize=9,
            # it may lie on bars
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    if max(everything) > 100:
        axes.set_yscale("symlog", linthresh=10)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("affinity")
    axes.set_ylabel("samples")
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def _histogram(scores: Path, subset: Path) -> tuple[float, float, list[int], list[int]]:
    """Left end, width of a bin, and how many of the corpus and of the chosen lie in each."""
    everything, chosen = [0] * BINS, [0] * BINS
    with duckdb.connect() as connection:
        low, high, rows = connection.execute(BOUNDS, {"scores": str(scores)}).fetchall()[0]
        if not rows:
            return 0.0, 1.0, everything, chosen
        width = (high - low) / BINS or 1 / BINS
        values = {
            "scores": str(scores),
            "subset": str(subset),
            "low": low,
            "width": width,
            "bins": BINS,
        }
        for place, n_all, n_chosen in connection.execute(COUNTS, values).fetchall():
            everything[place], chosen[place] = n_all, n_chosen
    return low, width, everything, chosen
