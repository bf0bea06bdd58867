"""About how much a stage may write: its disk has to have that free before the stage starts.

Each function takes the inputs of its stage and gives bytes; what it does not look at it leaves.
The numbers are upper ends of the usual, not exact: what is refused would most likely have failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2d_core.models import parameter_counts
from p2d_core.samples.source import files_of
from p2d_core.store import ArtifactRef

if TYPE_CHECKING:
    from p2d_core.selection.spec import SelectionSpec
    from tasks.stage import BaseModel, Plugin, SourceInput

SMALL = 10**6
"""Manifest, curves, pictures: what every stage may need."""
A_ROW = 200
"""Of ids, counts and scores; an id is 64 characters that do not compress well."""
NUMBER = 4
CHECKPOINTS = 3
"""That lie there at once: two are kept while the next is written."""
COPIES = 3
"""Of what is trained in a checkpoint: itself and AdamW's two moments."""


def of_source(source: SourceInput, **_: Any) -> int:
    """As much as the files have, and an id for each of the smallest rows; of a hub none knows."""
    if source.spec.is_on_hub:
        return SMALL
    return SMALL + 2 * sum(file.path.stat().st_size for file in files_of(source.spec))


def of_target(target: ArtifactRef, **_: Any) -> int:
    """The target once more."""
    return SMALL + 2 * target.manifest.total_bytes


def of_corpus(sources: Sequence[ArtifactRef], target: ArtifactRef, **_: Any) -> int:
    """All sources once more, cut anew."""
    return SMALL + 2 * sum(ref.manifest.total_bytes for ref in [*sources, target])


def of_attention(base: BaseModel, **_: Any) -> int:
    """Training of all attention projections."""
    return _of_training(parameter_counts(Path(base.folder)).attention)


def of_heads(base: BaseModel, heads: ArtifactRef, **_: Any) -> int:
    """Training of the task heads; of a KV group all of it."""
    task_heads = heads.manifest.facts["task_heads"]
    return _of_training(parameter_counts(Path(base.folder)).of_heads(task_heads))


def of_model(
    base: BaseModel, adaptation: Plugin, task_heads: Sequence[tuple[int, int]], **_: Any
) -> int:
    """Training of what the adaptation moves; one that is not known here as all attention."""
    counts = parameter_counts(Path(base.folder))
    moved = {"full": counts.total, "heads": counts.of_heads(task_heads)}
    return _of_training(moved.get(adaptation.name, counts.attention))


def of_measurements(rows: int, bytes_a_sample: int) -> int:
    """Ids and counts, and so much a sample beside them."""
    return SMALL + rows * (A_ROW + bytes_a_sample)


def of_scores(corpus: ArtifactRef, **_: Any) -> int:
    """A row a sample."""
    return SMALL + A_ROW * rows_of(corpus)


def of_subset(corpus: ArtifactRef, selection: SelectionSpec, **_: Any) -> int:
    """The chosen samples with their scores, and as much again that DuckDB may spill."""
    chosen = selection.fraction * corpus.manifest.total_bytes
    return round(SMALL + 2 * (chosen + selection.fraction * rows_of(corpus) * A_ROW))


def rows_of(corpus: ArtifactRef) -> int:
    """Samples of the corpus."""
    return sum(shard["rows"] for shard in corpus.manifest.facts["shards"])


def _of_training(parameters: int) -> int:
    """Checkpoints, and what is kept."""
    return SMALL + parameters * NUMBER * (CHECKPOINTS * COPIES + 1)
