"""One shard of the corpus through a scorer's dear step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p2d_core.affinity.protocol import Scorer, ScorerState
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

MEASURED = "measured.parquet"


def measure_shard(
    scorer: Scorer, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
) -> pa.Table:
    """What the scorer measures, with ``sample_id`` and token counts; a row a sample, in order."""
    encoded = model.encode(shard)
    columns = {
        "sample_id": pa.array([sample.sample_id for sample in shard], pa.string()),
        "n_tokens": pa.array([len(sample) for sample in encoded], pa.int32()),
        "n_response_tokens": pa.array([sample.n_response for sample in encoded], pa.int32()),
    }
    if shard:
        columns |= scorer.measure(model, state, shard)
    return pa.table(columns)


@dataclass(frozen=True)
class MeasuredCorpus:
    """Shards with their measurements, read one at a time; may be iterated again and again.

    ``parts`` are pairs of a shard's file and its measurement's file. A shard of which nothing was
    measured gives no table.
    """

    parts: Sequence[tuple[Path, Path]]

    def __iter__(self) -> Iterator[pa.Table]:
        return (table for table in self.by_shard() if len(table))

    def by_shard(self) -> Iterator[pa.Table]:
        """One table for each shard, empty where nothing was measured of it."""
        for shard, measurement in self.parts:
            yield _joined(shard, measurement)


def _joined(shard: Path, measurement: Path) -> pa.Table:
    measured = pq.read_table(measurement)
    samples = pq.read_table(shard, columns=["sample_id", "source", "prompt", "response"])
    if len(measured) < len(samples):
        wanted = pc.is_in(samples["sample_id"], measured["sample_id"].combine_chunks())
        samples = samples.filter(wanted)
    for name in measured.column_names[1:]:
        samples = samples.append_column(name, measured[name])
    return samples
