"""Tables as they are written: smaller than by default, the same for every reader."""

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_core.parquet import parquet_options

N, WIDTH = 500, 96


@pytest.fixture
def table() -> pa.Table:
    """As measurements and scores are."""
    rng = np.random.default_rng(0)
    values = pa.array(rng.normal(size=N * WIDTH).astype(np.float32))
    return pa.table({
        "sample_id": [rng.bytes(32).hex() for _ in range(N)],
        "source": ["gsm8k", "code"] * (N // 2),
        "affinity": rng.normal(size=N),
        "head_outputs": pa.FixedSizeListArray.from_arrays(values, WIDTH),
    })  # fmt: skip


def test_vectors_take_less_than_their_bytes_and_nothing_is_kept_twice(table, tmp_path):
    pq.write_table(table, tmp_path / "ours.parquet", **parquet_options(table.schema))
    pq.write_table(table, tmp_path / "default.parquet", compression="zstd")
    size = (tmp_path / "ours.parquet").stat().st_size
    assert size < 0.9 * table.nbytes
    assert size < 0.8 * (tmp_path / "default.parquet").stat().st_size
    group = pq.read_metadata(tmp_path / "ours.parquet").row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    assert [each.path_in_schema for each in columns if each.has_dictionary_page] == ["source"]


def test_every_reader_finds_the_same(table, tmp_path):
    file = tmp_path / "table.parquet"
    pq.write_table(table, file, **parquet_options(table.schema))
    assert pq.read_table(file).equals(table)
    read = duckdb.from_parquet(str(file)).arrow().read_all()
    for name in table.column_names:
        assert read[name].to_pylist() == table[name].to_pylist()
