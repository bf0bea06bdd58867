"""Whether the head map in use still holds, on a small target."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.adapt import run_adapt
from flows.refresh import run_refresh
from flows.rerun import rerun_from_head_map
from flows.settings import load_settings
from p2d_core.errors import DataError, HeadMapError
from p2d_core.heads.draws import mean_of_draws
from p2d_core.heads.head_map import HEADS, HeadMap, read_head_map
from p2d_core.store import ArtifactRef, Making, Recipe, Store
from p2d_core.store.in_use import InUse, head_map_in_use, put_in_use
from p2d_core.synthetic.world import write_world
from tasks.heads import head_map_in
from tests.flows.test_cli_heads import p2d, write_settings

__all__ = ["p2d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refresh")
    write_world(folder, seed=5)
    write_settings(folder)
    return folder


@pytest.fixture(scope="module")
def store(folder) -> Path:
    return folder / "artifacts"


@pytest.fixture(scope="module")
def first(folder, store):
    return run_refresh(load_settings(folder / "my.yaml"), store=store)


def base_of_all(store: Path) -> str:
    return next(iter(Store(store).refs("heads"))).manifest.inputs["base"]["sha256"]


def upside_down(store: Store, key: str) -> ArtifactRef:
    """A head map whose best heads are the other's worst, by the same ranker for all it says."""
    good = store.resolve(key, stage="heads")
    manifest = good.manifest
    recipe = Recipe(
        stage="heads",
        version=manifest.version,
        settings=dict(manifest.settings),
        inputs=dict(manifest.inputs) | {"proxy": "another"},
    )

    def build(making: Making) -> None:
        scores = -read_head_map(good.path / "heads.parquet").scores
        pq.write_table(HeadMap.from_scores(scores, 4, 0.1).to_table(), making.folder / HEADS)
        making.facts |= dict(manifest.facts)

    return store.produce(recipe, build, run_id="by hand")


def test_the_first_look_puts_a_map_to_use(first, store):
    assert first.drift is None
    assert first.number == 1
    assert first.in_use in {ref.key for ref in Store(store).refs("heads")}
    assert first.sentence == f"No head map was in use for target: {first.in_use[:12]} is now."


def test_a_run_that_asks_for_the_map_in_use_ranks_nothing(folder, store, first):
    done = run_adapt(load_settings(folder / "my.yaml"), store=store, head_map="in-use")
    assert Path(done.artifacts["heads"]).name == first.in_use
    assert {"proxy", "heads"} <= set(done.reused)


def test_a_map_that_holds_stays_and_each_look_draws_anew(folder, store, first, p2d):
    code, said, _ = p2d("heads", "refresh", "my.yaml", "--draws", "2", "--margin", "0.5")
    assert code == 0
    assert said.startswith("The head map holds: ")
    assert said.rstrip().endswith(f"{first.in_use[:12]} stays in use.")
    before = len(list(Store(store).refs("heads")))
    again = run_refresh(load_settings(folder / "my.yaml"), store=store, margin=0.5)
    assert (again.number, again.in_use) == (3, first.in_use)
    assert len(list(Store(store).refs("heads"))) == before + 2
    json.dumps(again.as_json())


def test_a_map_that_drifted_gives_way_to_the_mean_of_todays_draws(folder, first):
    store = folder / "artifacts"
    base = base_of_all(store)
    worst = upside_down(Store(store), first.in_use)
    put_in_use(store, base, "target", InUse(worst.key, "2026-01-01", "by hand", 7))

    before = {ref.key for ref in Store(store).refs("heads")}
    done = run_refresh(load_settings(folder / "my.yaml"), store=store, margin=0.1)
    assert done.drift is not None
    assert done.drift.has_drifted
    assert done.sentence.endswith("the mean of today's draws, takes its place.")
    made = [ref for ref in Store(store).refs("heads") if ref.key not in before]
    (mean,) = (ref for ref in made if ref.key == done.in_use)
    draws = [read_head_map(ref.path / "heads.parquet").scores for ref in made if ref != mean]
    found = read_head_map(mean.path / "heads.parquet").scores
    assert found.equal(mean_of_draws(draws)) or found.equal(mean_of_draws(draws[::-1]))
    now = head_map_in_use(store, base, "target")
    assert now is not None
    assert (now.key, now.refreshes) == (mean.key, 8)
    assert "had drifted" in now.why


def test_a_map_of_another_ranker_gives_way_without_a_word_of_drift(folder):
    """The settings were changed; nothing is known of the target."""
    settings = write_settings(folder).read_text()
    (folder / "taylor.yaml").write_text(settings.replace("frobenius", "taylor"))
    store = folder / "artifacts"
    before = head_map_in_use(store, base_of_all(store), "target")
    done = run_refresh(load_settings(folder / "taylor.yaml"), store=store)
    assert (done.drift, done.before, done.number) == (None, before.key, 9)
    assert f"was ranked by {done.ranker_before}, as the settings no longer say" in done.sentence
    assert done.ranker_before.startswith("frobenius")
    now = head_map_in_use(store, base_of_all(store), "target")
    (ref,) = (ref for ref in Store(store).refs("heads") if ref.key == now.key)
    assert ref.manifest.facts["ranker"] == "taylor"


def test_a_map_of_fewer_heads_gives_way_without_a_word_of_drift(folder):
    """Of 4 and 13 heads no more than 4 can be the same, however well the rankings agree."""
    store = folder / "artifacts"
    settings = load_settings(folder / "taylor.yaml")
    wide = settings.heads.model_copy(update={"fraction": 0.4})
    done = run_refresh(settings.model_copy(update={"heads": wide}), store=store)
    assert (done.drift, done.number) == (None, 10)
    assert done.ranker_before.endswith(", 10% of the heads")
    assert len(head_map_in(Store(store).find("heads", done.in_use)).task_heads) == 13


def test_mlflow_has_the_series_over_time(store, first):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("p2d").experiment_id
    (run,) = client.search_runs([experiment], "tags.`p2d.drift` != ''")
    assert run.info.run_name == "head map drift: target"
    history = client.get_metric_history(run.info.run_id, "drift/spearman")
    assert [point.step for point in history] == [2, 3, 8]  # the last two have none to tell of
    assert all(-1 <= point.value <= 1 for point in history)
    replaced = client.get_metric_history(run.info.run_id, "drift/replaced")
    assert [(point.step, point.value) for point in replaced] == [
        (1, 0), (2, 0), (3, 0), (8, 1), (9, 0), (10, 0),
    ]  # fmt: skip
    assert "was ranked by taylor" in run.data.tags["mlflow.note.content"]


def test_a_target_without_samples_to_draw_anew_is_refused_before_anything_starts(tmp_path):
    write_world(tmp_path, seed=5)
    settings = load_settings(write_settings(tmp_path, limit=30))
    with pytest.raises(DataError, match="no other proxy set can be drawn"):
        run_refresh(settings, store=tmp_path / "artifacts")
    assert not (tmp_path / "artifacts" / "samples").exists()


def test_a_rerun_with_the_map_in_use_where_none_is_ranks_nothing(folder, tmp_path):
    """Its promise is to rank nothing: it does not begin in place of `adapt`."""
    settings = load_settings(folder / "my.yaml")
    with pytest.raises(HeadMapError, match=r"no head map is in use for target\. Run refresh-head"):
        rerun_from_head_map.fn("in-use", store=str(tmp_path), settings=settings)
    assert not (tmp_path / "proxy").exists()
