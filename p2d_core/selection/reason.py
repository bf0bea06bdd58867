"""Why a sample came into the subset, or did not: the selection done again, and looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import duckdb

from p2d_core.selection.script import Script
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import MEMORY, candidates_of, choose

Why = Literal[
    "drawn", "relaxed", "replay", "filled", "at random",
    "not met", "stopped", "not tried", "below", "not drawn", "not at random",
]  # fmt: skip

POOLS = """
SELECT pool.part, count(*), count(chosen.sample_id), min(pool.affinity)
FROM pool
LEFT JOIN (FROM chosen WHERE chosen_by = 'affinity') AS chosen USING (sample_id)
GROUP BY pool.part
"""

ASKED = """
SELECT scores.sample_id, scores.source, scores.affinity, scores.gates_passed, pool.part,
       {measured} AS measured
FROM read_parquet($scores) AS scores
SEMI JOIN (SELECT unnest($ids) AS sample_id) USING (sample_id)
LEFT JOIN pool USING (sample_id)
"""


MEETING = """
SELECT candidates.sample_id FROM {candidates} AS candidates
SEMI JOIN (SELECT unnest($ids) AS sample_id) USING (sample_id)
"""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one sample was chosen, or was not."""

    chosen: bool
    why: Why
    stopped_at: str | None
    """The step whose gate it did not pass, or was not tried at; None where it passed all, or there
    are none."""
    words: str
    """A sentence."""


@dataclass(frozen=True, slots=True)
class _Pool:
    """What samples that compete with each other are drawn from."""

    size: int = 0
    places: int = 0
    lowest: float = 0.0


def reasons(
    scores: Path,
    proxy_lengths: Sequence[int],
    spec: SelectionSpec,
    gates: Sequence[str],
    chosen_by: Mapping[str, str],
    ids: Sequence[str],
) -> dict[str, Reason]:
    """Of each sample of the corpus that is asked for.

    Args:
        scores: with ``proxy_lengths`` and ``spec`` as `select_subset` had them.
        gates: names of the steps that have one, in order.
        chosen_by: the subset's column of that name, by sample.
        ids: of the samples that are asked for.
    """
    asked = {"scores": str(scores), "ids": list(ids)}
    with (
        TemporaryDirectory(prefix="p2d-explain-") as spill,
        duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": spill}) as connection,
    ):
        choose(Script(connection), scores, proxy_lengths, spec)
        pools = {
            part: _Pool(size, places, lowest)
            for part, size, places, lowest in connection.execute(POOLS).fetchall()
        }
        # the number of a gate is null of those that it was not tried on
        reached = [f'WHEN {i} THEN scores."{gate}" IS NOT NULL' for i, gate in enumerate(gates)]
        measured = (
            f"CASE scores.gates_passed {' '.join(reached)} ELSE true END" if gates else "true"
        )
        rows = connection.execute(ASKED.format(measured=measured), asked).fetchall()
        # the condition that may be in it was checked just now; what is asked for is bound
        met = connection.execute(
            MEETING.format(candidates=candidates_of(scores, spec)), asked
        ).fetchall()
    candidates = {sample_id for (sample_id,) in met}
    quotas = [] if spec.at_random else [source for source, _ in spec.quotas]
    found = {}
    for sample_id, source, affinity, gates_passed, in_pool, measured in rows:
        part = quotas.index(source) if source in quotas else len(quotas)
        place = _Place(
            affinity=affinity,
            stopped_at=gates[gates_passed] if gates_passed < len(gates) else None,
            is_candidate=sample_id in candidates,
            is_tried=measured,
            in_pool=in_pool is not None,
            pool=pools.get(part, _Pool()),
            rivals=(f" of {source}" if source in quotas else "")
            + (" that meet selection.where" if spec.where is not None else ""),
        )
        how = chosen_by.get(sample_id)
        if how is None:
            why, words = _not_chosen(place, spec, gates)
        else:
            why, words = _chosen(place, spec, gates, how)
        found[sample_id] = Reason(how is not None, why, place.stopped_at, words)
    return found


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the selection has a sample."""

    affinity: float
    stopped_at: str | None
    is_candidate: bool
    is_tried: bool
    """At the gate that it reached."""
    in_pool: bool
    pool: _Pool
    rivals: str


def _chosen(place: _Place, spec: SelectionSpec, gates: Sequence[str], how: str) -> tuple[Why, str]:
    pool = place.pool
    if how == "replay":
        return "replay", (
            "Replay: drawn at random from the sources that gave less to the subset than their "
            "share of the corpus. Its affinity had no say."
        )
    if spec.at_random:
        return "at random", "The subset was drawn at random; no affinity had a say."
    if how == "filled" or not place.in_pool:
        return "filled", "Taken by affinity in place of replay: other sources had too few samples."
    if place.stopped_at is not None:
        return "relaxed", (
            f"It did not pass {place.stopped_at}, but fewer samples{place.rivals} passed every "
            f"gate than the {pool.places:,} wanted: it is among the nearest to it."
        )
    if pool.size > pool.places:
        return "drawn", f"Drawn: {_pool_of(place, spec, gates)}."
    return "drawn", f"One of the {pool.size:,} best samples{place.rivals}: all of them were taken."


def _not_chosen(place: _Place, spec: SelectionSpec, gates: Sequence[str]) -> tuple[Why, str]:
    pool = place.pool
    if spec.at_random:
        return "not at random", "The subset was drawn at random, and this one was not."
    if not place.is_candidate:
        return "not met", f"It does not meet selection.where: {spec.where}."
    if not pool.places:
        return "below", "The quotas of other sources left no place for it."
    if place.in_pool:
        return "not drawn", f"Not drawn: {_pool_of(place, spec, gates)}."
    if not place.is_tried:
        return "not tried", (
            f"Not tried at {place.stopped_at}: of a random share of those that reached it enough "
            "passed (scoring.enough)."
        )
    if place.stopped_at is not None:
        number = gates.index(place.stopped_at) + 1
        return "stopped", f"Stopped at {place.stopped_at}, gate {number} of {len(gates)}."
    return "below", (
        f"Its affinity {place.affinity:.6g} is below {pool.lowest:.6g}, the lowest of the "
        f"{pool.size:,} best samples{place.rivals}."
    )


def _pool_of(place: _Place, spec: SelectionSpec, gates: Sequence[str]) -> str:
    pool = place.pool
    those = f"{pool.size:,} samples{place.rivals} passed every gate"
    if not gates:
        those = f"the {pool.size:,} best samples{place.rivals} are the pool"
    spread = ", with response lengths as the proxy samples have them" if spec.match_lengths else ""
    return f"{those}, for {pool.places:,} places; from there on it is chance{spread}"
