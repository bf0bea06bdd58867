"""One shard of the corpus through a scorer's dear step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p2d_core.affinity.protocol import Scorer, ScorerState, TakesOver
from p2d_core.errors import NumericalError
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

MEASURED = "measured.parquet"
SAMPLE_COLUMNS = ("source", "prompt", "response")


def measure_shard(
    scorer: Scorer,
    model: CapturedModel,
    state: ScorerState,
    shard: Sequence[Sample],
    before: pa.Table | None = None,
) -> pa.Table:
    """What the scorer measures, with ``sample_id`` and token counts; a row a sample, in order.

    ``n_response_tokens`` are the tokens that the loss is on: of a conversation those of its earlier
    answers too.

    Args:
        before: what the step before measured, of these samples and others.

    Raises:
        NumericalError: a measured value is no number.
    """
    encoded = model.encode(shard)
    columns = {
        "sample_id": pa.array([sample.sample_id for sample in shard], pa.string()),
        "n_tokens": pa.array([len(sample) for sample in encoded], pa.int32()),
        "n_response_tokens": pa.array([sample.n_learnt for sample in encoded], pa.int32()),
    }
    if shard:
        there = _there(scorer, columns["sample_id"], before)
        if there is not None and isinstance(scorer, TakesOver):
            columns |= scorer.measure_rest(model, state, shard, there)
        else:
            columns |= scorer.measure(model, state, shard)
    return _checked(pa.table(columns))


def _there(scorer: Scorer, ids: pa.Array, before: pa.Table | None) -> pa.Table | None:
    """What the scorer can take over for all samples; None if that is not so."""
    if before is None or not isinstance(scorer, TakesOver):
        return None
    rows = pc.index_in(ids, before["sample_id"].combine_chunks())
    if rows.null_count or not {*scorer.takes_over} <= {*before.column_names}:
        return None
    return before.select(list(scorer.takes_over)).take(rows)


def in_order_of(samples: Sequence[Sample], measured: Sequence[pa.Table]) -> pa.Table:
    """Measurements of samples in their order, from tables that together have all of them."""
    if len(whole := [table for table in measured if len(table)]) == 1:
        return whole[0]
    table = pa.concat_tables(whole or measured[:1]).combine_chunks()
    ids = pa.array([sample.sample_id for sample in samples], pa.string())
    return table.take(pc.index_in(ids, table["sample_id"].combine_chunks()))


def _checked(measured: pa.Table) -> pa.Table:
    """One number that is none would make the mean and covariance of the whole corpus none."""
    for name in measured.column_names:
        column = measured[name].combine_chunks()
        is_list = pa.types.is_fixed_size_list(column.type)
        width = column.type.list_size if is_list else 1
        values = column.flatten() if is_list else column
        if not pa.types.is_floating(values.type):
            continue
        bad = np.flatnonzero(~np.isfinite(values.to_numpy(zero_copy_only=False)))
        if len(bad):
            sample_id = measured["sample_id"][int(bad[0]) // width].as_py()
            raise NumericalError(
                f"{name} of sample {sample_id[:12]} has values that are no numbers. Look at that "
                "sample and at the weights of the model, or use precision: float32."
            )
    return measured


@dataclass(frozen=True)
class MeasuredCorpus:
    """Shards with their measurements, read one at a time; may be iterated again and again.

    ``parts`` are pairs of a shard's file and its measurement's file. A shard of which nothing was
    measured gives no table.
    """

    parts: Sequence[tuple[Path, Path]]
    columns: tuple[str, ...] | None = None
    """What is read; everything if None."""

    def only(self, *columns: str) -> MeasuredCorpus:
        """The same corpus, of which no other columns are read."""
        return replace(self, columns=columns)

    def __iter__(self) -> Iterator[pa.Table]:
        return (table for table in self.by_shard() if len(table))

    def by_shard(self) -> Iterator[pa.Table]:
        """One table for each shard, empty where nothing was measured of it."""
        for shard, measurement in self.parts:
            yield _joined(shard, measurement, self.columns)


@runtime_checkable
class HasOnly(Protocol):
    """Tables of which single columns can be read."""

    def only(self, *columns: str) -> Iterable[pa.Table]:
        """The same tables, of which no other columns are read."""
        ...


def only(measured: Iterable[pa.Table], *columns: str) -> Iterable[pa.Table]:
    """The tables, read without other columns where they come from files."""
    return measured.only(*columns) if isinstance(measured, HasOnly) else measured


def _joined(shard: Path, measurement: Path, columns: tuple[str, ...] | None) -> pa.Table:
    of_samples = [name for name in SAMPLE_COLUMNS if columns is None or name in columns]
    # not read_table, which first makes a dataset of the one file: a millisecond for each of them
    file = pq.ParquetFile(measurement)
    if columns is not None and not of_samples:
        return file.read(list(columns))
    there = file.schema_arrow.names
    wanted = [name for name in there if columns is None or name in (*columns, "sample_id")]
    measured = file.read(wanted)
    samples = pq.ParquetFile(shard).read(["sample_id", *of_samples])
    if len(measured) < len(samples):
        rows = pc.is_in(samples["sample_id"], measured["sample_id"].combine_chunks())
        samples = samples.filter(rows)
    for name in measured.column_names[1:]:
        samples = samples.append_column(name, measured[name])
    return samples
