"""Long work of the core says how much of how much is done."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_core import progress as progress_module
from p2d_core.models import model_hash
from p2d_core.progress import counted
from p2d_core.samples import read as read_module
from p2d_core.samples.read import SourceSpec, content_hash, read_samples
from p2d_core.selection import script as script_module
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import select_subset
from p2d_core.store import recipe

ROWS = [{"prompt": f"What is {n:04d}?", "response": f"It is {n:04d}."} for n in range(100)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """What was told, every 10th item and every kilobyte of a file."""
    monkeypatch.setattr(progress_module, "EVERY", 10)
    monkeypatch.setattr(read_module, "EVERY", 10)
    monkeypatch.setattr(recipe, "CHUNK_BYTES", 1_000_000)
    calls: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        calls.append((done, total))

    tell.calls = calls
    return tell


def write(folder: Path, format: str, rows=ROWS) -> str:
    file = folder / f"rows.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif format == "csv":
        lines = [f"{row['prompt']},{row['response']}\n" for row in rows]
        file.write_text("prompt,response\n" + "".join(lines))
    elif format == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_counted_passes_items_on_and_tells_of_every_tenth_and_the_last(told):
    assert list(counted(range(25), 30, told)) == list(range(25))
    assert told.calls == [(10, 30), (20, 30), (25, 30)]


def test_nothing_is_told_of_nothing(told):
    assert list(counted([], 0, told)) == []
    assert told.calls == []


def test_hashing_tells_of_megabytes(tmp_path: Path, told):
    (tmp_path / "config.json").write_bytes(b" " * 1_000_000)
    (tmp_path / "model.safetensors").write_bytes(b" " * 3_000_000)
    silent = model_hash(tmp_path)
    assert model_hash(tmp_path, told) == silent
    assert told.calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_hashing_a_source_tells_of_all_its_files(tmp_path: Path, told):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b" " * 1_500_000)
    content_hash(SourceSpec("mine", str(tmp_path)), told)
    assert told.calls == [(1, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("format", ["jsonl", "csv", "json", "parquet"])
def test_reading_tells_of_rows_and_how_many_there_will_be(tmp_path, told, monkeypatch, format):
    # a reader may be a chunk ahead of its rows
    monkeypatch.setattr("p2d_core.samples.text_stream.CHUNK_BYTES", 100)
    read = list(read_samples(SourceSpec("mine", write(tmp_path, format)), progress=told))
    assert len(read) == 100
    assert [done for done, _ in told.calls] == list(range(10, 101, 10))
    assert all(total == pytest.approx(100, rel=0.4) for _, total in told.calls)
    assert told.calls[-1] == (100, 100)


def test_a_limit_is_how_many_there_will_be(tmp_path: Path, told):
    source = SourceSpec("mine", write(tmp_path, "jsonl"), skip=10, limit=30)
    list(read_samples(source, progress=told))
    assert told.calls == [(10, 40), (20, 40), (30, 40), (40, 40)]


def test_reading_several_files_goes_on_where_the_one_before_ended(tmp_path: Path, told):
    for name, rows in (("a", ROWS[:50]), ("b", ROWS[50:])):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "jsonl", rows)
    list(read_samples(SourceSpec("mine", f"{tmp_path}/**/*.jsonl"), progress=told))
    assert told.calls[-1] == (100, 100)
    assert [total for _, total in told.calls] == [100] * 10


def test_choosing_a_subset_tells_of_percent(tmp_path: Path, told, monkeypatch):
    monkeypatch.setattr(script_module, "SECONDS_BETWEEN_LOOKS", 0.001)
    n = 200_000
    ids = pa.array([f"{i:064x}" for i in range(n)])
    scores = pa.table(
        {
            "sample_id": ids,
            "source": pa.array(["a"] * n),
            "affinity": pa.array([float(i * 7919 % n) for i in range(n)]),
            "n_tokens": pa.array([9] * n, pa.int32()),
            "n_response_tokens": pa.array([3] * n, pa.int32()),
            "gates_passed": pa.array([0] * n, pa.int32()),
        }
    )
    pq.write_table(scores, tmp_path / "scores.parquet")
    corpus = pa.table({"sample_id": ids, "source": pa.array(["a"] * n)})
    pq.write_table(corpus, tmp_path / "corpus.parquet")
    select_subset(
        tmp_path / "scores.parquet", [tmp_path / "corpus.parquet"], (3,),
        SelectionSpec(fraction=0.1, pool=2.0), tmp_path, told,
    )  # fmt: skip
    percent = [done for done, _ in told.calls]
    assert {total for _, total in told.calls} == {100}
    assert percent == sorted(percent)
    assert 0 <= percent[0] <= percent[-1] <= 100
    assert percent[-1] > 25
