"""Which head map is in use."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2d_core.errors import ArtifactError
from p2d_core.store.in_use import FILE, InUse, head_map_in_use, keys_in_use, put_in_use

BASE = "b" * 64


def test_each_base_and_target_has_its_own(tmp_path):
    put_in_use(tmp_path, BASE, "math", InUse("k1", "2026-01-01", "first", 1))
    put_in_use(tmp_path, BASE, "code", InUse("k2", "2026-01-02", "first", 1))
    put_in_use(tmp_path, "c" * 64, "math", InUse("k3", "2026-01-03", "first", 1))
    put_in_use(tmp_path, BASE, "math", InUse("k4", "2026-01-04", "k1 had drifted", 2))
    assert head_map_in_use(tmp_path, BASE, "math") == InUse("k4", "2026-01-04", "k1 had drifted", 2)
    assert head_map_in_use(tmp_path, BASE, "law") is None
    assert keys_in_use(tmp_path) == {"k2", "k3", "k4"}


def test_none_is_in_use_in_a_new_store(tmp_path):
    assert keys_in_use(tmp_path) == set()


def test_many_at_once_lose_nothing(tmp_path):
    def put(i: int) -> None:
        put_in_use(tmp_path, BASE, f"target {i}", InUse(f"k{i}", "2026-01-01", "first"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(40)))
    assert keys_in_use(tmp_path) == {f"k{i}" for i in range(40)}


def test_a_note_of_an_earlier_version_is_read_and_gets_its_hash(tmp_path):
    old = {"b" * 16 + " math": {"key": "k1", "since": "2026-01-01", "why": "first", "refreshes": 1}}
    (tmp_path / FILE).write_text(json.dumps(old))
    assert keys_in_use(tmp_path) == {"k1"}
    put_in_use(tmp_path, BASE, "code", InUse("k2", "2026-01-02", "first", 1))
    assert "sha256" in json.loads((tmp_path / FILE).read_text())
    assert keys_in_use(tmp_path) == {"k1", "k2"}


def test_a_changed_bit_anywhere_is_seen(tmp_path):
    put_in_use(tmp_path, BASE, "math", InUse("k1", "2026-01-01", "first", 1))
    whole = (tmp_path / FILE).read_bytes()
    for place in range(len(whole) - 1):  # but for the line end behind it
        (tmp_path / FILE).write_bytes(
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        )
        try:
            assert keys_in_use(tmp_path) == {"k1"}
            assert whole[place] in b" \n"
        except ArtifactError:
            pass


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"key": "k"}}', "{"])
def test_a_file_that_says_nothing_is_named_with_the_cure(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ArtifactError, match=r"heads_in_use\.json .* Delete it"):
        keys_in_use(tmp_path)
