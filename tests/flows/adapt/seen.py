"""What a run computed and measured, as its summary and the store have it."""

from p2d_core.store import Store
from tasks.summary import Summary
from tests.job import Job

MADE_FROM_SCRATCH = [
    "samples", "proxy", "heads", "measurements", "scores", "head_proxy",
    "subset", "model", "reference", "evaluation",
]  # fmt: skip
SUM = {"parts": {"head-activation": 1.0, "loss-shift": 0.5, "bm25": 0.5}}


def computed(summary: Summary) -> list[str]:
    return [line.name for line in summary.stages if not line.reused]


def measured_now(job: Job, summary: Summary) -> int:
    refs = Store(job.store).refs("measurements")
    return sum(ref.manifest.run_id == summary.run_id for ref in refs)


def samples_measured(job: Job, summary: Summary) -> int:
    manifests = [ref.manifest for ref in Store(job.store).refs("measurements")]
    return sum(m.cost["samples"] for m in manifests if m.run_id == summary.run_id)
