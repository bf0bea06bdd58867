"""What a run says of itself: read by the terminal, by MLflow, and, as JSON, by machines."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from tasks.planned import Plan

ARMS = ("base", "p2d", "proxy", "random", "full")
"""What P2D is compared with, and itself, in the order of display."""


class StageLine(BaseModel):
    """One stage of a run."""

    name: str
    reused: bool
    seconds: float
    """What it took now: making it, or looking it up."""
    cold_seconds: float
    """What its artifacts cost when they were made."""


class AgreementSummary(BaseModel):
    """How far several draws of the proxy set rank the same heads alike."""

    draws: int
    spearman: float
    """Rank correlation over all heads, the mean over pairs of draws; 0 by chance."""
    spearman_by_luck: float
    """What two random rankings reach in one case of twenty."""
    jaccard: float
    """Task heads that two draws have in common over those that one has, the mean over pairs."""
    jaccard_by_chance: float
    """What two random choices of as many have on average."""

    @property
    def text(self) -> str:
        """In a sentence."""
        return (
            f"Over {self.draws} draws of the proxy set: rank correlation {self.spearman:.2f} "
            f"(above {self.spearman_by_luck:.2f} is rare by chance), task heads in common "
            f"{self.jaccard:.2f} (Jaccard; {self.jaccard_by_chance:.2f} by chance)."
        )


class ProxyRunSummary(BaseModel):
    """What the proxy run learnt; losses are of samples that it did not see, in nats a token."""

    learning_rate: float
    """Peak."""
    steps: int
    held_out_before: float
    held_out_after: float

    @property
    def text(self) -> str:
        """In a sentence, and what to do if it learnt nothing."""
        said = (
            f"Proxy run: {self.steps:,} steps at {self.learning_rate:g} took the loss on held-out "
            f"samples from {self.held_out_before:.3g} to {self.held_out_after:.3g}."
        )
        if self.held_out_after < self.held_out_before:
            return said
        return f"{said} Nothing was learnt to rank heads by: set a lower proxy.learning_rate."


class HeadsSummary(BaseModel):
    """Which heads were found."""

    total: int
    selected: int
    ids: list[tuple[int, int]]
    ranker: str
    picture: str
    """Path of heads.png."""
    agreement: AgreementSummary | None = None
    """Of the draws of the proxy set that the map is the mean of; None of one alone."""
    proxy_run: ProxyRunSummary | None = None
    """Of several the last; None where none was needed."""

    @property
    def texts(self) -> list[str]:
        """What is to be said of how they were found, sentence by sentence."""
        return [said.text for said in (self.proxy_run, self.agreement) if said is not None]


class RejectedSummary(BaseModel):
    """Rows of a source that were no samples and were left out."""

    source: str
    rows: int
    file: str
    """Path of rejected.parquet, with the reason for each."""


class SelectionSummary(BaseModel):
    """Which samples were chosen."""

    scorer: str
    corpus: int
    selected: int
    by_source: dict[str, int]
    corpus_by_source: dict[str, int]
    replayed: int = 0
    """Of the selected those that were drawn at random from other sources, against forgetting."""
    cut_off: float | None = None
    """Lowest affinity among the chosen, replay apart: the boundary."""
    by_label: dict[str, int] = {}
    """Only where the corpus' samples carry a `label` column, which no stage reads."""
    notes: list[str] = []
    """What a person should know: gates relaxed, duplicates dropped, replay short."""
    head_score_kept: float | None = None
    """Share of the task heads' score that scoring looked at; less than 1 with scoring.depth."""

    @property
    def boundary_text(self) -> str:
        """Such as ", down to affinity 0.25, 12 of them replay"; empty where it is not known."""
        replay = f", {self.replayed:,} of them replay" if self.replayed else ""
        return "" if self.cut_off is None else f", down to affinity {self.cut_off:.6g}{replay}"


class TrainableSummary(BaseModel):
    """How much of the model may move, and by which adaptation."""

    adaptation: str = "heads"
    parameters: int
    share_of_model: float
    share_of_attention: float
    proxy_samples: int = 0
    """That every arm was trained on beside its own samples."""
    learning_rate: float = 0.0
    """Peak; 0 in runs that did not keep it."""
    rate_found: float = 0.0
    """The one to take of those that were tried; 0 if the rate was given."""
    rates_tried: dict[str, float | None] = {}
    """Learning rate (0: untuned) -> loss on held-out proxy samples, None where training ran away;
    empty if the rate was given."""

    @property
    def rate_text(self) -> str:
        """Such as 0.003 (held-out proxy samples: loss 5.1 at 0, 0.39 at 0.001, 0.07 at 0.003)."""
        rate = f"{self.learning_rate:g}"
        if self.rate_found not in (0.0, self.learning_rate):
            rate += f", from {self.rate_found:g} for more steps"
        tried = ", ".join(
            f"none at {each}" if loss is None else f"{loss:.3g} at {each}"
            for each, loss in self.rates_tried.items()
        )
        return f"{rate} (held-out proxy samples: loss {tried})" if tried else rate


class QualitySummary(BaseModel):
    """Quality of the arms on the evaluation samples; None: the arm was not run."""

    metric: str
    higher_is_better: bool
    base: float
    p2d: float
    full: float | None = None
    random: float | None = None
    proxy: float | None = None
    """The same heads tuned on the proxy set alone: what the corpus adds is p2d less this."""
    retention: dict[str, float] = {}
    """Same metric on the retention samples, by arm."""
    losses: dict[str, float] = {}
    """Mean response-token loss on the evaluation samples, by arm."""
    also: dict[str, dict[str, float]] = {}
    """Further metrics on the evaluation samples: metric -> arm -> value."""
    samples: int = 0


class HarnessLine(BaseModel):
    """A metric of a task of lm-eval, by arm."""

    task: str
    metric: str
    """With the task's filter behind a slash, where it has several."""
    higher_is_better: bool | None = None
    """None: the task does not say."""
    samples: int
    value: dict[str, float | None]
    """None: it was no finite number."""
    stderr: dict[str, float | None]
    """None: there is no estimate of it."""

    def text(self, arm: str) -> str:
        """Such as 0.812 ± 0.021, the standard error behind the sign."""
        value, stderr = self.value.get(arm), self.stderr.get(arm)
        if value is None:
            return "no number" if arm in self.value else ""
        return f"{value:.3f}" + (f" ± {stderr:.3f}" if stderr is not None else "")


class AERSummary(BaseModel):
    """The Alignment Efficiency Ratio, cold and of this run."""

    cold: float
    this_run: float
    speedup: float
    """1 / cold."""
    reference: Literal["measured", "calibrated"]
    full_seconds: float
    full_spread_seconds: float = 0.0
    stages: dict[str, float]
    """Cold seconds by term: proxy, heads, scores, subset, model."""
    stages_this_run: dict[str, float]
    machines: list[str] = []
    """On which the model was run for any of it."""
    gone: list[str] = []
    """Artifacts that cost something, and are no longer in the store to say how much."""

    @property
    def caveat(self) -> str:
        """What makes the ratio say little; empty if nothing does."""
        said = []
        if len(self.machines) > 1:
            said.append(
                f"The seconds of the AER are of several machines ({'; '.join(self.machines)}): "
                "their ratio says little. A run in a new store is of one."
            )
        if self.gone:
            said.append(
                f"The cold AER is too low: the store no longer has {', '.join(self.gone)}, so that "
                "what it cost is not known. Without --head-map it is made again."
            )
        return " ".join(said)


class RegisteredSummary(BaseModel):
    """The model version that the adapter is in MLflow's registry."""

    name: str
    version: str
    reused: bool
    """An earlier run registered the same adapter."""
    champion: bool
    """Whether it is the champion now."""
    why: str
    """Why it is or is not."""


class Summary(BaseModel):
    """The JSON of ``--summary``; its keys are stable, new ones may come."""

    run_id: str
    name: str
    status: Literal["completed"] = "completed"
    base: str = ""
    """Name of the base model's folder, or its name on the hub."""
    target: str = ""
    hub: list[str] = []
    """What came from the hub, base and datasets, each with its commit: hf://OWNER/NAME@COMMIT."""
    heads: HeadsSummary | None
    """None: neither scorer nor adaptation looks at heads, and none were ranked."""
    selection: SelectionSummary
    rejected: list[RejectedSummary] = []
    trainable: TrainableSummary
    quality: QualitySummary
    harness: list[HarnessLine] = []
    """Tasks of lm-eval, where evaluation.harness asks for some."""
    aer: AERSummary
    stages: list[StageLine]
    reused: list[str]
    artifacts: dict[str, str]
    """Stage (or stage of an arm, such as model_random) -> folder relative to the working folder."""
    mlflow: dict[str, str] = {}
    registered: RegisteredSummary | None = None
    """None where the registry is turned off."""
    command: str = ""
    """Runs it again, from the folder that the run was started in."""
    report: str = ""
    """Path of the report: one HTML file with all of it."""
    seconds: float = 0.0
    """Wall seconds of the whole run."""
    planned: Plan | None = None
    """What `p2d plan` said of such a run, if it was asked."""

    @property
    def planned_seconds(self) -> dict[str, float]:
        """What was planned for each stage that was computed; empty without a plan."""
        stages = self.planned.stages if self.planned is not None else []
        planned = {stage.name: stage.seconds or stage.cold_seconds for stage in stages}
        computed = [line.name for line in self.stages if not line.reused]
        return {name: planned[name] for name in computed if name in planned}

    @property
    def planned_text(self) -> str:
        """Such as 92.6 s for what was computed, it took 100.9 s (109%); empty without a plan."""
        planned = self.planned_seconds
        whole = sum(planned.values())
        took = sum(line.seconds for line in self.stages if line.name in planned)
        if not whole:
            return ""
        return f"{whole:,.1f} s for what was computed, it took {took:,.1f} s ({took / whole:.0%})"

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"
