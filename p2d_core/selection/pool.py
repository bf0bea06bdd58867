"""The pool: of each part of the corpus the best, as many as may be drawn from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_core.errors import InputError
from p2d_core.selection.script import Script
from p2d_core.selection.spec import SelectionSpec

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


@dataclass(frozen=True, slots=True)
class Part:
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


def parts_of(
    by_source: dict[str, dict[int, int]],
    wanted: int,
    gates: int,
    spec: SelectionSpec,
    notes: list[str],
) -> list[Part]:
    """Who competes with whom, for how many places.

    Raises:
        InputError: a quota is of a source that the corpus does not have, or all are too small for
            one sample.
    """
    quotas = {} if spec.at_random else dict(spec.quotas)
    unknown = sorted(set(quotas) - set(by_source))
    if unknown:
        meeting = " that meets selection.where" if spec.where is not None else ""
        raise InputError(
            f"selection.quotas: the corpus has no source {unknown[0]!r}{meeting}. "
            f"It has {', '.join(sorted(by_source))}."
        )
    parts: list[Part] = []

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
            meeting = " that meet selection.where" if spec.where is not None else ""
            notes.append(
                f"{passed} samples{meeting} passed every gate, {due} were wanted: the gates were "
                "relaxed, the last one first, for the rest"
            )
        parts.append(Part(condition, values, due, pooled, dict(levels)))

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
    rest = sum(sum(by_source[source].values()) for source in others)
    if left == wanted and not rest:
        shares = ", ".join(f"{source} {share:g}" for source, share in quotas.items())
        raise InputError(
            f"selection.quotas: the quotas ({shares}) of a budget of {wanted} round to 0 samples "
            "each, and no other source is left. Raise selection.fraction, or take out a quota."
        )
    if rest < left:
        notes.append(
            f"quotas: {wanted} samples were wanted, {wanted - left + rest} were taken: of the "
            f"{left} that no quota takes, sources without one have {rest}"
        )
    if others:
        named = {f"source{number}": source for number, source in enumerate(quotas)}
        condition = " AND ".join(f"source <> ${name}" for name in named) or "true"
        add(condition, named, others, left)
    return parts


def fill_pool(run: Script, scores: Path, candidates: str, parts: Sequence[Part]) -> None:
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
        # DuckDB refuses values that a query does not name: of a source that is taken whole
        named = {name: values[name] for name in re.findall(r"\$(source\d+)", query)}
        found = run.connection.execute(query, {"scores": str(scores)} | named).fetchall()[0]
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
