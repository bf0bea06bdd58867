"""Chooses the subset: a pool of the best, a draw from it, and a share of replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from p2d_core.errors import InputError

SUBSET = "subset.parquet"
LENGTH_BINS = 5


@dataclass(frozen=True, slots=True)
class SelectionSpec:
    """How many samples, and how they are drawn."""

    fraction: float
    """Share of the corpus, in (0, 1]."""
    pool: float = 1.0
    """Draw from the best ``pool`` times the budget; scores with gates: from all that passed."""
    match_lengths: bool = True
    """Spread the response lengths as those of the proxy samples."""
    replay: float = 0.0
    """Share of the subset, in [0, 1), drawn at random from the corpus' other sources."""
    seed: int = 0
    at_random: bool = False
    """Draw from the whole corpus and look at no affinity: what a selection has to beat."""


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


CANDIDATES = """
CREATE TEMP TABLE candidate AS
SELECT sample_id, source, affinity, n_response_tokens, gates_passed,
       md5($seed || ':' || sample_id) AS draw
FROM read_parquet($scores)
"""

# The pool: whatever passed every gate; if that is too little, what passed the gates up to the
# last one, the nearest to it first, and so on down to the first gate.
POOL = """
CREATE TEMP TABLE pool AS
SELECT * FROM candidate
WHERE $gates > 0 AND gates_passed = $gates
UNION ALL
SELECT * FROM (
    SELECT * FROM candidate
    WHERE NOT ($gates > 0 AND gates_passed = $gates)
    ORDER BY gates_passed DESC, affinity DESC, sample_id
    LIMIT $further
)
"""

# A sample's place in its bin over the bin's quota: taking the smallest ones fills every bin in
# step with the quotas, and what a bin lacks is made up by the others.
DRAW = """
CREATE TEMP TABLE chosen AS
SELECT sample_id, 'affinity' AS chosen_by FROM (
    SELECT pool.sample_id, draw,
           row_number() OVER (PARTITION BY bin ORDER BY draw)
               / (SELECT quota FROM bins WHERE bins.bin = binned.bin) AS place
    FROM pool JOIN (
        SELECT sample_id, (SELECT min(bin) FROM bins WHERE n_response_tokens <= upper) AS bin
        FROM pool
    ) AS binned USING (sample_id)
)
ORDER BY place, draw
LIMIT $wanted
"""

# Other sources: those that gave less to the chosen than their share of the corpus.
REPLAY = """
INSERT INTO chosen
SELECT sample_id, 'replay' FROM candidate
WHERE source IN (
    SELECT source FROM candidate LEFT JOIN chosen USING (sample_id)
    GROUP BY source
    HAVING count(chosen.sample_id) / (SELECT greatest(count(*), 1) FROM chosen)
         < count(*) / (SELECT count(*) FROM candidate)
)
AND sample_id NOT IN (SELECT sample_id FROM pool)
ORDER BY draw
LIMIT $wanted
"""

RESULT = """
SELECT corpus.*, scores.* EXCLUDE (sample_id, source), chosen.chosen_by
FROM read_parquet($corpus) AS corpus
JOIN chosen USING (sample_id)
JOIN read_parquet($scores) AS scores USING (sample_id)
ORDER BY md5($seed || ':' || sample_id)
"""


def select_subset(
    scores: Path,
    corpus: Sequence[Path],
    proxy_lengths: Sequence[int],
    spec: SelectionSpec,
    folder: Path,
) -> Subset:
    """Writes ``subset.parquet`` and ``query.sql``, the statements that made it.

    Args:
        scores: ``scores.parquet``; how many gates it has stands in its schema's metadata.
        corpus: the canonical shards.
        proxy_lengths: response tokens of each proxy sample.

    Raises:
        InputError: the corpus has no samples.
    """
    gates = int((pq.read_schema(scores).metadata or {}).get(b"gates", b"0"))
    connection = duckdb.connect()
    run = _Script(connection)
    run(CANDIDATES, seed=str(spec.seed), scores=str(scores))
    total = _number(connection, "SELECT count(*) FROM candidate")
    if not total:
        raise InputError("the corpus has no samples to choose from. Add some to corpus.sources.")
    budget = max(1, round(spec.fraction * total))
    replay = 0 if spec.at_random else min(round(spec.replay * budget), budget - 1)
    wanted = budget - replay
    passed = _number(
        connection, "SELECT count(*) FROM candidate WHERE $1 > 0 AND gates_passed = $1", gates
    )
    if spec.at_random:
        further = total
    elif gates:
        further = max(0, wanted - passed)
    else:
        further = min(total, round(spec.pool * wanted))
    run(POOL, gates=gates, further=further)
    bins = _bins(proxy_lengths if spec.match_lengths and not spec.at_random else [])
    connection.register("given_bins", bins)
    run("CREATE TEMP TABLE bins AS SELECT * FROM given_bins")
    run(DRAW, wanted=wanted)
    notes = []
    if gates and further and not spec.at_random:
        notes.append(
            f"{passed} samples passed every gate, {wanted} were wanted: the gates were relaxed, "
            "the last one first, for the rest"
        )
    cut_off = connection.execute(
        "SELECT min(affinity) FROM candidate JOIN chosen USING (sample_id)"
    ).fetchall()[0][0]
    if replay:
        run(REPLAY, wanted=replay)
    counts = _by_source(connection, "candidate JOIN chosen USING (sample_id)")
    chosen = sum(counts.values())
    replayed = _number(connection, "SELECT count(*) FROM chosen WHERE chosen_by = 'replay'")
    if replayed < replay:
        notes.append(f"replay: {replay} samples were wanted, other sources have {replayed}")
    run.remember(RESULT, seed=spec.seed)
    result = connection.sql(
        RESULT,
        params={
            "seed": str(spec.seed),
            "corpus": [str(file) for file in corpus],
            "scores": str(scores),
        },
    ).to_arrow_table()
    pq.write_table(result, folder / SUBSET, compression="zstd")
    (folder / "query.sql").write_text(run.text(), encoding="utf-8")
    return Subset(
        rows=chosen,
        replayed=replayed,
        by_source=counts,
        corpus_by_source=_by_source(connection, "candidate"),
        cut_off=float(cut_off),
        notes=notes,
        query=run.text(),
    )


class _Script:
    """Runs statements with bound parameters and remembers them, with the values, as SQL."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection
        self.done: list[str] = []

    def __call__(self, statement: str, **parameters: Any) -> None:
        self.remember(statement, **parameters)
        self.connection.execute(statement, parameters or None)

    def remember(self, statement: str, **parameters: Any) -> None:
        """Notes a statement that is run elsewhere."""
        # file names are this machine's: the inputs stand in the manifest
        shown = {k: v for k, v in parameters.items() if isinstance(v, int) or k == "seed"}
        values = ", ".join(f"${name} = {value!r}" for name, value in shown.items())
        self.done.append((f"-- {values}\n" if values else "") + statement.strip() + ";\n")

    def text(self) -> str:
        return "\n".join(self.done)


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


def _number(connection: duckdb.DuckDBPyConnection, query: str, *values: Any) -> int:
    return int(connection.execute(query, list(values) or None).fetchall()[0][0])


def _by_source(connection: duckdb.DuckDBPyConnection, table: str) -> dict[str, int]:
    # `table` is one of two texts of this file
    rows = connection.execute(
        f"SELECT source, count(*) FROM {table} GROUP BY source ORDER BY source"  # noqa: S608
    ).fetchall()
    return {source: int(count) for source, count in rows}
