"""What the report of a run shows, gathered once from the summary and the artifacts."""

from __future__ import annotations

import getpass
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
from rich.text import Text

from p2d_core.aer import machine_name
from p2d_core.errors import ArtifactError, P2DError
from p2d_core.heads.head_map import read_head_map
from p2d_core.heads.picture import as_text
from p2d_core.selection.subset import SUBSET
from p2d_core.store import ArtifactRef
from p2d_core.store.store import strings_in
from tasks.pictures import draw_pictures
from tasks.summary import ARMS, Summary
from tasks.verdict import ARM_NAMES, gain, percent, times, trained_on

log = logging.getLogger(__name__)

N_SHOWN = 20
"""Chosen samples that are shown from each end."""
LONGEST_TEXT = 300
"""Characters of a shown sample."""
LONGEST_NAME = 60
LONGEST_FACT = 200
"""Characters of a line."""
MOST_SOURCES = 12
MOST_NOTES = 8
MOST_ARTIFACTS = 30

EXTREMES = """
SELECT sample_id, source, affinity, chosen_by, left(prompt, $length), left(response, $length)
FROM read_parquet($subset) WHERE isfinite(affinity)
"""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen sample, in a line."""

    affinity: float
    source: str
    by_affinity: bool
    """False: drawn at random (replay)."""
    text: str


@dataclass(frozen=True, slots=True)
class Made:
    """An artifact of the run."""

    name: str
    key: str
    made_at: str
    reused: bool
    made_from: str
    """Stages and the beginnings of their keys."""


@dataclass(frozen=True, slots=True)
class Page:
    """All that the report shows beside the summary."""

    summary: Summary
    user: str
    when: str
    machine: str
    head_map: str
    """As characters, a line a layer; empty if it is gone."""
    pictures: Mapping[str, bytes]
    """PNG files by name."""
    highest: Sequence[Chosen]
    lowest: Sequence[Chosen]
    lineage: Sequence[Made]
    curves: Mapping[str, list[dict[str, float]]]
    """Loss curves by artifact: what `loss.json` holds."""

    @property
    def title(self) -> str:
        """Base and target."""
        base, target = (
            one_line(name, LONGEST_NAME) for name in (self.summary.base, self.summary.target)
        )
        return f"{base} adapted to {target}"

    @property
    def heads_text(self) -> str:
        """Such as 4 of 32 (12.5%) by frobenius."""
        heads = self.summary.heads
        if heads is None:
            moved_by = self.summary.trainable.adaptation
            return f"none: neither {self.summary.selection.scorer} nor {moved_by} looks at any"
        share = percent(heads.selected, heads.total)
        return f"{heads.selected} of {heads.total} ({share}) by {heads.ranker}"

    @property
    def share(self) -> str:
        """Of the corpus, that was chosen."""
        return percent(self.summary.selection.selected, self.summary.selection.corpus)

    @property
    def data_text(self) -> str:
        """Such as 300 of 3,000 (10.0%) by head-filter."""
        chosen = self.summary.selection
        return f"{chosen.selected:,} of {chosen.corpus:,} ({self.share}) by {chosen.scorer}"

    @property
    def metric(self) -> str:
        """Its name in words."""
        return self.summary.quality.metric.replace("_", " ")

    @property
    def quality_text(self) -> str:
        """Before, after, and by how much that is better."""
        quality = self.summary.quality
        return f"{self.metric} {quality.base:.3f} → {quality.p2d:.3f} ({self.gain_text})"

    @property
    def gain_text(self) -> str:
        """Over the base, whatever direction is better."""
        better = gain(self.summary.quality, "base")
        if not better:
            return "no change"
        return f"better by {better:.3f}" if better > 0 else f"worse by {-better:.3f}"

    @property
    def aer_text(self) -> str:
        """Cold with its speedup, and of this run."""
        aer = self.summary.aer
        return f"{aer.cold:.3f} cold ({times(aer.speedup)}), {aer.this_run:.3f} this run"

    @property
    def reused_text(self) -> str:
        """Names of the stages."""
        reused = self.summary.reused
        everything = reused and all(line.reused for line in self.summary.stages)
        return "everything" if everything else ", ".join(reused) or "nothing"

    @property
    def registered_text(self) -> str:
        """The model version, and what of the champion; empty where none was registered."""
        version = self.summary.registered
        if version is None:
            return ""
        alias = "champion" if version.champion else "not champion"
        return f"{version.name}, version {version.version}, {alias}: {version.why}"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What a reader asks first."""
        summary, moving = self.summary, self.summary.trainable
        facts = [
            ("target", summary.target),
            ("base model", summary.base),
            *([("from the hub", ", ".join(summary.hub))] if summary.hub else []),
            ("task heads", self.heads_text),
            ("data", self.data_text + summary.selection.boundary_text),
            ("quality", self.quality_text),
            ("AER", self.aer_text),
            (
                "trainable",
                f"{moving.parameters:,} parameters, {moving.share_of_model:.1%} of the model",
            ),
            *([("learning rate", moving.rate_text)] if moving.learning_rate else []),
            ("reused", self.reused_text),
            ("run", f"{summary.run_id}, by {self.user}, {self.when}, on {self.machine}"),
        ]
        if summary.planned_text:
            facts.append(("planned", summary.planned_text))
        if self.registered_text:
            facts.append(("model version", self.registered_text))
        return [(name, one_line(value, LONGEST_FACT)) for name, value in facts]

    @property
    def arms(self) -> list[tuple[str, str, str, str, str]]:
        """Arm, its name, what was trained, quality, retention."""
        quality = self.summary.quality
        return [
            (
                arm,
                ARM_NAMES[arm],
                trained_on(arm, self.share, self.summary.trainable.adaptation),
                f"{value:.3f}",
                f"{quality.retention[arm]:.3f}" if arm in quality.retention else "",
            )
            for arm in ARMS
            if (value := getattr(quality, arm)) is not None
        ]

    @property
    def sources(self) -> list[tuple[str, str, str, str]]:
        """Source, chosen, in the corpus, share of the source; the largest, the rest in a row."""
        selection = self.summary.selection
        ordered = sorted(
            selection.corpus_by_source.items(),
            key=lambda one: (-selection.by_source.get(one[0], 0), -one[1], one[0]),
        )
        counted = [(name, selection.by_source.get(name, 0), n) for name, n in ordered]
        if len(counted) > MOST_SOURCES:
            rest = counted[MOST_SOURCES - 1 :]
            counted = counted[: MOST_SOURCES - 1]
            name = f"{len(rest)} others"
            counted.append((name, sum(one[1] for one in rest), sum(one[2] for one in rest)))
        return [
            (one_line(name, LONGEST_NAME), f"{n:,}", f"{of:,}", percent(n, of))
            for name, n, of in counted
        ]

    @property
    def notes(self) -> list[str]:
        """What a person should know."""
        summary, heads = self.summary, self.summary.heads
        notes = [summary.aer.caveat] if summary.aer.caveat else []
        notes += [f"{one.rows:,} rows of {one.source} left out" for one in summary.rejected]
        notes += heads.texts if heads is not None else []
        notes += summary.selection.notes
        if len(notes) > MOST_NOTES:
            notes = [*notes[: MOST_NOTES - 1], f"{len(notes) - MOST_NOTES + 1} more in the summary"]
        return [one_line(note, LONGEST_FACT) for note in notes]


def gather(summary: Summary, refs: Mapping[str, ArtifactRef], folder: Path) -> Page:
    """Reads small files and draws the pictures into ``folder``.

    Args:
        refs: artifacts by the name that the run gives them (``model``, ``model_random``).
    """
    curves = {name: curve for name, ref in refs.items() if (curve := loss_curve(ref))}
    draw_pictures(folder, summary, refs, curves)
    highest, lowest = _extremes(refs["subset"].path / SUBSET) if "subset" in refs else ([], [])
    text = head_map_text(refs["heads"].path) if "heads" in refs else None
    return Page(
        summary=summary,
        user=user(),
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        machine=machine_name(),
        head_map=text.plain if text is not None else "",
        pictures={file.stem: file.read_bytes() for file in sorted(folder.glob("*.png"))},
        highest=highest,
        lowest=lowest,
        lineage=_lineage(summary, refs),
        curves=curves,
    )


def user() -> str:
    """Who runs this; empty where the system does not say."""
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return ""


def head_map_text(heads: Path) -> Text | None:
    """A head map as characters; None, with a line in the log, if it is gone."""
    try:
        return as_text(read_head_map(heads / "heads.parquet"))
    except (P2DError, OSError) as error:
        log.warning("the head map cannot be shown: %s", error)
        return None


def loss_curve(ref: ArtifactRef) -> list[dict[str, float]]:
    """The points that training wrote; none where it wrote none."""
    try:
        curve = json.loads((ref.path / "loss.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [point for point in curve if "step" in point]


def one_line(text: str, longest: int) -> str:
    """Without line ends and control characters, and cut."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"


def _extremes(subset: Path) -> tuple[list[Chosen], list[Chosen]]:
    """The chosen samples with the highest affinity, and those with the lowest, best first."""
    values = {"subset": str(subset), "length": LONGEST_TEXT}
    with duckdb.connect() as connection:
        (n,) = connection.execute(
            f"SELECT count(*) FROM ({EXTREMES})",  # noqa: S608
            values,
        ).fetchall()[0]
        low = min(N_SHOWN, max(0, n - N_SHOWN))
        ends = [
            connection.execute(f"{EXTREMES} ORDER BY {order} LIMIT {rows:d}", values).fetchall()
            for order, rows in (("affinity DESC, sample_id", N_SHOWN), ("affinity, sample_id", low))
        ]
    highest, lowest = (
        [
            Chosen(affinity, source, by != "replay", one_line(f"{a} → {b}", LONGEST_TEXT))
            for _, source, affinity, by, a, b in rows
        ]
        for rows in ends
    )
    return highest, lowest[::-1]


def _lineage(summary: Summary, refs: Mapping[str, ArtifactRef]) -> list[Made]:
    names: dict[str, str] = {}
    for name, ref in refs.items():
        names.setdefault(ref.key, name)
    lines = []
    for key, name in list(names.items())[:MOST_ARTIFACTS]:
        try:
            manifest = refs[name].manifest
        except ArtifactError:
            lines.append(Made(name, key, "manifest gone", True, ""))
            continue
        parts: dict[str, list[str]] = {}
        for role, value in manifest.inputs.items():
            keys = [each for each in strings_in(value) if len(each) == len(key)]
            parts[role] = [each[:8] for each in keys]
        made_from = [
            f"{role} {keys[0]}" if len(keys) == 1 else f"{len(keys)} {role}"
            for role, keys in parts.items()
            if keys
        ]
        reused = manifest.run_id != summary.run_id
        when = manifest.made_at[:16].replace("T", " ")
        lines.append(Made(name, key, when, reused, ", ".join(made_from)))
    return lines
