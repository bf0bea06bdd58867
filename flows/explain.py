"""Why samples were chosen or not, from what a run kept: no model is run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from flows.choice import FIND_IDS, Choice, ScoredStep, newest_choice
from p2d_core.affinity import ScorerState
from p2d_core.affinity.explain import Look, Standing, looks, standings
from p2d_core.affinity.scoring import KEPT, Gate
from p2d_core.affinity.sum import Sum, column_of
from p2d_core.errors import InputError
from p2d_core.samples.schema import Sample
from p2d_core.selection.reason import Reason, reasons
from p2d_core.store import ArtifactRef, Store

MOST = 1000
"""Samples that are explained at once."""
NEAREST = 5
"""Proxy samples that are named."""


@dataclass(frozen=True)
class Part:
    """One number of a sample's scores: its affinity, or a named part of it."""

    name: str
    """The column."""
    standing: Standing | None
    """In the corpus; of the affinity in the order of the selection, which takes the gates first.
    None where the sample was not measured for it."""
    cut_off: float | None
    """Of the affinity the lowest that was chosen, replay apart; of a step its gate."""
    weight: float | None
    """In a sum, to which the value times this is added."""


@dataclass(frozen=True)
class Passage:
    """A sample at one step of the scorer chain."""

    step: str
    scorer: str
    affinity: float | None
    """None where a step before had stopped it."""
    threshold: float | None
    """Of the gate; None where there is none."""
    passed: bool | None
    """None where there is no gate, or the sample did not come so far."""
    margin: float | None
    """Above the threshold, in standard deviations of the target's own affinities."""
    target_lower: float | None
    """Share of the target's own affinities, in [0, 1], that is lower."""


@dataclass(frozen=True)
class SeenHead:
    """A task head, and what it adds."""

    layer: int
    head: int
    rank: int | None
    """In the head map, from 1; None where that is gone."""
    adds: float


@dataclass(frozen=True)
class SeenProxy:
    """A proxy sample that the sample is like."""

    cosine: float
    sample: Sample | None
    """None where the target's samples are gone."""


@dataclass(frozen=True)
class StepLook:
    """What a step's scorer, or a part of a sum, saw in the sample."""

    step: str
    scorer: str
    affinity: float
    """Of a part of a sum before it was standardised."""
    measured: dict[str, float]
    """Plain numbers, such as losses in nats a response token."""
    heads: list[SeenHead] | None
    """All, what adds most first; None where the affinity is not kept by head."""
    left_over: float
    """The affinity less what the heads add."""
    proxies: list[SeenProxy] | None
    """The nearest first; None where it compares with none."""


@dataclass(frozen=True)
class Explained:
    """All that is known of one sample."""

    sample: Sample
    reason: Reason
    parts: list[Part]
    """The affinity first."""
    in_source: Standing
    """Its affinity among those of its source."""
    steps: list[Passage]
    looks: list[StepLook]
    notes: list[str]
    """What cannot be said, and why."""


@dataclass(frozen=True)
class Explanation:
    """Of samples of one corpus, by one subset."""

    run_id: str | None
    """The run whose subset it is; None where a subset was named."""
    subset: str
    """Its key."""
    scorer: str
    corpus: int
    """Samples of it."""
    chosen: int
    """Samples of the subset."""
    samples: list[Explained]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def explain(store: Store, asked: str, subset: ArtifactRef | None = None) -> Explanation:
    """One sample by its id or the beginning of one, or so many of the best chosen ones.

    Args:
        asked: a number up to `MOST`, or hexadecimal digits; digits alone are the beginning of an
            id if they are five or more, or begin with 0.
        subset: whose choice is explained; that of the newest run if None.

    Raises:
        InputError: no sample of the corpus is meant, or more than one; or no run has ended here.
        ArtifactError: what the subset was made from is gone, or not as it was made.
    """
    best, beginning = _wanted(asked)
    if subset is None:
        run_id, choice = newest_choice(store)
    else:
        run_id, choice = None, Choice(store, subset)
    found = choice.best(best) if best else choice.beginning_with(beginning)
    return Explanation(
        run_id=run_id,
        subset=choice.subset.key,
        scorer=choice.scorer_name,
        corpus=choice.rows,
        chosen=int(choice.manifest.facts["rows"]),
        samples=_explained(choice, found),
    )


def _wanted(asked: str) -> tuple[int, str]:
    """How many of the best; or 0, and the beginning of an id."""
    if asked.isascii() and asked.isdecimal() and len(asked) < 5 and asked[0] != "0":
        if int(asked) > MOST:
            raise InputError(
                f"{int(asked):,} samples are too many to explain at once: ask for {MOST:,} at "
                "most. `p2d sql` reads the scores of all."
            )
        return int(asked), ""
    beginning = asked.lower()
    if not 0 < len(beginning) <= 64 or set(beginning) - set("0123456789abcdef"):
        raise InputError(
            f"{asked[:80]!r} is neither a number of samples nor the beginning of a sample's id, "
            f"which is 64 hexadecimal digits. {FIND_IDS}."
        )
    return 0, beginning


class _Asked:
    """The samples that are asked for, and the scores of the whole corpus as columns."""

    def __init__(self, choice: Choice, found: dict[str, int]) -> None:
        self.row_of = found
        self.ids, self.rows = list(found), list(found.values())
        file = pq.ParquetFile(choice.scores, read_dictionary=["source"])
        table = file.read([name for name in file.schema_arrow.names if name != "sample_id"])
        self.sources = table["source"]
        self.gates_passed = table["gates_passed"].to_numpy()
        self.numbers = {
            name: table[name].to_numpy()
            for name in table.column_names
            if name not in KEPT and name != "gates_passed"
        }
        """The affinity first; NaN where a step did not measure."""
        self.by_shard: dict[int, list[str]] = defaultdict(list)
        for sample_id, row in found.items():
            self.by_shard[choice.shard_of(row)].append(sample_id)

    def value(self, name: str, sample_id: str) -> float:
        """Of one of the samples."""
        return float(self.numbers[name][self.row_of[sample_id]])


def _explained(choice: Choice, found: dict[str, int]) -> list[Explained]:
    """Of the samples with these ids, which stand in these rows of the scores."""
    asked = _Asked(choice, found)
    gates = [step.name for step in choice.steps if step.threshold is not None]
    lengths = choice.facts["proxy_lengths"]
    by = choice.chosen_by(asked.ids)
    why = reasons(choice.scores, lengths, choice.spec, gates, by, asked.ids)
    samples = choice.samples(asked.by_shard)
    parts = _parts(choice, asked)
    in_source = _in_source(asked)
    at_steps = [_at_step(choice, step, asked, gates) for step in choice.steps]
    return [
        Explained(
            sample=samples[sample_id],
            reason=why[sample_id],
            parts=parts[sample_id],
            in_source=in_source[sample_id],
            steps=[at[sample_id].passage for at in at_steps],
            looks=[look for at in at_steps for look in at[sample_id].looks],
            notes=[note for at in at_steps for note in at[sample_id].notes],
        )
        for sample_id in asked.ids
    ]


def _parts(choice: Choice, asked: _Asked) -> dict[str, list[Part]]:
    """Of each sample the affinity, and every named part of it."""
    cut_offs: dict[str, float | None] = {step.name: step.threshold for step in choice.steps}
    cut_offs["affinity"] = choice.manifest.facts["cut_off"]
    weights = {
        column_of(part): weight
        for step in choice.steps
        if isinstance(step.scorer, Sum)
        for part, weight in step.scorer.parts.items()
    }
    parts: dict[str, list[Part]] = {sample_id: [] for sample_id in asked.ids}
    for name, values in asked.numbers.items():
        # the selection takes the gates first, then the affinity
        before = asked.gates_passed if name == "affinity" else None
        for sample_id, standing in zip(
            asked.ids, standings(values, asked.rows, before), strict=True
        ):
            parts[sample_id].append(Part(name, standing, cut_offs.get(name), weights.get(name)))
    return parts


def _in_source(asked: _Asked) -> dict[str, Standing]:
    """Of each sample's affinity, in the order of the selection."""
    source_of = asked.sources.take(asked.rows).to_pylist()
    found: dict[str, Standing] = {}
    for source in dict.fromkeys(source_of):
        inside = np.flatnonzero(pc.equal(asked.sources, source).to_numpy())
        here = [i for i, other in enumerate(source_of) if other == source]
        rows = np.searchsorted(inside, [asked.rows[i] for i in here]).tolist()
        affinity, gates_passed = (
            values[inside] for values in (asked.numbers["affinity"], asked.gates_passed)
        )
        for i, standing in zip(here, standings(affinity, rows, gates_passed), strict=True):
            assert standing is not None
            found[asked.ids[i]] = standing
    return found


@dataclass
class _AtStep:
    """What a step has to say of one sample."""

    passage: Passage
    looks: list[StepLook]
    notes: list[str]


def _at_step(
    choice: Choice, step: ScoredStep, asked: _Asked, gates: Sequence[str]
) -> dict[str, _AtStep]:
    """Of each sample."""
    column = step.name if step.name in asked.numbers else "affinity"
    state, gate, note = _fitted(choice, step)
    found = {}
    for sample_id, row in zip(asked.ids, asked.rows, strict=True):
        affinity = asked.value(column, sample_id)
        passage = _passage(step, gate, affinity, gates, int(asked.gates_passed[row]))
        found[sample_id] = _AtStep(passage, [], [note] if note else [])
    if state is None:
        return found
    tables = []
    for shard, ids in asked.by_shard.items():
        measured = [one for one in ids if found[one].passage.affinity is not None]
        table = step.measured(shard, measured) if measured else None
        if table is not None:
            tables.append(table)
        for sample_id in measured if table is None else ():
            found[sample_id].notes.append(
                f"{step.name}: what was measured of it is gone from the store, so that its parts "
                "would need the model again. `p2d adapt` with the same settings measures it."
            )
    if not tables:
        return found
    table = pa.concat_tables(tables)
    ids = table["sample_id"].to_pylist()
    of_parts = step.scorer.part_names if isinstance(step.scorer, Sum) else ()
    columns = {"affinity": column} | {name: name for name in of_parts}
    affinities = {
        name: [asked.value(there, sample_id) for sample_id in ids]
        for name, there in columns.items()
    }
    seen = looks(step.scorer, state, table, affinities, NEAREST)
    ranks = step.head_map.ranks() if step.head_map is not None else None
    for sample_id, of_sample in zip(ids, seen, strict=True):
        for look in of_sample:
            found[sample_id].looks.append(_told(choice, step, look, ranks))
            if look.heads is None and look.needs_heads:
                found[sample_id].notes.append(
                    f"the affinity by {look.scorer} is no sum over heads: what it owes to each "
                    "would need the model again, without that head."
                )
    return found


def _fitted(choice: Choice, step: ScoredStep) -> tuple[ScorerState | None, Gate | None, str | None]:
    """What the step's affinities were computed with, and its gate; or why neither is known."""
    note = None
    if choice.version != choice.version_here:
        note = (
            f"{step.name}: the scores are of version {choice.version} of {choice.scorer_name}, and "
            f"here is version {choice.version_here}: what heads and proxy samples say to it would "
            "not explain them. `p2d adapt` with the same settings scores anew."
        )
        return None, None, note
    try:
        state, gate = step.fitted(choice.shard_files())
    except FileNotFoundError as error:
        note = (
            f"{step.name}: {error.filename} is gone, with measurements of the corpus: what heads "
            "and proxy samples say would need the model again. `p2d adapt` with the same settings "
            "measures them."
        )
        return None, None, note
    return state, gate, None


def _passage(
    step: ScoredStep, gate: Gate | None, affinity: float, gates: Sequence[str], gates_passed: int
) -> Passage:
    came = not math.isnan(affinity)
    known = gate is not None and came
    return Passage(
        step=step.name,
        scorer=step.scorer_name,
        affinity=affinity if came else None,
        threshold=step.threshold,
        passed=gates_passed > gates.index(step.name) if came and step.name in gates else None,
        margin=float(gate.margin(np.float64(affinity))) if known else None,
        target_lower=bisect_left(gate.own, affinity) / len(gate.own) if known else None,
    )


def _told(choice: Choice, step: ScoredStep, look: Look, ranks: Tensor | None) -> StepLook:
    """With head ranks, and the texts of the proxy samples."""
    heads = proxies = None
    if look.heads is not None:
        heads = [
            SeenHead(
                share.layer,
                share.head,
                int(ranks[share.layer, share.head]) if ranks is not None else None,
                share.adds,
            )
            for share in look.heads
        ]
    if look.proxies is not None:
        proxies = [
            SeenProxy(cosine, choice.proxies[place] if choice.proxies else None)
            for place, cosine in look.proxies
        ]
    return StepLook(
        step=step.name,
        scorer=look.scorer,
        affinity=look.affinity,
        measured=dict(look.measured),
        heads=heads,
        left_over=look.left_over,
        proxies=proxies,
    )
