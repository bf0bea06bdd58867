"""A subset with what it was made from, as far as a store still has it. Nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file

from p2d_core.affinity import Scorer, ScorerState, Step, scorers, steps_of
from p2d_core.affinity.measuring import MEASURED, MeasuredCorpus
from p2d_core.affinity.protocol import Fitted
from p2d_core.affinity.scoring import SCORES, STATE, Gate, gate_of
from p2d_core.errors import ArtifactError, InputError
from p2d_core.heads.head_map import HEADS, HeadMap, read_head_map
from p2d_core.samples.schema import Sample, from_table
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import SUBSET
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.manifest import MANIFEST
from p2d_core.store.recipe import hash_file
from p2d_core.store.runs import read_summary, run_files

FIND_IDS = (
    "`p2d sql \"SELECT DISTINCT sample_id, prompt FROM samples WHERE prompt LIKE '%words%'\"` "
    "finds ids"
)
LISTED = 5
"""Samples that are named where several are meant."""
TARGET_PARTS = {
    "proxy": "in the target's proxy set",
    "held_out": "held out of the target, to gauge by",
    "evaluation": "in the evaluation set",
}

FIND = """
SELECT sample_id, file_row_number FROM read_parquet($scores, file_row_number = true)
WHERE starts_with(sample_id, $beginning) ORDER BY sample_id LIMIT $most
"""
BEST = """
SELECT sample_id, scores.file_row_number
FROM read_parquet($scores, file_row_number = true) AS scores
JOIN (
    SELECT sample_id,
           row_number() OVER (ORDER BY gates_passed DESC, affinity DESC, sample_id) AS place
    FROM read_parquet($subset) QUALIFY place <= $n
) AS best USING (sample_id)
ORDER BY place
"""
CHOSEN_BY = """
SELECT sample_id, chosen_by FROM read_parquet($subset)
SEMI JOIN (SELECT unnest($ids) AS sample_id) USING (sample_id)
"""


def newest_choice(store: Store) -> tuple[str, Choice]:
    """The newest run that has a summary, and its subset.

    Raises:
        InputError: none has ended here yet.
        ArtifactError: its summary cannot be read, or its subset is gone.
    """
    files = run_files(store)
    if not files:
        raise InputError(
            f"no run of `p2d adapt` or `p2d demo` has ended in {store.root} yet. Start one; or "
            "name a subset with --subset KEY (`p2d artifacts ls --stage subset`)."
        )
    try:
        key = Path(read_summary(files[0])["artifacts"]["subset"]).name
    except (ArtifactError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{files[0]} does not say which subset its run chose ({error}). Delete it; or name a "
            "subset with --subset KEY (`p2d artifacts ls --stage subset`)."
        ) from error
    run_id = files[0].stem
    return run_id, Choice(store, _there(store, "subset", key, f"run {run_id}"))


class ScoredStep:
    """A step of the scorer chain, and the scores that it wrote."""

    def __init__(self, store: Store, ref: ArtifactRef, step: Step) -> None:
        self.store = store
        self.ref = ref
        self.manifest = ref.manifest
        self.name = step.name
        self.scorer: Scorer = step.scorer
        self.step = step

    @property
    def scorer_name(self) -> str:
        """As it is registered."""
        return scorers.name_of(type(self.scorer))

    @property
    def threshold(self) -> float | None:
        """Of its gate."""
        gate = self.manifest.facts["gates"].get(self.name) if self.step.gate is not None else None
        return float(gate["threshold"]) if gate is not None else None

    def fitted(self, shards: Sequence[Path]) -> tuple[ScorerState, Gate | None]:
        """What its affinities were computed with, and its gate.

        Scores that were kept without what was fitted to the corpus have its measurements read.

        Raises:
            FileNotFoundError: they would have to be, and are gone.
            ArtifactError: the state is not as it was made.
        """
        state: ScorerState = {}
        if STATE in self.manifest.files:
            state = load_file(sound(self.ref, STATE))
        measured = MeasuredCorpus(
            [
                (shard, self.store.path("measurements", key) / MEASURED)
                for shard, key in zip(shards, self.manifest.inputs["measurements"], strict=True)
            ]
        )
        if isinstance(self.scorer, Fitted):
            state = self.scorer.fit(state, measured)
        return state, gate_of(self.step, state, measured)

    def measured(self, shard: int, ids: Sequence[str]) -> pa.Table | None:
        """Rows of these samples of a shard, None where the measurement is gone."""
        ref = kept(self.store, "measurements", self.manifest.inputs["measurements"][shard])
        if ref is None:
            return None
        return pq.read_table(sound(ref, MEASURED), filters=[("sample_id", "in", list(ids))])

    @cached_property
    def head_map(self) -> HeadMap | None:
        """That its heads are of, None where it looks at none or the map is gone."""
        key = self.manifest.beside.get("heads")
        ref = kept(self.store, "heads", key) if key else None
        return read_head_map(sound(ref, HEADS)) if ref is not None else None


class Choice:
    """A subset, its corpus, and the scores that it was drawn by, step by step.

    Raises:
        ArtifactError: one of these is gone, or not as it was made.
    """

    def __init__(self, store: Store, subset: ArtifactRef) -> None:
        self.store = store
        self.subset = subset
        self.manifest = subset.manifest
        whose = f"subset {subset.key[:12]}"
        self.corpus = _there(store, "samples", self.manifest.inputs["corpus"], whose)
        shards = self.corpus.manifest.facts["shards"]
        self.shards = [str(shard["file"]) for shard in shards]
        self._ends = np.cumsum([shard["rows"] for shard in shards])
        refs = [_there(store, "scores", self.manifest.inputs["scores"], whose)]
        while previous := refs[0].manifest.inputs.get("previous"):
            refs.insert(0, _there(store, "scores", previous, whose))
        self.scores = sound(refs[-1], SCORES)
        self.facts = refs[-1].manifest.facts
        self.target = kept(store, "samples", refs[-1].manifest.inputs["target"])
        given = refs[-1].manifest.settings["scorer"]
        self.scorer_name: str = given["name"]
        made = scorers.make(self.scorer_name, dict(given["settings"]))
        self.version, self.version_here = given["version"], made.version
        steps = steps_of(made)
        if len(steps) != len(refs):
            raise ArtifactError(
                f"the scores {refs[-1].key[:12]} are of version {self.version} of "
                f"{self.scorer_name}, which had {len(refs)} steps; here it has {len(steps)}. "
                "`p2d adapt` with the same settings scores anew."
            )
        self.steps = [ScoredStep(store, *each) for each in zip(refs, steps, strict=True)]

    @property
    def spec(self) -> SelectionSpec:
        """How it was drawn."""
        given = dict(self.manifest.settings["selection"])
        quotas = tuple((source, share) for source, share in given.pop("quotas"))
        return SelectionSpec(**given, quotas=quotas)

    @property
    def rows(self) -> int:
        """Samples of the corpus."""
        return int(self._ends[-1])

    def best(self, n: int) -> dict[str, int]:
        """Ids and rows in the scores of the chosen that stand highest, in their order."""
        return self._asked(BEST, scores=str(self.scores), subset=self._subset, n=n)

    def beginning_with(self, beginning: str) -> dict[str, int]:
        """The one id of the corpus that begins so, and its row in the scores.

        Raises:
            InputError: none or more than one does.
        """
        found = self._asked(FIND, scores=str(self.scores), beginning=beginning, most=LISTED + 1)
        if len(found) == 1:
            return found
        if found:
            named = ", ".join(sample_id[:16] for sample_id in list(found)[:LISTED])
            more = ", ..." if len(found) > LISTED else ""
            raise InputError(
                f"several samples of the corpus begin with {beginning!r}: {named}{more} Give more "
                "of the id."
            )
        for part, where in TARGET_PARTS.items():
            for sample in self.target_part(part):
                if sample.sample_id.startswith(beginning):
                    raise InputError(
                        f"sample {sample.sample_id[:16]} is {where}: it is kept out of the corpus "
                        "and has no affinity. Ask for one of the corpus, or for the N best chosen."
                    )
        raise InputError(
            f"no sample of the corpus {self.corpus.key[:12]} begins with {beginning!r}. "
            f"{FIND_IDS}; --subset KEY names the subset of another run."
        )

    def chosen_by(self, ids: Sequence[str]) -> dict[str, str]:
        """Of those that were chosen, what by."""
        return self._asked(CHOSEN_BY, subset=self._subset, ids=list(ids))

    def shard_of(self, row: int) -> int:
        """In which shard a row of the scores is."""
        return int(np.searchsorted(self._ends, row, "right"))

    def samples(self, ids_by_shard: dict[int, list[str]]) -> dict[str, Sample]:
        """Samples of the corpus by their ids."""
        found = {}
        for shard, ids in ids_by_shard.items():
            file = sound(self.corpus, self.shards[shard])
            table = pq.read_table(file, filters=[("sample_id", "in", ids)])
            found |= {sample.sample_id: sample for sample in from_table(table)}
        return found

    def shard_files(self) -> list[Path]:
        """Of the corpus, in order."""
        return [self.corpus.path / name for name in self.shards]

    def target_part(self, part: str) -> list[Sample]:
        """Samples of the target's proxy, held_out or evaluation set; none where they are gone."""
        if self.target is None:
            return []
        return from_table(pq.read_table(sound(self.target, f"{part}.parquet")))

    @cached_property
    def proxies(self) -> list[Sample]:
        """The proxy set, in the order of the scorers' states; empty where it is gone."""
        return self.target_part("proxy")

    @cached_property
    def _subset(self) -> str:
        return str(sound(self.subset, SUBSET))

    def _asked(self, query: str, **values: Any) -> dict[str, Any]:
        with duckdb.connect() as connection:
            return dict(connection.execute(query, values).fetchall())


def kept(store: Store, stage: str, key: str) -> ArtifactRef | None:
    """An artifact if it is there; its files are not looked at."""
    folder = store.path(stage, key)
    if not (folder / MANIFEST).is_file():
        return None
    return ArtifactRef(stage=stage, key=key, location=str(folder))


def _there(store: Store, stage: str, key: str, whose: str) -> ArtifactRef:
    ref = kept(store, stage, key)
    if ref is None:
        raise ArtifactError(
            f"the {stage} {key[:12]} of {whose} is gone from {store.root}. `p2d adapt` with the "
            "same settings makes it again; --subset KEY names another subset (`p2d artifacts ls "
            "--stage subset`)."
        )
    return ref


def sound(ref: ArtifactRef, name: str) -> Path:
    """A file of an artifact that is as it was made.

    Raises:
        ArtifactError: it is not.
    """
    file, entry = ref.path / name, ref.manifest.files.get(name)
    if (
        entry is None
        or not file.resolve().is_relative_to(ref.path.resolve())
        or not file.is_file()
        or file.stat().st_size != entry["size"]
        or hash_file(file) != entry["sha256"]
    ):
        raise ArtifactError(
            f"{file} is not as it was made. `p2d artifacts verify {ref.key[:12]}` says more; "
            "`p2d adapt` with the same settings makes it again."
        )
    return file
