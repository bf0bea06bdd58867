import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_core.errors import ArtifactError
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.shards import cut_into_shards, read_shard, shard_hash, write_shards


def sample(text: str, row: int = 0) -> Sample:
    return Sample(sample_id_of(text, "r"), "mine", text, "r", row, '{"a": 1}')


def samples(n: int, prefix: str = "") -> list[Sample]:
    return [sample(f"{prefix}{row}", row) for row in range(n)]


def hashes(of: list[Sample], target_rows: int = 16) -> list[str]:
    return [shard_hash(shard) for shard in cut_into_shards(of, target_rows)]


@given(st.integers(0, 400), st.integers(1, 40))
def test_shards_hold_all_samples_in_order_and_within_bounds(n, target_rows):
    shards = list(cut_into_shards(samples(n), target_rows))
    assert [each for shard in shards for each in shard] == samples(n)
    assert all(len(shard) <= 4 * target_rows for shard in shards)
    assert all(len(shard) >= max(1, target_rows // 4) for shard in shards[:-1])
    assert len(shards) <= 1 or n > target_rows, "a small corpus is not cut"


def test_shards_have_about_the_rows_asked_for():
    n_shards = len(list(cut_into_shards(samples(20_000), 64)))
    assert 20_000 / 64 / 2 < n_shards < 20_000 / 64 * 1.2


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1999), st.sampled_from(["change", "insert", "delete"]), st.integers(0, 99))
def test_one_edit_leaves_nearly_all_shards_alone(place, edit, salt):
    before = samples(2000)
    end = place if edit == "insert" else place + 1
    new = [] if edit == "delete" else [sample(f"new {salt}")]
    after = [*before[:place], *new, *before[end:]]
    changed = set(hashes(after)) - set(hashes(before))
    assert len(changed) <= 4


def test_one_edit_nearly_always_changes_one_shard():
    before = samples(2000)
    kept = set(hashes(before))
    changed = [
        len(set(hashes([*before[:place], sample("new"), *before[place + 1 :]])) - kept)
        for place in range(0, 2000, 50)
    ]
    assert changed.count(1) > 0.8 * len(changed)


def test_the_hash_is_of_the_texts_and_their_order():
    one, two = sample("1", row=0), sample("2", row=1)
    assert shard_hash([one, two]) != shard_hash([two, one])
    assert shard_hash([one]) == shard_hash([sample("1", row=7)])


def test_shards_are_read_as_they_were_written(tmp_path):
    written = write_shards(iter(samples(300, "é")), tmp_path / "shards", target_rows=32)
    read = [read_shard(tmp_path / "shards" / info.file) for info in written]
    assert [each for shard in read for each in shard] == samples(300, "é")
    assert [(info.rows, info.sha) for info in written] == [(len(s), shard_hash(s)) for s in read]
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert names == [info.file for info in written]
    metadata = pq.read_metadata(tmp_path / "shards" / names[0])
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_cut_shard_is_refused(tmp_path):
    (info,) = write_shards(samples(10), tmp_path)
    whole = (tmp_path / info.file).read_bytes()
    (tmp_path / info.file).write_bytes(whole[:-10])
    with pytest.raises(ArtifactError, match=r"shard-000000\.parquet cannot be read as a shard"):
        read_shard(tmp_path / info.file)


def test_a_missing_shard_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot be read as a shard"):
        read_shard(tmp_path / "shard-000000.parquet")


def test_another_table_is_no_shard(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ArtifactError, match=r"its columns are a, due are sample_id, source"):
        read_shard(tmp_path / "a.parquet")
