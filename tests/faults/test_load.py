"""A million samples on two cores in 2 GB: the whole command, from files to the recorded report."""

import json
from pathlib import Path

import pytest

from tests.faults.load import FIGURES, MOST_MEGABYTES, adapt, write_job

MODELS_MOST = 100_000
"""Samples that a test runs a model on: a million take ten minutes on two cores."""
CASES = [
    (scorer, n_samples)
    for n_samples in (10_000, 100_000, 1_000_000)
    for scorer in ("tfidf", "length", "head-activation")
    if scorer != "head-activation" or n_samples <= MODELS_MOST
]


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("scorer", "n_samples"), CASES)
def test_a_large_corpus_goes_through_in_bounded_memory(scorer, n_samples, tmp_path: Path):
    done = adapt(tmp_path, write_job(tmp_path, n_samples, scorer), timeout=3000)
    assert done.summary["selection"]["corpus"] == n_samples
    assert done.summary["selection"]["selected"] == n_samples // 10
    assert done.summary["mlflow"]["run_id"]
    assert done.peak_megabytes + done.server_megabytes <= MOST_MEGABYTES
    if scorer != "head-activation":
        shards = len(list((tmp_path / "store/measurements").iterdir()))
        assert done.tasks("measurements") == 1 < shards
    note(scorer, n_samples, done.seconds, done.peak_megabytes, done.server_megabytes)


def note(scorer: str, n_samples: int, seconds: float, peak: float, server: float) -> None:
    """What `docs/guarantees.md` shows."""
    known = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    known[f"{scorer} {n_samples}"] = {
        "scorer": scorer,
        "samples": n_samples,
        "seconds": round(seconds),
        "peak_megabytes": round(peak),
        "server_megabytes": round(server),
    }
    FIGURES.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
