"""A head map of an earlier run in place of a proxy run."""

import json
import shutil
from pathlib import Path

import pytest

from p2d_core.errors import ArtifactError, HeadMapError
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tests.flows.adapt.seen import computed


def test_a_given_head_map_skips_proxy_and_ranking(job):
    given = job.run(head_map=job.first.artifacts["heads"])
    assert computed(given) == []
    assert given.heads.ids == job.first.heads.ids
    other = job.run(head_map=job.first.artifacts["heads"], heads={"ranker": "ablation"})
    assert other.heads.ranker == "frobenius"
    assert given.selection.notes == job.first.selection.notes
    assert other.selection.notes[-1] == (
        "heads.* of the settings was not looked at: the head map that was given is by frobenius, "
        "with heads.fraction 0.1"
    )
    wide = job.run(head_map=job.first.artifacts["heads"], heads={"fraction": 0.5})
    assert wide.selection.notes == other.selection.notes


def test_a_given_head_map_still_has_its_price(job):
    given = job.run(head_map=job.first.artifacts["heads"])
    assert given.aer.cold == pytest.approx(job.first.aer.cold)


def test_a_head_map_whose_proxy_run_is_gone_says_that_the_aer_lacks_it(job, tmp_path):
    proxy = Path(job.first.artifacts["proxy"])
    shutil.move(proxy, tmp_path / "proxy")
    try:
        given = job.run(head_map=job.first.artifacts["heads"])
    finally:
        shutil.move(tmp_path / "proxy", proxy)
    assert given.aer.stages["proxy"] == 0
    assert f"no longer has proxy/{proxy.name[:12]}" in given.aer.caveat
    assert job.first.aer.caveat == ""


def test_a_damaged_head_map_is_not_used(job):
    copy = job.store / "heads"
    ref = next(Store(job.store).refs("heads"))
    file = ref.path / "heads.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(HeadMapError, match="is damaged and was set aside"):
        job.run(head_map=ref.key)
    (aside,) = copy.glob(f"{ref.key}.damaged-*")
    (aside / "heads.parquet").write_bytes(whole)
    aside.rename(ref.path)


def test_a_head_map_that_is_not_there_is_refused(job):
    with pytest.raises(ArtifactError, match="there is no heads artifact 'abc123'"):
        job.run(head_map="abc123")


def test_a_head_map_of_another_base_is_refused(job, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(BASE_FOLDER, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 99}))
    with pytest.raises(HeadMapError, match="made for another base model"):
        job.run(head_map=job.first.artifacts["heads"], base=str(other))
