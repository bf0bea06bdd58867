"""What the stages of a run cost: when they were made, and now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from p2d_core.aer import AER, AER_STAGES, Reference
from p2d_core.store import ArtifactRef
from tasks.summary import StageLine

TERM_OF_STAGE = {
    "proxy": "proxy",
    "heads": "heads",
    "head_proxy": "heads",
    "rate": "model",
    "measurements": "scores",
    "scores": "scores",
    "subset": "subset",
    "model": "model",
}
"""Which term of the AER a stage counts to; a stage that is missing counts to none."""
NO_MODEL = {"scores", "subset"}
"""They run none, and take next to nothing: which machine does not matter."""


@dataclass
class _Entry:
    stage: str
    seconds: float
    refs: list[ArtifactRef]


@dataclass
class Ledger:
    """Every stage call of a run, in order, with the artifacts that came of it."""

    run_id: str
    entries: list[_Entry] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    """Artifacts that were paid for and are no longer there to say how much."""

    @contextmanager
    def stage(self, name: str) -> Iterator[list[ArtifactRef]]:
        """Times its block, which appends the artifacts that it made or found."""
        refs: list[ArtifactRef] = []
        start = time.perf_counter()
        yield refs
        self.entries.append(_Entry(name, time.perf_counter() - start, refs))

    def last(self, stage: str) -> ArtifactRef | None:
        """What a stage made or found last in this run."""
        made = [ref for entry in self.entries if entry.stage == stage for ref in entry.refs]
        return made[-1] if made else None

    def _costs(self, entry: _Entry) -> tuple[float, float, bool]:
        """Cold seconds, seconds of this run, and whether all of it was reused.

        What was made now cost what its manifest says, but for what a run before had done of it; a
        reused artifact costs its look-up, for which the call's remaining time stands.
        """
        manifests = [ref.manifest for ref in entry.refs]
        made = [m for m in manifests if m.run_id == self.run_id]
        cold = sum(float(m.cost["wall_seconds"]) for m in manifests)
        # manifests of before 2026-11-28 do not say what runs that were stopped took of it
        earlier = sum(float(m.cost.get("seconds_before", 0)) for m in made)
        now = sum(float(m.cost["wall_seconds"]) for m in made) - earlier
        if len(made) < len(manifests):
            now = max(now, entry.seconds)
        return cold, now, not made

    def _once(self) -> Iterator[_Entry]:
        """The entries without artifacts that an earlier one has: asked for twice, paid for once."""
        seen: set[str] = set()
        for entry in self.entries:
            new = [ref for ref in entry.refs if ref.key not in seen]
            seen |= {ref.key for ref in new}
            if new:
                yield replace(entry, refs=new)

    def machines(self) -> list[str]:
        """Those that the model was run on for the AER: for P2D, or for full fine-tuning."""
        counted = {*TERM_OF_STAGE, "model_full", "reference"} - NO_MODEL
        refs = [ref for entry in self.entries if entry.stage in counted for ref in entry.refs]
        return sorted({ref.manifest.cost["machine"] for ref in refs})

    def lines(self) -> list[StageLine]:
        """A line a stage, calls of the same name added up."""
        lines: dict[str, StageLine] = {}
        for entry in self._once():
            cold, now, reused = self._costs(entry)
            line = lines.get(entry.stage)
            lines[entry.stage] = StageLine(
                name=entry.stage,
                reused=reused and (line is None or line.reused),
                seconds=now + (line.seconds if line else 0),
                cold_seconds=cold + (line.cold_seconds if line else 0),
            )
        return list(lines.values())

    def aer(self, reference: Reference) -> tuple[AER, AER]:
        """Cold, and of this run. Arms that P2D is held against do not count."""
        cold = dict.fromkeys(AER_STAGES, 0.0)
        now = dict.fromkeys(AER_STAGES, 0.0)
        for entry in self._once():
            term = TERM_OF_STAGE.get(entry.stage)
            if term is not None:
                costs = self._costs(entry)
                cold[term] += costs[0]
                now[term] += costs[1]
        return AER(cold, reference), AER(now, reference)
