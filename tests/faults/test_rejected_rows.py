"""Rows that are no samples: up to so many are left out, each kept with its reason, and counted."""

import io
import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flows.cli.screen import show_summary
from flows.inputs import check_inputs
from flows.settings import load_settings
from p2d_core.errors import DataError
from p2d_core.samples.read import read_samples
from p2d_core.samples.rejected import RejectedRows
from p2d_core.samples.source import SourceSpec
from p2d_core.store import Store
from p2d_core.store.bounded_query import bounded_query
from tasks.samples import read_source, refuse_too_many_rejected
from tasks.stage import Runtime, SourceInput
from tasks.summary import Summary
from tasks.tracking.database import mlflow_uri
from tests.demo_run import command
from tests.faults.bad import Job
from tests.faults.small_job import SmallJob
from tests.faults.test_hostile_input import lines_of
from tests.job import quick_job


@pytest.mark.faults
def test_up_to_n_bad_rows_are_set_aside_with_their_reasons(tmp_path, monkeypatch, capfd):
    job = quick_job(tmp_path)
    pool = job.folder / "corpus/ledgers.jsonl"
    lines = pool.read_text().splitlines()
    lines[3] = '{"prompt": "cut'
    lines[7] = json.dumps({"prompt": "a", "response": 5})
    pool.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"ledgers.jsonl, line 4: broken JSON"):
        job.run()
    with pytest.raises(DataError, match=r"(?s)more than 1 rows .*line 4: .*line 8: .*response"):
        job.run(skip_bad_rows=1)
    assert not job.store.exists()
    done = job.run(skip_bad_rows=2)
    (left_out,) = done.rejected
    assert (left_out.source, left_out.rows) == ("ledgers", 2)
    rows = pq.read_table(Path.cwd() / left_out.file).to_pylist()
    assert [row["row"] for row in rows] == [3, 7]
    assert rows[0]["place"] == f"{pool}, line 4"
    assert "broken JSON at column" in rows[0]["reason"]
    assert "column 'response' holds a number (5)" in rows[1]["reason"]
    report = job.store / "reports" / f"{done.run_id}.html"
    assert "2 rows of ledgers left out" in report.read_text()
    with bounded_query(Store(job.store), "SELECT count(*) FROM rejected") as found:
        assert found.read_all().column(0).to_pylist() == [2]
    kept = json.loads((job.store / f"runs/{done.run_id}.json").read_text())
    assert kept["rejected"][0]["rows"] == 2
    assert metrics_of(job.store, done)["samples/rejected"] == 2
    console = Console(width=100, record=True, file=io.StringIO())
    show_summary(done, None, console)
    assert "2 rows of ledgers are no samples; why, in" in console.export_text()
    again = job.run(skip_bad_rows=40)
    assert all(line.reused for line in again.stages)
    assert again.rejected == done.rejected


@pytest.mark.faults
def test_the_option_leaves_rows_out_as_the_setting_does(tmp_path):
    job = SmallJob(tmp_path)
    pool = tmp_path / "corpus/ledgers.jsonl"
    pool.write_text(pool.read_text() + '{"prompt": "cut')
    done = command(tmp_path, "adapt", "run.yaml", "--skip-bad-rows", "1")
    assert done.code == 0, done.errors
    assert "1 rows of ledgers are no samples; why, in" in done.shown
    assert command(job.folder, "adapt", "run.yaml").code == 2


def metrics_of(store: Path, done: Summary) -> dict[str, float]:
    from mlflow import MlflowClient

    return MlflowClient(mlflow_uri(store)).get_run(done.mlflow["run_id"]).data.metrics


def test_what_an_earlier_run_left_out_counts_under_a_smaller_limit_too(tmp_path):
    """A file of which only the beginning is checked before the start, and the rest when read."""
    sources = []
    store = Store(tmp_path / "artifacts")
    for number in range(2):
        file = tmp_path / f"{number}.jsonl"
        file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
        runtime = Runtime(str(store.root), "run", skip_bad_rows=1)
        source = SourceInput.of(SourceSpec(str(number), str(file)))
        sources.append(read_source.fn(runtime, source))
    refuse_too_many_rejected(sources, 2)
    with pytest.raises(DataError, match=r"(?s)more than 1 rows.*0.jsonl, line 2.*1.jsonl, line 2"):
        refuse_too_many_rejected(sources, 1)


def test_a_source_of_bad_rows_alone_is_refused_however_many_may_be_left_out(tmp_path):
    job = Job(tmp_path)
    job.values["skip_bad_rows"] = 1000
    job.write("test.jsonl", '{"prompt": "a"}\n' * 5)
    with pytest.raises(DataError, match=r"none of the 5 rows read of .*test.jsonl is a sample"):
        check_inputs(load_settings(job.save()))


def test_a_first_row_that_is_bad_does_not_hide_the_columns_of_the_others(tmp_path):
    job = Job(tmp_path)
    job.values["skip_bad_rows"] = 1
    job.write("pool.jsonl", '{"x": 1}\n' + lines_of(job.rows["pool"]))
    check_inputs(load_settings(job.save()))


@given(
    st.lists(st.sampled_from(["good", "{", "7", '{"prompt": "a"}', "null"]), min_size=1),
    st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_a_sample_or_rejected(rows: list[str], most: int):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.jsonl"
        good = '{"prompt": "p", "response": "r"}'
        file.write_text("".join((good if row == "good" else row) + "\n" for row in [*rows, "good"]))
        rejected = RejectedRows(most)
        bad = [i for i, row in enumerate(rows) if row != "good"]
        read = read_samples(SourceSpec("x", str(file)), on_bad_row=rejected)
        if len(bad) > most:
            with pytest.raises(DataError):
                list(read)
            return
        assert [sample.row for sample in read] == [
            i for i, row in enumerate([*rows, "good"]) if row == "good"
        ]
        assert [row.row for row in rejected.rows] == bad
