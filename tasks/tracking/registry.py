"""The adapter as a version of a registered model: its aliases, and why they stand where they do."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from p2d_core.errors import ArtifactError
from p2d_core.evaluation import metrics
from p2d_core.store import ArtifactRef
from tasks.report.markdown import escaped, table
from tasks.report.page import Page
from tasks.summary import QualitySummary, RegisteredSummary

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
MOVED, BY_HAND = "champion_moved", "made champion by hand"
MODEL_ID = "logged_model"
"""Tag of a version: the logged model that holds its files; MLflow's SQL registry does not say."""
LONGEST_NAME = 200
LONGEST_DESCRIPTION = 5000
"""Characters that MLflow's database takes."""
NAMED = ("model", "heads", "subset", "scores", "head_proxy", "rate", "proxy", "samples")
"""Artifacts whose keys are tags of the version: what it needs to be explained and made again."""


@dataclass(frozen=True, slots=True)
class Gate:
    """When a version may become champion."""

    name: str
    """Of the registered model; made from the run's name if empty."""
    margin: float
    """By how much it has to be better than the base, in the metric's unit."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A version's quality, and on what it was measured."""

    metric: str
    value: float
    higher_is_better: bool
    samples: str
    """Hash of the evaluation samples and of how they were judged; empty if not known."""

    def over(self, other: float) -> float:
        """How much better than another value; negative: worse."""
        return self.value - other if self.higher_is_better else other - self.value

    def is_comparable(self, other: Measured) -> bool:
        """Whether both were judged in the same way, on the same samples."""
        return bool(self.samples) and self._how == other._how

    def against(self, other: Measured) -> str:
        """In words what makes the two not comparable."""
        if (self.metric, self.higher_is_better) != (other.metric, other.higher_is_better):
            return f"{self.metric} against {other.metric}"
        return "on other evaluation samples, or in tokens of another base or format"

    @property
    def _how(self) -> tuple[str, bool, str]:
        return self.metric, self.higher_is_better, self.samples

    def as_tags(self) -> dict[str, str]:
        """What a later run reads to compare with."""
        return {
            "metric": self.metric,
            "quality": repr(self.value),
            "higher_is_better": json.dumps(self.higher_is_better),
            "evaluation_samples": self.samples,
        }

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> Measured | None:
        """None where a version was registered by other means."""
        try:
            return cls(
                tags["metric"],
                float(tags["quality"]),
                tags["higher_is_better"] == "true",
                tags["evaluation_samples"],
            )
        except (KeyError, ValueError):
            return None


def model_name(run_name: str) -> str:
    """The run's name as MLflow takes it for a registered model."""
    name = re.sub(r"[^\w .-]", "-", run_name).strip(" .")[:LONGEST_NAME]
    return name or "p2d"


def judge(
    new: Measured, base: float, margin: float, champion: Measured | None, version: str
) -> tuple[bool, str]:
    """Whether a version becomes champion, and why.

    Args:
        champion: the present one's quality; None if that is not known.
        version: of the present champion; empty if there is none.
    """
    gained = new.over(base)
    if gained <= 0:
        return False, f"not better than the base model ({gained:+.4g})"
    if gained < margin:
        return False, f"better than the base model by only {gained:.4g}; {margin:.4g} are asked for"
    over_base = f"better than the base model by {gained:.4g}"
    if not version:
        return True, f"{over_base}, and there was no champion"
    if champion is None:
        return False, f"{over_base}, but of the champion, version {version}, no quality is known"
    if not new.is_comparable(champion):
        return False, (
            f"{over_base}, but it cannot be compared with the champion, version {version}: "
            f"{new.against(champion)}"
        )
    difference = new.over(champion.value)
    if difference < 0:
        return False, (
            f"{over_base}, but worse than the champion, version {version}, by {-difference:.4g}"
        )
    return True, f"{over_base}, and not worse than version {version} ({difference:+.4g})"


def measured(quality: QualitySummary, evaluation: ArtifactRef | None) -> Measured:
    """P2D's quality, with the identity of the samples that it was measured on."""
    samples = samples_hash(evaluation) if evaluation is not None else ""
    return Measured(quality.metric, quality.p2d, quality.higher_is_better, samples)


def samples_hash(evaluation: ArtifactRef) -> str:
    """Hex; the same for the same samples judged in the same way, in whatever order.

    A loss is of tokens: that of another base, or of texts cut otherwise, is no better or worse.
    """
    try:
        how = dict(evaluation.manifest.settings)
        ids = pq.read_table(evaluation.path / "samples.parquet", columns=["sample_id"])
    except (ArtifactError, OSError):
        return ""
    if "evaluation" in how:
        # further metrics do not change how it was judged
        how["evaluation"] = {k: v for k, v in how["evaluation"].items() if k != "also"}
        if metrics.get(how["evaluation"]["metric"]).counts_tokens:
            how["base"] = evaluation.manifest.inputs.get("base")
    text = json.dumps([how, sorted(ids["sample_id"].to_pylist())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find_version(client: MlflowClient, name: str, model_key: str) -> ModelVersion | None:
    """The version that was registered of the same adapter."""
    query = f"name = '{name}' and tags.`key.model` = '{model_key}'"
    found = client.search_model_versions(query, max_results=1)
    return found[0] if found else None


def register(
    client: MlflowClient,
    page: Page,
    refs: Mapping[str, ArtifactRef],
    gate: Gate,
    run_id: str,
    model_id: str,
    known: ModelVersion | None,
) -> RegisteredSummary:
    """Registers the adapter if it is not yet, and moves the aliases.

    ``challenger`` is always the version of the last run; ``champion`` moves if `judge` says so.

    Args:
        model_id: of the logged model that holds the adapter.
        known: the version of the same adapter, which is then used again.
    """
    summary = page.summary
    name = gate.name or model_name(summary.name)
    _make_model(client, name, summary.target)
    new = measured(summary.quality, refs.get("evaluation_p2d_target"))
    champion = _champion(client, name)
    present = str(champion.version) if champion is not None else ""
    is_champion = known is not None and present == str(known.version)
    held = champion.tags if champion is not None else {}
    before = Measured.of_tags(held)
    if is_champion:
        moves, why = True, held["champion_why"] if held.get(MOVED) == "true" else BY_HAND
        if before is not None and not new.is_comparable(before):
            # later versions are held against what it became champion by
            client.set_registered_model_alias(name, CHALLENGER, present)
            why = f"{why}; this run measured otherwise ({new.against(before)}), which leaves it so"
            return RegisteredSummary(
                name=name, version=present, reused=True, champion=True, why=why
            )
    else:
        base = summary.quality.base
        moves, why = judge(new, base, gate.margin, before, present)
    tags = new.as_tags() | {
        "quality_base": repr(summary.quality.base),
        MOVED: json.dumps(moves and why != BY_HAND),
        "champion_why": why,
        "base_model": summary.base,
        "target": summary.target,
        "p2d.run_id": summary.run_id,
        MODEL_ID: model_id,
    }
    tags |= {f"key.{each}": refs[each].key for each in NAMED if each in refs}
    text = description(page, refs, moves, why)
    if known is None:
        # models:/<id> as source is looked up on MLflow's global server, which may be another one
        source = client.get_logged_model(model_id).artifact_location
        version = client.create_model_version(
            name, source, run_id=run_id, tags=tags, description=text, model_id=model_id
        ).version
    else:
        version = known.version
        for key, value in tags.items():
            if known.tags.get(key) != value:
                client.set_model_version_tag(name, version, key, value)
        client.update_model_version(name, version, text)
    client.set_registered_model_alias(name, CHALLENGER, version)
    if moves and not is_champion:
        client.set_registered_model_alias(name, CHAMPION, version)
    return RegisteredSummary(
        name=name, version=str(version), reused=known is not None, champion=moves, why=why
    )


def description(page: Page, refs: Mapping[str, ArtifactRef], is_champion: bool, why: str) -> str:
    """What the version's page says: which data and heads made it, and what of the champion."""
    summary = page.summary
    aliased = "Became champion" if is_champion else "Did not become champion"
    lines = [
        f"**{escaped(summary.base)} adapted to {escaped(summary.target)}**: "
        f"{escaped(page.quality_text)}, AER {escaped(page.aer_text)}.",
        "",
        f"**{aliased}**: {escaped(why)}.",
        "",
        f"**Heads**: {escaped(page.heads_text)}. **Data**: {escaped(page.data_text)}.",
        *table(
            ["source", ">chosen", ">in the corpus"],
            ([escaped(cell) for cell in row[:3]] for row in page.sources),
        ),
        "A PEFT adapter (safetensors and JSON) for the base model; it holds no other weights. "
        f"Run {escaped(summary.run_id)}.",
        *table(
            ["artifact", "key"],
            ([escaped(each), f"`{refs[each].key}`"] for each in NAMED if each in refs),
        ),
    ]
    text = "\n".join(lines)
    return text if len(text) <= LONGEST_DESCRIPTION else text[: LONGEST_DESCRIPTION - 2] + "…\n"


def _make_model(client: MlflowClient, name: str, target: str) -> None:
    from mlflow.exceptions import MlflowException

    if client.search_registered_models(f"name = '{name}'", max_results=1):
        return
    try:
        client.create_registered_model(name, description=f"Adapters for {target}, by P2D.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
