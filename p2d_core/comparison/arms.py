"""An arm of a comparison, what one run of it gave, and the two tables that keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COMPARISON = "comparison.parquet"
SAMPLES = "samples.parquet"
NONE = "-"
"""The ranker of an arm that looks at no heads."""
EVERYTHING = "everything"
"""The scorer of an arm that trains on the whole corpus."""
BASE = "base"
RANDOM = "random"
BASELINES = (RANDOM, "tfidf", "rds-plus")
"""Scorers that the others are held against; they look at no heads."""


@dataclass(frozen=True, slots=True)
class Plugins:
    """What an arm is made of, whatever it is called."""

    scorer: str
    ranker: str
    adaptation: str
    scores_by_heads: bool
    """Does the scorer look at the task heads, or through them?"""
    head_fraction: float | None = None
    """Of all heads that the ranker takes; None where none are looked at, and in earlier tables."""


@dataclass(frozen=True, slots=True, order=True)
class Arm:
    """How the data were chosen and which parameters moved; seeds are runs of one arm."""

    scorer: str
    """Here and below what it is called: its label, or its name."""
    ranker: str
    adaptation: str
    fraction: float
    plugins: Plugins | None = field(default=None, compare=False)
    """None where it is called what it is."""

    @property
    def of(self) -> Plugins:
        """What it is made of."""
        by_heads = self.scorer not in (BASE, EVERYTHING, *BASELINES)
        return self.plugins or Plugins(self.scorer, self.ranker, self.adaptation, by_heads)

    @property
    def label(self) -> str:
        """Such as ``head-filter, frobenius, heads, 10%``."""
        if self.scorer == BASE:
            return BASE
        named = [each for each in (self.scorer, self.ranker, self.adaptation) if each != NONE]
        return ", ".join([*named, f"{100 * self.fraction:.3g}%"])


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One run of an arm: one seed. Numbers are None where the run failed."""

    arm: Arm
    seed: int
    error: str | None = None
    quality: float | None = None
    """The comparison's metric on the target."""
    retention: float | None = None
    """The same metric on the retention samples."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    """The comparison's metric of each evaluation sample, by sample id."""
    also: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Every other metric -> the same of it."""
    selected: int | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    """Chosen samples by label, where the corpus' samples carry one; of a label that is wanted, its
    share of those chosen is the precision, a column of its own."""
    aer: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Cold seconds by term of the AER."""
    full_seconds: float | None = None
    parameters: int | None = None
    """Trainable."""
    peak_memory_bytes: int | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Stage -> key."""

    @property
    def failed(self) -> bool:
        return self.error is not None


_JSON = ("metrics", "labels", "seconds", "artifacts", "plugins")


def write(runs: Sequence[ArmRun], metric: str, higher_is_better: bool, folder: Path) -> None:
    """Writes ``comparison.parquet``, a row an arm and seed, and ``samples.parquet``."""
    rows, samples = [], []
    for run in runs:
        plain = {f.name: getattr(run, f.name) for f in fields(run)}
        of_samples = {metric: plain.pop("values"), **plain.pop("also")}
        plain["precision"] = {name: n / (run.selected or 1) for name, n in run.labels.items()}
        plain |= asdict(plain.pop("arm"))
        plain |= {name: _text(plain[name]) for name in (*_JSON, "precision")}
        rows.append({"label": run.arm.label} | plain)
        samples += [
            {
                "label": run.arm.label, "seed": run.seed, "metric": name, "sample_id": sample_id,
                "value": value,
            }
            for name, values in of_samples.items()
            for sample_id, value in values.items()
        ]  # fmt: skip
    header = {"metric": metric, "higher_is_better": json.dumps(higher_is_better)}
    table = pa.Table.from_pylist(rows, schema=_SCHEMA).replace_schema_metadata(header)
    pq.write_table(table, folder / COMPARISON, compression="zstd")
    pq.write_table(
        pa.Table.from_pylist(samples, schema=_SAMPLES), folder / SAMPLES, compression="zstd"
    )


def read(folder: Path) -> tuple[list[ArmRun], str, bool]:
    """The inverse of `write`: runs, metric, and whether higher is better."""
    table = pq.read_table(folder / COMPARISON)
    header = table.schema.metadata
    metric = header[b"metric"].decode()
    of_samples: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in pq.read_table(folder / SAMPLES).to_pylist():
        # tables of earlier versions have the comparison's metric alone
        of_run = of_samples.setdefault((row["label"], row["seed"]), {})
        of_run.setdefault(row.get("metric", metric), {})[row["sample_id"]] = row["value"]
    runs = []
    for row in table.to_pylist():
        label = row.pop("label")
        # tables of earlier versions have no plugins
        row |= {name: json.loads(row.get(name) or "null") for name in _JSON}
        row.pop("precision", None)  # follows from the labels
        plugins = row.pop("plugins")
        named = {f.name: row.pop(f.name) for f in fields(Arm) if f.name != "plugins"}
        arm = Arm(**named, plugins=Plugins(**plugins) if plugins else None)
        run = ArmRun(arm, **row)
        also = of_samples.get((label, run.seed), {})
        runs.append(replace(run, values=also.pop(metric, {}), also=also))
    return runs, metric, bool(json.loads(header[b"higher_is_better"]))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


_SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("scorer", pa.string()),
        ("ranker", pa.string()),
        ("adaptation", pa.string()),
        ("fraction", pa.float64()),
        ("seed", pa.int64()),
        ("error", pa.string()),
        ("quality", pa.float64()),
        ("retention", pa.float64()),
        ("metrics", pa.string()),
        ("selected", pa.int64()),
        ("labels", pa.string()),
        ("precision", pa.string()),
        ("aer", pa.float64()),
        ("seconds", pa.string()),
        ("full_seconds", pa.float64()),
        ("parameters", pa.int64()),
        ("peak_memory_bytes", pa.int64()),
        ("artifacts", pa.string()),
        ("plugins", pa.string()),
    ]
)
_SAMPLES = pa.schema(
    [
        ("label", pa.string()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("sample_id", pa.string()),
        ("value", pa.float64()),
    ]
)
