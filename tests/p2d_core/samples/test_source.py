import hashlib

import pytest

from p2d_core.errors import DataError
from p2d_core.samples.source import SourceSpec, content_hash


def hash_of(path, **settings):
    return content_hash(SourceSpec("mine", str(path), **settings))


def test_the_hash_of_one_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"abc")
    assert hash_of(tmp_path / "a.jsonl") == hashlib.sha256(b"abc").hexdigest()


def test_the_hash_does_not_depend_on_where_the_files_are(tmp_path):
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "a.jsonl").write_text("1")
        (folder / "b.jsonl").write_text("2")
    assert hash_of(tmp_path / "here") == hash_of(tmp_path / "there" / "*.jsonl")
    (tmp_path / "there" / "b.jsonl").write_text("3")
    assert hash_of(tmp_path / "here") != hash_of(tmp_path / "there")


def test_where_one_file_ends_counts(tmp_path):
    for folder, first, second in (("x", "ab", "c"), ("y", "a", "bc")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.csv").write_text(first)
        (tmp_path / folder / "2.csv").write_text(second)
    assert hash_of(tmp_path / "x") != hash_of(tmp_path / "y")


def test_a_missing_file_has_no_hash(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*a\.jsonl"):
        hash_of(tmp_path / "a.jsonl")


def test_a_hub_dataset_at_a_commit_is_hashed_without_a_network():
    path = "hf://datasets/owner/name"
    at = hash_of(path, revision="0" * 40)
    assert at == hash_of(path, revision="0" * 40)
    assert at != hash_of(path, revision="1" * 40)
    assert at != hash_of(path, revision="0" * 40, split="test")
