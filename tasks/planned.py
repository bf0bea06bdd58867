"""What a run is expected to take, as it is kept and held against what the run took."""

from __future__ import annotations

from pydantic import BaseModel


class PlannedStage(BaseModel):
    """One stage, before it is run."""

    name: str
    state: str
    """new, reused, partly reused, or what has to be made before that is known."""
    seconds: float
    """What the run would spend on it; what is not known to be there counts as made."""
    cold_seconds: float
    """What all of it takes to make, or took."""
    spread_seconds: float
    """Standard error of `seconds`, as far as it could be seen."""


class PlannedAER(BaseModel):
    """The Alignment Efficiency Ratio as it would be."""

    cold: float
    this_run: float
    speedup: float
    """1 / cold."""
    full_seconds: float
    full_spread_seconds: float


class Plan(BaseModel):
    """What `p2d plan` found; its keys are stable, new ones may come."""

    name: str
    made_at: str
    machine: str
    corpus: int
    """Samples."""
    corpus_is_estimated: bool
    """There was no time to read all of it."""
    tokens_in_sample: float
    """Of the corpus, on average; 0 where nothing had to be read."""
    stages: list[PlannedStage]
    seconds: float
    """Of the whole run."""
    spread_seconds: float
    starting_seconds: float | None
    """Starting and looking up, as earlier runs in the store had it; None: there is none."""
    aer: PlannedAER
    memory_bytes: int
    """Peak of the process, or of the GPU's allocator; 0 where nothing had to be timed."""
    disk_bytes: int
    """At most at once, with checkpoints."""
    free_bytes: int
    """Where the store is."""
    seconds_to_plan: float = 0.0
    key: str = ""
    """Of the settings and inputs that it is for."""
