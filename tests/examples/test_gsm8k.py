"""The GSM8K example on the real files, at a small size; skipped where they are not."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.adapt import run_adapt
from flows.settings import load_settings

REPOSITORY = Path(__file__).parent.parent.parent
DATA = REPOSITORY.parent / "shared/data"
NEEDED = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "codealpaca.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    missing = [name for name in NEEDED if not (DATA / name).exists()]
    if missing:
        pytest.skip(f"the example's data is not there: {', '.join(missing)} in ../shared/data")
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    script = REPOSITORY / "examples/tiny_base.py"
    subprocess.run(
        [sys.executable, str(script), "--data", str(DATA), "--out", str(folder), "--steps", "3"],
        check=True, timeout=200, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    return folder


def test_the_example_runs_on_the_files_as_they_are(base, tmp_path):
    settings = load_settings(REPOSITORY / "examples/gsm8k.yaml")
    small = settings.model_copy(
        update={
            "base": str(base),
            "threads": 1,
            "target": settings.target.model_copy(update={"limit": 90}),
            "corpus": settings.corpus.model_copy(
                update={"sources": (settings.corpus.sources[0].model_copy(update={"limit": 60}),)}
            ),
            "evaluation": settings.evaluation.model_copy(
                update={"source": settings.evaluation.source.model_copy(update={"limit": 10})}
            ),
            "proxy": settings.proxy.model_copy(update={"samples": 20, "held_out": 10, "epochs": 1}),
            "heads": settings.heads.model_copy(update={"proxy_epochs": 1}),
            "training": settings.training.model_copy(update={"epochs": 1}),
            "arms": settings.arms.model_copy(update={"calibration_steps": 4}),
        }
    )
    summary = run_adapt(small, store=tmp_path)
    # 90 of GSM8K less 30 for proxy and held-out set, and 60 of CodeAlpaca
    assert summary.selection.corpus_by_source == {"codealpaca": 60, "gsm8k": 60}
    assert summary.selection.selected == 12
    assert summary.aer.reference == "calibrated"
    assert summary.aer.full_spread_seconds > 0
    subset = pq.read_table(Path(summary.artifacts["subset"]) / "subset.parquet").to_pylist()
    math = next(row for row in subset if row["source"] == "gsm8k")
    assert "####" in math["response"]


def test_the_example_at_full_size_refuses_no_row(base):
    from flows.inputs import check_inputs

    settings = load_settings(REPOSITORY / "examples/gsm8k.yaml")
    inputs = check_inputs(settings.model_copy(update={"base": str(base)}))
    assert [source.spec.name for source in inputs.corpus] == ["codealpaca"]
