"""Chooses the subset: a pool of the best, a draw from it, and a share of replay."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from p2d_core.errors import InputError
from p2d_core.progress import Progress, no_progress
from p2d_core.selection.pool import fill_pool, parts_of
from p2d_core.selection.script import Script
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.where import COLUMNS, checked_condition

SUBSET = "subset.parquet"
LENGTH_BINS = 5
MEMORY = "1GB"
"""Beyond which DuckDB spills to disk."""
SPILL = ".spill"


@dataclass
class Subset:
    """What was chosen, and how it came about."""

    rows: int
    replayed: int
    by_source: dict[str, int]
    corpus_by_source: dict[str, int]
    cut_off: float
    """Lowest affinity among the chosen, replay apart."""
    notes: list[str] = field(default_factory=list)
    query: str = ""


CORPUS = "read_parquet($scores)"
"""All candidates, for a FROM."""

COUNTS = """
SELECT source, gates_passed, count(*) FROM {candidates} GROUP BY source, gates_passed
"""

ALL = """
CREATE TEMP TABLE chosen AS SELECT sample_id, source, affinity, 'affinity' AS chosen_by FROM pool
"""

# A sample's place in its bin over the bin's quota: taking the smallest ones fills every bin in
# step with the quotas, and what a bin lacks is made up by the others.
DRAW = """
CREATE TEMP TABLE chosen AS
SELECT sample_id, source, affinity, 'affinity' AS chosen_by FROM (
    SELECT *, row_number() OVER (PARTITION BY part ORDER BY place, draw) AS turn FROM (
        SELECT binned.*, row_number() OVER (PARTITION BY part, bin ORDER BY draw)
                   / (SELECT quota FROM bins WHERE bins.bin = binned.bin) AS place
        FROM (
            SELECT pool.*, md5($seed || ':' || sample_id) AS draw,
                   (SELECT min(bin) FROM bins WHERE n_response_tokens <= upper) AS bin
            FROM pool
        ) AS binned
    )
)
WHERE turn <= $wanted[part + 1]
"""

# Other sources: those that gave less to the chosen than their share of the corpus.
REPLAY = """
INSERT INTO chosen
SELECT sample_id, source, affinity, 'replay' FROM {candidates}
WHERE list_contains($sources, source) AND sample_id NOT IN (SELECT sample_id FROM pool)
ORDER BY md5($seed || ':' || sample_id)
LIMIT $wanted
"""

FILL = """
INSERT INTO chosen
SELECT sample_id, source, affinity, 'filled' FROM {candidates}
WHERE sample_id NOT IN (SELECT sample_id FROM chosen)
ORDER BY gates_passed DESC, affinity DESC, sample_id
LIMIT $missing
"""

CUT_OFF = "SELECT min(affinity) FROM chosen WHERE chosen_by <> 'replay'"

RELAXED = """
SELECT count(*) FROM read_parquet($scores) AS scores
SEMI JOIN (FROM chosen WHERE chosen_by = 'filled') AS filled USING (sample_id)
WHERE gates_passed < $gates
"""

RESULT = """
COPY (
    SELECT corpus.*, scores.* EXCLUDE (sample_id, source), chosen.chosen_by
    FROM read_parquet($corpus) AS corpus
    JOIN (SELECT sample_id, chosen_by FROM chosen) AS chosen USING (sample_id)
    JOIN read_parquet($scores) AS scores USING (sample_id)
    ORDER BY md5($seed || ':' || sample_id)
) TO $file (FORMAT parquet, COMPRESSION zstd)
"""


def select_subset(
    scores: Path,
    corpus: Sequence[Path],
    proxy_lengths: Sequence[int],
    spec: SelectionSpec,
    folder: Path,
    progress: Progress = no_progress,
) -> Subset:
    """Writes ``subset.parquet`` and ``query.sql``, the statements that made it.

    Args:
        scores: ``scores.parquet``; how many gates it has stands in its schema's metadata.
        corpus: the canonical shards.
        proxy_lengths: response tokens of each proxy sample.
        progress: is told of about how many percent of the queries are done.

    Raises:
        InputError: the corpus has no samples, none of them meets ``where``, a quota is of a source
            that it does not have, or the quotas are too small for one sample.
    """
    with duckdb.connect(
        config={"memory_limit": MEMORY, "temp_directory": str(folder / SPILL)}
    ) as connection:
        run = Script(connection)
        with run.telling(progress):
            subset = choose(run, scores, proxy_lengths, spec)
            run(
                RESULT,
                seed=str(spec.seed),
                corpus=[str(file) for file in corpus],
                scores=str(scores),
                file=str(folder / SUBSET),
            )
    shutil.rmtree(folder / SPILL, ignore_errors=True)
    (folder / "query.sql").write_text(run.text(), encoding="utf-8")
    return replace(subset, query=run.text())


def choose(run: Script, scores: Path, proxy_lengths: Sequence[int], spec: SelectionSpec) -> Subset:
    """Makes the table ``chosen`` (sample_id, source, affinity, chosen_by) in the connection.

    Reads the scores a fixed number of times and sorts none of them but those at a threshold.

    Raises:
        InputError: as `select_subset`.
    """
    gates = int((pq.read_schema(scores).metadata or {}).get(b"gates", b"0"))
    whole = _counted(run, scores, CORPUS)
    corpus_by_source = {source: sum(whole[source].values()) for source in sorted(whole)}
    total = sum(corpus_by_source.values())
    if not total:
        raise InputError("the corpus has no samples to choose from. Add some to corpus.sources.")
    notes: list[str] = []
    budget = spec.budget(total)
    candidates, by_source = CORPUS, whole
    if spec.where is not None:
        try:
            by_source = _counted(run, scores, _meeting(scores, spec.where))
        except (duckdb.OutOfRangeException, duckdb.ConversionException) as error:
            raise InputError(
                f"selection.where: {spec.where} cannot be computed of every sample "
                f"({str(error).splitlines()[0]}). Mend it."
            ) from error
        budget = _within(by_source, budget, total, spec.where, notes)
        if spec.at_random:
            by_source = whole
        candidates = candidates_of(scores, spec)
    replay = spec.replayed(budget)
    if replay and len(by_source) == 1:
        notes.append(f"replay: {replay} samples were wanted, and there is no other source")
        replay = 0
    wanted = budget - replay
    parts = parts_of(by_source, wanted, gates, spec, notes)
    fill_pool(run, scores, candidates, parts)
    if all(part.pooled <= part.wanted for part in parts):
        run(ALL)
    else:
        run.connection.register(
            "given_bins",
            _bins(proxy_lengths if spec.match_lengths and not spec.at_random else []),
        )
        run("CREATE TEMP TABLE bins AS SELECT * FROM given_bins")
        run(DRAW, seed=str(spec.seed), wanted=[part.wanted for part in parts])
    replayed = 0
    if replay:
        chosen = _by_source(run.connection)
        size = sum(sum(levels.values()) for levels in by_source.values())
        # what was meant for other sources: those that gave less than their share of the corpus
        behind = [
            source
            for source, levels in by_source.items()
            if chosen.get(source, 0) / max(1, sum(chosen.values())) < sum(levels.values()) / size
        ]
        values = {"sources": behind, "seed": str(spec.seed), "wanted": replay}
        run(REPLAY.format(candidates=candidates), scores=str(scores), **values)
        replayed = sum(_by_source(run.connection).values()) - sum(chosen.values())
        if replayed < replay:
            notes.append(
                f"replay: {replay} samples were wanted, other sources have {replayed}; "
                "the rest is by affinity"
            )
            missing = replay - replayed
            run(FILL.format(candidates=candidates), scores=str(scores), missing=missing)
            values = {"scores": str(scores), "gates": gates}
            relaxed = run.connection.execute(RELAXED, values).fetchall()[0][0]
            if relaxed:
                notes.append(f"replay: {relaxed} of the rest did not pass every gate")
    chosen = _by_source(run.connection)
    cut_off = run.connection.execute(CUT_OFF).fetchall()[0][0]
    return Subset(
        rows=sum(chosen.values()),
        replayed=replayed,
        by_source=chosen,
        corpus_by_source=corpus_by_source,
        cut_off=float(cut_off),
        notes=notes,
    )


def _counted(run: Script, scores: Path, candidates: str) -> dict[str, dict[int, int]]:
    """Candidates by source, and by the number of gates that they passed."""
    query = COUNTS.format(candidates=candidates)
    by_source: dict[str, dict[int, int]] = {}
    for source, level, count in run.connection.execute(query, {"scores": str(scores)}).fetchall():
        by_source.setdefault(source, {})[level] = count
    return by_source


def candidates_of(scores: Path, spec: SelectionSpec) -> str:
    """The samples that may be chosen, for a FROM; ``$scores`` is the file."""
    if spec.where is None or spec.at_random:
        return CORPUS
    return _meeting(scores, spec.where)


def _meeting(scores: Path, where: str) -> str:
    """The samples that meet the condition, for a FROM."""
    there = pq.read_schema(scores).names
    parts = tuple(name for name in there if name not in (*COLUMNS, "sample_id", "gates_passed"))
    return f"(FROM {CORPUS} WHERE {checked_condition(where, parts)})"


def _within(
    meeting: dict[str, dict[int, int]], budget: int, total: int, where: str, notes: list[str]
) -> int:
    """The budget, or as many as meet the condition; notes how many do."""
    size = sum(sum(levels.values()) for levels in meeting.values())
    if not size:
        raise InputError(
            f"selection.where: none of the {total:,} samples of the corpus meets {where}. "
            "Loosen it; the scores that earlier runs kept can be looked at with `p2d sql`."
        )
    short = f", {budget:,} were wanted" if size < budget else ""
    notes.append(f"selection.where: {size:,} of {total:,} samples meet {where}{short}")
    return min(budget, size)


def _bins(lengths: Sequence[int]) -> pa.Table:
    """Upper ends of length bins with equal shares of the proxies, and each bin's quota."""
    if not lengths:
        return pa.table({"bin": [0], "upper": [float("inf")], "quota": [1.0]})
    ordered = sorted(lengths)
    cuts = [ordered[len(ordered) * i // LENGTH_BINS] for i in range(1, LENGTH_BINS)]
    uppers = [float(cut) for cut in sorted(set(cuts))] + [float("inf")]
    quotas, below = [], float("-inf")
    for upper in uppers:
        # a bin that no proxy falls into still has to be able to help out
        quotas.append(max(0.5, sum(below < length <= upper for length in ordered)))
        below = upper
    return pa.table({"bin": list(range(len(uppers))), "upper": uppers, "quota": quotas})


def _by_source(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Of the chosen."""
    rows = connection.execute(
        "SELECT source, count(*) FROM chosen GROUP BY source ORDER BY source"
    ).fetchall()
    return {source: int(count) for source, count in rows}
