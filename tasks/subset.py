"""Draws the subset that training sees."""

from __future__ import annotations

from pathlib import Path

from p2d_core.affinity.scoring import SCORES
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import select_subset
from p2d_core.store import ArtifactRef, Making
from tasks.progress import progress_of
from tasks.room import of_subset
from tasks.samples import shards_of
from tasks.stage import Runtime, stage


@stage("subset", version="2", room=of_subset)
def draw_subset(
    making: Making,
    runtime: Runtime,
    scores: ArtifactRef,
    corpus: ArtifactRef,
    selection: SelectionSpec,
) -> None:
    """The chosen samples with their scores, and the query that chose them."""
    with progress_of("subset (percent of the queries)") as progress:
        subset = select_subset(
            scores.path / SCORES,
            [Path(shard.file) for shard in shards_of(corpus)],
            scores.manifest.facts["proxy_lengths"],
            selection,
            making.folder,
            progress,
        )
    making.samples = subset.rows
    making.facts |= {
        "rows": subset.rows,
        "replayed": subset.replayed,
        "by_source": subset.by_source,
        "corpus_by_source": subset.corpus_by_source,
        "cut_off": subset.cut_off,
        "notes": subset.notes,
    }
