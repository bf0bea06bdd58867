"""The same adapter is registered once; champion moves only to what is better and comparable."""

import fcntl
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mlflow import MlflowClient

from p2d_core.store import ArtifactRef, Store
from tasks.record import record, record_run
from tasks.summary import Summary
from tasks.tracking import registry
from tasks.tracking.database import mlflow_uri, prepare_tracking
from tasks.tracking.registry import (
    LONGEST_DESCRIPTION,
    Gate,
    Measured,
    judge,
    model_name,
    samples_hash,
)
from tests.small_store import fill, put, summary

GATE = Gate("sums", 0.1)


def exact_match(value: float, samples: str = "same") -> Measured:
    return Measured("exact_match", value, True, samples)


def loss(value: float) -> Measured:
    return Measured("loss", value, False, "same")


@pytest.mark.parametrize(
    ("new", "base", "champion", "moves", "why"),
    [
        (exact_match(0.75), 0.05, None, True, "by 0.7, and there was no champion"),
        (exact_match(0.05), 0.05, None, False, "not better than the base model (+0)"),
        (exact_match(0.10), 0.05, None, False, "by only 0.05; 0.1 are asked for"),
        (exact_match(0.75), 0.05, exact_match(0.70), True, "not worse than version 4 (+0.05)"),
        (exact_match(0.75), 0.05, exact_match(0.75), True, "not worse than version 4 (+0)"),
        (exact_match(0.70), 0.05, exact_match(0.75), False, "worse than the champion, version 4"),
        (exact_match(0.75), 0.05, exact_match(0.10, "other"), False, "other evaluation samples"),
        (exact_match(0.75, ""), 0.05, exact_match(0.1, ""), False, "other evaluation samples"),
        (exact_match(0.75), 0.05, loss(0.10), False, "exact_match against loss"),
        (loss(0.5), 1.0, loss(0.6), True, "not worse than version 4 (+0.1)"),
        (loss(0.7), 1.0, loss(0.6), False, "worse than the champion, version 4, by 0.1"),
        (loss(1.2), 1.0, None, False, "not better than the base model (-0.2)"),
    ],
)
def test_the_gate(new, base, champion, moves, why):
    version = "4" if champion is not None else ""
    assert judge(new, base, 0.1, champion, version)[0] == moves
    assert why in judge(new, base, 0.1, champion, version)[1]


def test_a_champion_of_which_no_quality_is_known_stays():
    moves, why = judge(exact_match(0.75), 0.05, 0.1, None, "2")
    assert (moves, "of the champion, version 2, no quality is known" in why) == (False, True)


def test_a_margin_of_nothing_still_asks_for_something_better():
    assert not judge(exact_match(0.05), 0.05, 0.0, None, "")[0]
    assert judge(exact_match(0.06), 0.05, 0.0, None, "")[0]


@pytest.mark.parametrize(
    ("run", "name"),
    [("my run", "my run"), ("a/b:c'd", "a-b-c-d"), ("..", "p2d"), ("Ωmega", "Ωmega")],
)
def test_a_run_name_becomes_a_model_name_that_mlflow_takes(run, name):
    assert model_name(run) == name


class Runs:
    """Recorded runs over one store; each may have its own adapter and evaluation samples."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "artifacts")
        prepare_tracking(self.store.root)
        self.refs = fill(self.store)
        self.client = MlflowClient(mlflow_uri(self.store.root))

    def evaluation(self, *ids: str, model: str = "m", **settings: Any) -> ArtifactRef:
        table = pa.table({"sample_id": list(ids), "exact_match": [1.0] * len(ids)})
        inputs = {"model": model}
        return put(self.store, "evaluation", {"samples.parquet": table}, inputs=inputs, **settings)

    def run(
        self, quality: float, adapter: str, ids: str = "abc", gate: Gate | None = GATE
    ) -> Summary:
        files = {
            "adapter/adapter_config.json": "{}",
            "adapter/adapter_model.safetensors": adapter,
        }
        model = put(self.store, "model", files, inputs={"subset": adapter})
        refs = self.refs | {
            "model": model,
            "evaluation_p2d_target": self.evaluation(*ids, model=f"{adapter} on {ids}"),
        }
        done = summary(refs, f"run-{adapter}", quality__p2d=quality)
        record_run(done, {}, store=self.store.root, refs=refs, gate=GATE)
        return done

    def alias(self, name: str) -> str:
        return str(self.client.get_model_version_by_alias("sums", name).version)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One: champion. Two: worse. Three: better, on other samples. One again."""
    runs = Runs(tmp_path_factory.mktemp("registry"))
    runs.first = runs.run(0.75, "one")
    runs.worse = runs.run(0.60, "two")
    runs.elsewhere = runs.run(0.99, "three", ids="xyz")
    runs.again = runs.run(0.75, "one")
    return runs


def test_the_first_that_is_better_than_the_base_is_champion(runs):
    done = runs.first.registered
    assert (done.name, done.version, done.reused, done.champion) == ("sums", "1", False, True)
    assert runs.alias("champion") == "1"


def test_a_worse_one_and_one_that_cannot_be_compared_leave_the_champion(runs):
    assert "worse than the champion, version 1, by 0.15" in runs.worse.registered.why
    assert "other evaluation samples" in runs.elsewhere.registered.why
    assert not runs.worse.registered.champion
    assert not runs.elsewhere.registered.champion


def test_the_same_adapter_is_the_same_version_and_its_files_are_not_copied_again(runs):
    again = runs.again.registered
    assert (again.version, again.reused, again.champion) == ("1", True, True)
    assert again.why == runs.first.registered.why
    versions = runs.client.search_model_versions("name = 'sums'")
    assert {str(version.version) for version in versions} == {"1", "2", "3"}
    folders = list((runs.store.root / "mlflow/artifacts/models").iterdir())
    assert len(folders) == 3


def test_the_challenger_is_the_version_of_the_last_run(runs):
    assert runs.alias("challenger") == "1"


def test_the_version_says_what_made_it_and_what_of_the_champion(runs):
    version = runs.client.get_model_version("sums", "2")
    for stage in ("heads", "subset", "scores", "proxy", "samples"):
        assert version.tags[f"key.{stage}"] == runs.refs[stage].key
        assert runs.refs[stage].key in version.description
    assert version.tags["key.model"] != runs.refs["model"].key
    assert (version.tags["base_model"], version.tags["metric"]) == ("tiny", "exact_match")
    assert "**Did not become champion**: better than the base model by 0.55" in version.description
    assert "1 of 4" in version.description
    assert "| talk" in version.description


def test_its_files_are_the_adapter_alone(runs):
    version = runs.client.get_model_version("sums", "2")
    logged = runs.client.get_logged_model(version.tags["logged_model"])
    folder = Path(logged.artifact_location.removeprefix("file://"))
    assert {file.name for file in folder.rglob("*") if file.is_file()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert version.source == logged.artifact_location


def test_versions_are_judged_one_after_the_other(tmp_path, monkeypatch):
    """Two runs at once would both find no champion, and one adapter would become two versions."""
    runs, found = Runs(tmp_path), []
    find = registry.find_version

    def while_found(*given):
        lock = (runs.store.root / ".locks/registry").open("w")
        with lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append(find(*given))
        return found[-1]

    monkeypatch.setattr(registry, "find_version", while_found)
    runs.run(0.75, "one")
    assert found == [None]
    with (runs.store.root / ".locks/registry").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


def test_a_champion_made_by_hand_stays_and_is_said_to_be_so(tmp_path):
    runs = Runs(tmp_path)
    runs.run(0.75, "one")
    runs.run(0.60, "two")
    runs.client.set_registered_model_alias("sums", "champion", "2")
    again = runs.run(0.60, "two").registered
    assert (again.champion, again.why) == (True, "made champion by hand")
    better = runs.run(0.75, "one").registered
    assert (better.champion, runs.alias("champion")) == (True, "1")


def test_a_champion_measured_otherwise_stays_what_it_became_champion_by(tmp_path):
    """Else a look with another metric would block every later version."""
    runs = Runs(tmp_path)
    runs.run(0.75, "one")
    before = runs.client.get_model_version("sums", "1")
    again = runs.run(0.10, "one", ids="xyz").registered
    assert (again.champion, again.version, again.reused) == (True, "1", True)
    assert "this run measured otherwise (on other evaluation samples," in again.why
    after = runs.client.get_model_version("sums", "1")
    assert (after.tags, after.description) == (before.tags, before.description)
    better = runs.run(0.80, "two").registered
    assert better.champion
    assert better.why.endswith("not worse than version 1 (+0.05)")


def test_the_setting_turns_it_off_names_it_and_sets_the_margin(tmp_path):
    runs = Runs(tmp_path)
    tracking = {"experiment": "p2d", "uri": None, "tags": {}}

    def recorded(**registry: Any) -> Summary:
        settings = {"tracking": tracking, "registry": registry}
        return record.fn(summary(runs.refs), settings, store=str(runs.store.root))

    assert recorded(enabled=False, name="", margin=0.0).registered is None
    assert runs.client.search_registered_models() == []
    strict = recorded(enabled=True, name="other", margin=0.9).registered
    assert (strict.name, strict.champion) == ("other", False)
    assert "0.9 are asked for" in strict.why
    assert recorded(enabled=True, name="", margin=0.1).registered.name == "sums"


def test_evaluations_are_the_same_if_samples_and_judging_are(tmp_path):
    runs = Runs(tmp_path)
    one = runs.evaluation("a", "b", model="one")
    assert samples_hash(one) == samples_hash(runs.evaluation("b", "a", model="two"))
    assert samples_hash(one) != samples_hash(runs.evaluation("a", "c", model="three"))
    assert samples_hash(one) != samples_hash(runs.evaluation("a", "b", metric="loss"))


@pytest.mark.parametrize(("metric", "matters"), [("loss", True), ("exact_match", False)])
def test_a_loss_in_tokens_of_another_base_or_format_cannot_be_compared(tmp_path, metric, matters):
    runs = Runs(tmp_path)
    table = pa.table({"sample_id": ["a"]})
    hashes = {
        samples_hash(
            put(
                runs.store, "evaluation", {"samples.parquet": table},
                inputs={"base": {"sha256": "b", "max_tokens": n}}, evaluation={"metric": metric},
            )
        )
        for n in (12, 1024)
    }  # fmt: skip
    assert len(hashes) == 1 + matters


def test_a_description_fits_into_mlflows_database(runs, tmp_path):
    many = {f"source number {n} with a long name": 3 for n in range(500)}
    refs = runs.refs
    done = summary(
        refs, selection__by_source=many, selection__corpus_by_source=many, base="x" * 3000
    )
    record_run(done, {}, store=runs.store.root, refs=refs, gate=Gate("long", 0.1))
    text = runs.client.get_model_version("long", "1").description
    assert len(text) <= LONGEST_DESCRIPTION
