"""The report as markdown: MLflow's note of a run, whose first lines show without a click."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from tasks.report.further import further
from tasks.report.page import LONGEST_NAME, Chosen, Page, one_line
from tasks.summary import Summary
from tasks.verdict import TERM_NAMES, times, verdict

LONGEST_NOTE = 8000
"""Characters that MLflow takes for a tag of a run."""
TEXT_LENGTHS = (90, 60, 40, 20)
"""Characters of a sample: the most that lets the note fit."""
GAP = "\u2002\u200b"
"""MLflow sets cells without a gap, and markdown trims spaces: not those before a zero-width one."""
SHORT = 12
"""Characters of a key; enough to find it by."""


def as_note(page: Page, links: Iterable[tuple[str, str]] = (), picture: str = "") -> str:
    """The report in at most 8,000 characters.

    Args:
        links: (words, address) that stand in the first lines.
        picture: address of a picture, with ``{name}`` for its file's name; no pictures if empty.
    """
    for length in TEXT_LENGTHS:
        note = _note(page, links, picture, length)
        if len(note) <= LONGEST_NOTE:
            return note
    return note[: LONGEST_NOTE - 1].rsplit("\n", 1)[0] + "\n"


def escaped(text: str) -> str:
    """Text that markdown and HTML leave as it is, in a line."""
    safe = html.escape(one_line(text, 10_000), quote=False)
    safe = re.sub(r"[\\`*_{}\[\]#~|]", lambda found: "\\" + found[0], safe)
    # no links of their own
    return safe.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def code(text: str) -> str:
    """Text in a line as code."""
    return "`" + one_line(text, 10_000).replace("`", "'") + "`"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], gap: str = GAP) -> list[str]:
    """A table of cells that are markdown; a column whose name begins with > is right-aligned."""
    return [
        "",
        "| " + f"{gap} | ".join(name.removeprefix(">") for name in columns) + " |",
        "|" + "|".join("---:" if name.startswith(">") else "---" for name in columns) + "|",
        *("| " + f"{gap} | ".join(row) + " |" for row in rows),
        "",
    ]


def further_tables(summary: Summary, gap: str = GAP) -> list[str]:
    """Further metrics and lm-eval's tasks, where a run has them."""
    lines: list[str] = []
    for one in further(summary):
        columns = [one.title, *(f">{escaped(name)}" for name in one.columns)]
        rows = ([escaped(one_line(cell, LONGEST_NAME)) for cell in row] for row in one.rows)
        lines += table(columns, rows, gap)
    return lines


def _note(page: Page, links: Iterable[tuple[str, str]], picture: str, length: int) -> str:
    summary = page.summary
    quality, aer, selection = summary.quality, summary.aer, summary.selection

    def shown(name: str, what: str) -> list[str]:
        address = picture.format(name=name)
        return ["", f"![{what}]({address})", ""] if picture and name in page.pictures else []

    lines = _headline(page, links)
    better = "higher" if quality.higher_is_better else "lower"
    columns = ["", "trained", f">{escaped(page.metric)} ({better} is better)", ">retention"]
    lines += table(columns, ([escaped(cell) for cell in arm[1:]] for arm in page.arms))
    lines += [f"- {escaped(sentence)}" for sentence, _ in verdict(summary)]
    lines += further_tables(summary)
    lines += ["", "**Head map**: " + escaped(page.heads_text)]
    if page.head_map:
        lines += ["", "```", *page.head_map.splitlines(), "```"]
    lines += shown("heads", "head map")
    lines += ["", "**Samples chosen**: " + escaped(page.data_text + selection.boundary_text)]
    lines += shown("affinities", "affinities of the corpus, with the cut-off")
    lines += table(
        ["source", ">chosen", ">in the corpus", ">share"],
        ([escaped(cell) for cell in row] for row in page.sources),
    )
    lines += [f"- {escaped(note)}" for note in page.notes]
    lines += ["", f"**AER** {escaped(page.aer_text)}; full fine-tuning {aer.full_seconds:.1f} s "]
    lines[-1] += f"({aer.reference})."
    terms = [
        (TERM_NAMES.get(term, term), f"{cold:.1f}", f"{aer.stages_this_run.get(term, 0.0):.1f}")
        for term, cold in aer.stages.items()
    ]
    lines += table(["seconds", ">cold", ">this run"], terms)
    lines += shown("aer", "AER by stage") + shown("loss", "loss curves")
    lines += _samples("Highest affinity among the chosen", page.highest, length)
    lines += _samples("Lowest affinity among the chosen", page.lowest, length)
    lines += ["**Lineage**: `p2d artifacts show KEY` tells more"]
    lines += table(
        ["artifact", "key", "made", ""],
        (
            (escaped(made.name), code(made.key[:SHORT]), made.made_at, "reused" * made.reused)
            for made in page.lineage
        ),
    )
    if summary.command:
        lines += ["**Again**", "", "```", summary.command, "```"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _headline(page: Page, links: Iterable[tuple[str, str]]) -> list[str]:
    """What MLflow shows before `Show more`."""
    summary, aer, moving = page.summary, page.summary.aer, page.summary.trainable
    quality, heads = summary.quality, summary.heads
    of_heads = f"{heads.selected} of {heads.total} heads · " if heads is not None else ""
    return [
        f"**{escaped(page.metric)} {quality.base:.3f} → {quality.p2d:.3f}** "
        f"({page.gain_text}) · **AER {aer.cold:.3f}** ({times(aer.speedup)}) · "
        f"{of_heads}{page.share} of the data · "
        f"{moving.parameters:,} parameters ({moving.share_of_model:.1%})",
        "",
        " · ".join(
            [
                *(f"[{words}]({address})" for words, address in links),
                f"{escaped(page.title)} by {escaped(page.user)}, {escaped(page.when)}",
                f"reused: {escaped(page.reused_text)}",
                *([escaped(page.registered_text)] if page.registered_text else []),
            ]
        ),
        "",
    ]


def _samples(title: str, chosen: Sequence[Chosen], length: int) -> list[str]:
    if not chosen:
        return []
    rows = (
        (
            f"{one.affinity:.4g}",
            escaped(one_line(one.source, 24)) + ("" if one.by_affinity else " (replay)"),
            escaped(one_line(one.text, length)),
        )
        for one in chosen
    )
    return ["", f"**{title}**", *table([">affinity", "source", "sample"], rows)]
