"""From measurements to scores: affinities, gates, and what the target's own samples have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from p2d_core.affinity.measuring import MeasuredCorpus
from p2d_core.affinity.protocol import Fitted, Gauged, InParts, ScorerState, Step
from p2d_core.errors import NumericalError
from p2d_core.parquet import parquet_options

SCORES = "scores.parquet"
STATE = "state.safetensors"
KEPT = ("sample_id", "source", "n_tokens", "n_response_tokens")
"""Of a measurement, in the scores."""


@dataclass(frozen=True)
class Gate:
    """A threshold that the target's own samples set."""

    name: str
    threshold: float
    spread: float
    """Standard deviation of the target's own affinities; 1 if they have none."""
    own: list[float]
    """The target's own affinities, sorted."""

    def margin(self, affinity: np.ndarray) -> np.ndarray:
        """Spreads above the threshold; what is not below 0 passes."""
        margins: np.ndarray = (affinity - self.threshold) / self.spread
        return margins


@dataclass
class ScoredCorpus:
    """What a step's scores amount to."""

    rows: int = 0
    tried: int = 0
    """Samples that the step measured."""
    passed: int = 0
    """Samples that passed all gates so far."""
    gate: Gate | None = None
    passing_by_shard: list[str] = field(default_factory=list)
    """For each shard, SHA-256 over the ids of the samples that passed all gates so far."""
    state: ScorerState = field(default_factory=dict)
    """What the affinities were computed with, fitted: with it no measurement but a sample's own
    is needed to look at its affinity again."""


def gate_of(step: Step, state: ScorerState, measured: MeasuredCorpus) -> Gate | None:
    """The gate of a step, None if it has none."""
    if step.gate is None:
        return None
    if not isinstance(step.scorer, Gauged):
        raise TypeError(f"step {step.name!r} has a gate, but its scorer cannot gauge the target")
    own = step.scorer.own_affinity(state, measured).double()
    own = own[torch.isfinite(own)]
    if not len(own):
        raise NumericalError(
            f"the target's own {step.name} affinities are not numbers: no gate is set."
        )
    spread = float(own.std(correction=0))
    return Gate(
        name=step.name,
        threshold=float(torch.quantile(own, step.gate)),
        spread=spread if spread > 0 else 1.0,
        own=sorted(own.tolist()),
    )


def score_corpus(
    step: Step,
    state: ScorerState,
    measured: MeasuredCorpus,
    file: Path,
    *,
    previous: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScoredCorpus:
    """Writes ``scores.parquet``, a row group a shard, in the corpus' order.

    The columns are the score schema (``affinity`` is the smallest margin over the gates so far,
    or the scorer's own number where no step has a gate), ``gates_passed`` int32, and one double
    for each step so far, null where a step did not measure; and one for each part of an affinity
    that is made of parts.

    Args:
        previous: the scores of the step before, of which this one measured what passed.

    Raises:
        NumericalError: what the target gave, or an affinity, is no number.
    """
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"step {step.name!r}: what the target's own samples gave ({name}) has values that "
                "are no numbers. Look at the weights of the model, or use precision: float32."
            )
    if isinstance(step.scorer, Fitted):
        state = step.scorer.fit(state, measured)
    gate = gate_of(step, state, measured)
    outcome = ScoredCorpus(gate=gate, state=state)
    affinities = _affinities(step, state, measured)
    before = pq.ParquetFile(previous) if previous is not None else None
    writer: pq.ParquetWriter | None = None
    try:
        for index, table in enumerate(measured.only(*KEPT).by_shard()):
            if len(table):
                parts = {n: _checked(v, step, table) for n, v in next(affinities).items()}
            else:
                parts = {name: np.empty(0) for name in ("affinity", *_part_names(step))}
            affinity = parts.pop("affinity")
            if before is None:
                scored = _first(step, gate, table, affinity, parts)
            else:
                scored = _next(step, gate, table, affinity, parts, before.read_row_group(index))
            passed = scored.filter(pc.equal(scored["gates_passed"], _gates(scored)))
            ids = "\n".join(passed["sample_id"].to_pylist())
            outcome.passing_by_shard.append(hashlib.sha256(ids.encode()).hexdigest())
            outcome.rows += len(scored)
            outcome.tried += len(table)
            outcome.passed += len(passed)
            writer = writer or pq.ParquetWriter(
                file, scored.schema, **parquet_options(scored.schema)
            )
            writer.write_table(scored, row_group_size=max(1, len(scored)))
            if progress is not None:
                progress(index + 1, len(measured.parts))
    finally:
        if writer is not None:
            writer.close()
    return outcome


def passing_ids(scores: Path, shard_index: int) -> set[str]:
    """Ids of the samples of one shard that passed all gates of these scores."""
    table = pq.ParquetFile(scores).read_row_group(shard_index)
    passed = table.filter(pc.equal(table["gates_passed"], _gates(table)))
    return set(passed["sample_id"].to_pylist())


def _checked(affinity: pa.Array, step: Step, table: pa.Table) -> np.ndarray:
    values = np.asarray(affinity, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        sample_id = table["sample_id"][int(bad[0])].as_py()
        raise NumericalError(
            f"step {step.name!r} gave {len(bad)} affinities that are not numbers, the first for "
            f"sample {sample_id[:12]}. Look at that sample, or use precision: float32."
        )
    return values


def _part_names(step: Step) -> tuple[str, ...]:
    return step.scorer.part_names if isinstance(step.scorer, InParts) else ()


def _affinities(
    step: Step, state: ScorerState, measured: MeasuredCorpus
) -> Iterator[dict[str, pa.Array]]:
    """Of each table ``affinity``, and the parts that it is made of."""
    if isinstance(step.scorer, InParts):
        yield from step.scorer.affinity_parts(state, measured)
    else:
        for affinity in step.scorer.affinity(state, measured):
            yield {"affinity": affinity}


def _first(
    step: Step,
    gate: Gate | None,
    table: pa.Table,
    affinity: np.ndarray,
    parts: dict[str, np.ndarray],
) -> pa.Table:
    margin = affinity if gate is None else gate.margin(affinity)
    passed = np.zeros(len(table), np.int32) if gate is None else (margin >= 0).astype(np.int32)
    columns = {
        "sample_id": table["sample_id"],
        "source": table["source"],
        "affinity": pa.array(margin),
        "n_tokens": table["n_tokens"],
        "n_response_tokens": table["n_response_tokens"],
        "gates_passed": pa.array(passed),
    }
    if gate is not None:
        columns[step.name] = pa.array(affinity)
    columns |= {name: pa.array(values) for name, values in parts.items()}
    return _tagged(pa.table(columns), gates=int(gate is not None))


def _next(
    step: Step,
    gate: Gate | None,
    table: pa.Table,
    affinity: np.ndarray,
    parts: dict[str, np.ndarray],
    before: pa.Table,
) -> pa.Table:
    place = {sample_id: i for i, sample_id in enumerate(before["sample_id"].to_pylist())}
    rows = np.array([place[i] for i in table["sample_id"].to_pylist()], dtype=np.int64)
    margins = before["affinity"].to_numpy().copy()
    passed = before["gates_passed"].to_numpy().copy()
    if gate is None:
        margins[rows] = affinity
    else:
        margins[rows] = np.minimum(margins[rows], gate.margin(affinity))
        passed[rows] += gate.margin(affinity) >= 0
    scored = before.set_column(
        before.column_names.index("affinity"), "affinity", pa.array(margins)
    ).set_column(before.column_names.index("gates_passed"), "gates_passed", pa.array(passed))
    for name, part in {step.name: affinity, **parts}.items():
        values = np.full(len(before), np.nan)
        values[rows] = part
        scored = scored.append_column(name, pa.array(values, mask=np.isnan(values)))
    return _tagged(scored, gates=_gates(before) + int(gate is not None))


def _tagged(table: pa.Table, *, gates: int) -> pa.Table:
    return table.combine_chunks().replace_schema_metadata({"gates": str(gates)})


def _gates(table: pa.Table) -> int:
    return int((table.schema.metadata or {}).get(b"gates", b"0"))
