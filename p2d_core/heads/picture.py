"""The head map as a picture, for a file and for the terminal."""

from pathlib import Path

from rich.text import Text

from p2d_core.attention.kv_groups import kv_group_of
from p2d_core.heads.head_map import HeadMap

SHADES = "·░▒▓"
TASK_HEAD = "█"


def draw(head_map: HeadMap, path: Path, ranker: str = "score") -> None:
    """Writes a PNG: a row a layer, a column a head, task heads outlined, KV groups set apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n_layers, n_heads = head_map.n_layers, head_map.n_query_heads
    per_group = n_heads // head_map.n_kv_groups
    cell = min(0.5, max(0.16, 16 / max(n_layers, n_heads)))  # inches
    size = (max(5.5, cell * n_heads + 2.2), max(2.8, cell * n_layers + 2))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(head_map.scores.numpy(), cmap="viridis", aspect="equal")
    figure.colorbar(image, ax=axes, label=ranker, shrink=0.9, pad=0.02)
    for border in range(n_layers + 1):
        axes.axhline(border - 0.5, color="white", linewidth=0.5)
    for border in range(n_heads + 1):
        between_groups = border % per_group == 0
        axes.axvline(border - 0.5, color="white", linewidth=3.5 if between_groups else 0.5)
    for layer, head in head_map.task_heads:
        axes.add_patch(
            Rectangle(
                (head - 0.42, layer - 0.42), 0.84, 0.84, fill=False, edgecolor="red", linewidth=2
            )
        )
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, n_heads, max(1, n_heads // 16)))
    axes.set_yticks(range(0, n_layers, max(1, n_layers // 16)))
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if per_group > 1:
        above = axes.secondary_xaxis("top")
        step = max(1, head_map.n_kv_groups // 16)
        groups = range(0, head_map.n_kv_groups, step)
        above.set_xticks([(group + 0.5) * per_group - 0.5 for group in groups], map(str, groups))
        above.set_xlabel("KV group")
        above.tick_params(length=0)
        above.spines["top"].set_visible(False)
    axes.set_title(
        f"{len(head_map.task_heads)} task heads of {head_map.scores.numel()} by {ranker}\n"
        "(outlined in red)",
        fontsize=11,
    )
    figure.savefig(path, bbox_inches="tight")


def as_text(head_map: HeadMap) -> Text:
    """A row a layer, a character a head, KV groups set apart; the darker the better its rank."""
    ranks = head_map.ranks()
    n_all = head_map.scores.numel()
    task_heads = set(head_map.task_heads)
    width = len(str(head_map.n_layers - 1))
    text = Text(no_wrap=True)
    for layer in range(head_map.n_layers):
        text.append(f"layer {layer:>{width}}  ", style="dim")
        group = 0
        for head in range(head_map.n_query_heads):
            of_head = kv_group_of(head, head_map.n_query_heads, head_map.n_kv_groups)
            if of_head != group:
                text.append(" ")
                group = of_head
            if (layer, head) in task_heads:
                text.append(TASK_HEAD, style="bold red")
            else:
                better_than = (n_all - int(ranks[layer, head])) / n_all
                text.append(SHADES[int(better_than * len(SHADES))])
        text.append("\n")
    text.append(TASK_HEAD, style="bold red")
    text.append(
        f" task head ({len(task_heads)} of {n_all})   {SHADES} score rank, low to high", style="dim"
    )
    return text
