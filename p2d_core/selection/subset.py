"""Chooses the subset: a pool of the best, a draw from it, and a share of replay."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from p2d_core.errors import InputError, SettingsError
from p2d_core.progress import Progress, no_progress
from p2d_core.selection.where import COLUMNS, checked_condition

SUBSET = "subset.parquet"
LENGTH_BINS = 5
MEMORY = "1GB"
"""Beyond which DuckDB spills to disk."""
SPILL = ".spill"
STATEMENTS = 4
"""That a selection with replay takes: pool, draw, replay, result."""
SECONDS_BETWEEN_LOOKS = 0.5
PLACES = ("scores", "corpus", "file")
"""Parameters that name files."""


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
    quotas: tuple[tuple[str, float], ...] = ()
    """(source, share of the subset) of sources that get no more and no less; the others get the
    rest by affinity. Replay is apart."""
    seed: int = 0
    where: str | None = None
    """SQL condition over the scores' columns, see `where.checked_condition`; only samples that meet
    it are candidates. Those drawn at random are from the whole corpus all the same."""
    at_random: bool = False
    """Draw from the whole corpus; no affinity, no quota: what a selection has to beat."""

    def __post_init__(self) -> None:
        shares = [share for _, share in self.quotas]
        named = {source for source, _ in self.quotas}
        if any(not 0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise SettingsError(
                f"selection.quotas has the shares {shares}; each has to be in (0, 1], and together "
                "at most 1."
            )
        if len(named) < len(shares):
            raise SettingsError("selection.quotas names a source twice; name each once.")


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

# The pool: whatever passed every gate; if that is too little, what passed the gates up to the
# last one, the nearest to it first, and so on down to the first gate.
POOL = """
-- in the order gates_passed DESC, affinity DESC, sample_id, but without sorting: what is at or
-- above a threshold, less the last few at it
CREATE TEMP TABLE pool AS
SELECT sample_id, source, affinity, gates_passed, n_response_tokens, {part} AS part
FROM {candidates}
WHERE {inside}
"""

TRIM = """
DELETE FROM pool WHERE rowid IN (
    SELECT rowid FROM pool WHERE part = $part AND gates_passed = $level
    ORDER BY affinity, sample_id DESC
    LIMIT $surplus
)
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
SELECT sample_id, source, affinity, 'affinity' FROM {candidates}
WHERE sample_id NOT IN (SELECT sample_id FROM chosen)
ORDER BY gates_passed DESC, affinity DESC, sample_id
LIMIT $missing
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


@dataclass(frozen=True, slots=True)
class _Part:
    """Samples that compete with each other: of a source with a quota, or all the others."""

    condition: str
    """SQL over the scores."""
    values: dict[str, str]
    wanted: int
    pooled: int
    """How many come into the pool."""
    levels: dict[int, int]
    """Samples by the number of gates that they passed."""

    @property
    def size(self) -> int:
        return sum(self.levels.values())

    def lowest(self) -> tuple[int, int]:
        """The lowest level that comes into the pool, and how many of it do."""
        left = self.pooled
        for level in sorted(self.levels, reverse=True):
            if left <= self.levels[level]:
                return level, left
            left -= self.levels[level]
        return min(self.levels, default=0), self.levels.get(min(self.levels, default=0), 0)


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
        InputError: the corpus has no samples, none of them meets ``where``, or a quota is of a
            source that it does not have.
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
    budget = max(1, round(spec.fraction * total))
    candidates, by_source = CORPUS, whole
    if spec.where is not None:
        by_source = _counted(run, scores, _meeting(scores, spec.where))
        budget = _within(by_source, budget, total, spec.where, notes)
        if spec.at_random:
            by_source = whole
        candidates = candidates_of(scores, spec)
    replay = 0 if spec.at_random else min(round(spec.replay * budget), budget - 1)
    wanted = budget - replay
    parts = _parts(by_source, wanted, gates, spec, notes)
    _fill_pool(run, scores, candidates, parts)
    if all(part.pooled <= part.wanted for part in parts):
        run(ALL)
    else:
        run.connection.register(
            "given_bins",
            _bins(proxy_lengths if spec.match_lengths and not spec.at_random else []),
        )
        run("CREATE TEMP TABLE bins AS SELECT * FROM given_bins")
        run(DRAW, seed=str(spec.seed), wanted=[part.wanted for part in parts])
    cut_off = run.connection.execute("SELECT min(affinity) FROM chosen").fetchall()[0][0]
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
    chosen = _by_source(run.connection)
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


def _parts(
    by_source: dict[str, dict[int, int]],
    wanted: int,
    gates: int,
    spec: SelectionSpec,
    notes: list[str],
) -> list[_Part]:
    """Who competes with whom, for how many places."""
    quotas = {} if spec.at_random else dict(spec.quotas)
    unknown = sorted(set(quotas) - set(by_source))
    if unknown:
        meeting = " that meets selection.where" if spec.where is not None else ""
        raise InputError(
            f"selection.quotas: the corpus has no source {unknown[0]!r}{meeting}. "
            f"It has {', '.join(sorted(by_source))}."
        )
    parts: list[_Part] = []

    def add(condition: str, values: dict[str, str], sources: list[str], due: int) -> None:
        levels: Counter[int] = Counter()
        for source in sources:
            levels.update(by_source[source])
        size, passed = sum(levels.values()), levels[gates] if gates else 0
        if spec.at_random:
            pooled = size
        elif gates:
            pooled = max(passed, min(due, size))
        else:
            pooled = min(size, round(spec.pool * due))
        if gates and passed < due and not spec.at_random:
            notes.append(
                f"{passed} samples passed every gate, {due} were wanted: the gates were relaxed, "
                "the last one first, for the rest"
            )
        parts.append(_Part(condition, values, due, pooled, dict(levels)))

    left = wanted
    for number, (source, share) in enumerate(quotas.items()):
        due = min(round(share * wanted), left)
        size = sum(by_source[source].values())
        if size < due:
            notes.append(f"quota: {due} samples of {source} were wanted, it has {size}")
            due = size
        add(f"source = $source{number}", {f"source{number}": source}, [source], due)
        left -= due
    others = [source for source in by_source if source not in quotas]
    if others:
        named = {f"source{number}": source for number, source in enumerate(quotas)}
        condition = " AND ".join(f"source <> ${name}" for name in named) or "true"
        add(condition, named, others, left)
    return parts


def _fill_pool(run: Script, scores: Path, candidates: str, parts: Sequence[_Part]) -> None:
    """Makes the table ``pool`` with every part's best in it."""
    quantiles: list[str] = []
    inside: list[str] = []
    values: dict[str, Any] = {}
    lowest: dict[int, tuple[int, int]] = {}
    for number, part in enumerate(parts):
        level, needed = part.lowest()
        of_level = part.levels.get(level, 0)
        values |= part.values
        if needed >= of_level:
            inside.append(f"({part.condition} AND gates_passed >= {level:d})")
            continue
        lowest[number] = (level, part.pooled)
        # one lower than the last that is needed: what is too many is taken away again
        share = max(0.0, (of_level - needed - 1) / of_level)
        quantiles.append(
            f"quantile_disc(affinity, {share!r}) "
            f"FILTER (WHERE {part.condition} AND gates_passed = {level:d})"
        )
        inside.append(
            f"({part.condition} AND (gates_passed > {level:d} "
            f"OR (gates_passed = {level:d} AND affinity >= $low{number})))"
        )
    if quantiles:
        # conditions and numbers are of this file or checked; the names of sources are bound
        query = f"SELECT {', '.join(quantiles)} FROM {candidates}"  # noqa: S608
        found = run.connection.execute(query, {"scores": str(scores)} | values).fetchall()[0]
        values |= {f"low{number}": low for number, low in zip(lowest, found, strict=True)}
    cases = " ".join(f"WHEN {part.condition} THEN {i}" for i, part in enumerate(parts))
    statement = POOL.format(
        part=f"CASE {cases} END", inside=" OR ".join(inside), candidates=candidates
    )
    run(statement, scores=str(scores), **values)
    held = dict(run.connection.execute("SELECT part, count(*) FROM pool GROUP BY part").fetchall())
    for number, (level, pooled) in lowest.items():
        if held[number] > pooled:
            run(TRIM, part=number, level=level, surplus=held[number] - pooled)


class Script:
    """Runs statements with bound parameters and remembers them, with the values, as SQL."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection
        self.done: list[str] = []

    def __call__(self, statement: str, **parameters: Any) -> None:
        self.remember(statement, **parameters)
        self.connection.execute(statement, parameters or None)

    def remember(self, statement: str, **parameters: Any) -> None:
        """Notes a statement without running it."""
        # file names are this machine's: the inputs stand in the manifest
        shown = {k: v for k, v in parameters.items() if k not in PLACES}
        values = ", ".join(f"${name} = {value!r}" for name, value in shown.items())
        self.done.append((f"-- {values}\n" if values else "") + statement.strip() + ";\n")

    @contextmanager
    def telling(self, progress: Progress) -> Iterator[None]:
        """Tells how far the statements are, from a thread of its own, as long as its block runs."""
        for setting in ("enable_progress_bar = true", "enable_progress_bar_print = false"):
            self.connection.execute(f"SET {setting}")
        over = threading.Event()

        def tell() -> None:
            percent = 0
            while not over.wait(SECONDS_BETWEEN_LOOKS):
                before = max(0, min(len(self.done), STATEMENTS) - 1)
                # -1 between two statements
                of_this = max(0.0, self.connection.query_progress())
                percent = max(percent, min(100, round((100 * before + of_this) / STATEMENTS)))
                progress(percent, 100)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

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


def _by_source(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Of the chosen."""
    rows = connection.execute(
        "SELECT source, count(*) FROM chosen GROUP BY source ORDER BY source"
    ).fetchall()
    return {source: int(count) for source, count in rows}
