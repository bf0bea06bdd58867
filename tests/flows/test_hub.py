"""A run whose base and target are private on the hub, and its model pushed there; bad input."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from peft import PeftConfig

from flows.inputs import check_inputs
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tasks.stage import BaseModel, TextFormat
from tasks.summary import Summary
from tests.flows.test_cli_export import code_of, front_and_body
from tests.hub import GUEST, TOKEN, Hub, go_offline, serving, use
from tests.job import Job, quick_job


@dataclass
class World:
    """The hub, a run over it, and all that was logged meanwhile, debugging too."""

    hub: Hub
    job: Job
    summary: Summary
    logged: list[str]

    @property
    def base(self) -> str:
        return f"hf://me/tiny@{self.hub.repos['models/me/tiny'].refs['main']}"

    @property
    def target(self) -> str:
        return f"hf://datasets/me/target@{self.hub.repos['datasets/me/target'].refs['main']}"


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hub")
    kept = _Kept()
    with pytest.MonkeyPatch.context() as patch, serving() as hub:
        use(hub, patch, folder / "hf")
        patch.setenv("HF_TOKEN", TOKEN)
        job = quick_job(folder / "job")
        files = {each.name: each.read_bytes() for each in BASE_FOLDER.iterdir() if each.is_file()}
        hub.add("models/me/tiny", files | {"README.md": b"---\nlicense: mit\n---\n"}, private=True)
        rows = (job.folder / "target.jsonl").read_bytes()
        hub.add("datasets/me/target", {"train.jsonl": rows}, private=True)
        (job.folder / "target.jsonl").unlink()
        job.values["base"] = "hf://me/tiny"
        job.values["target"] = {"path": "hf://datasets/me/target", "name": "target"}
        root = logging.getLogger()
        level = root.level
        root.addHandler(kept)
        root.setLevel(logging.DEBUG)
        try:
            summary = job.run()
        finally:
            root.setLevel(level)
            root.removeHandler(kept)
        yield World(hub, job, summary, kept.lines)


@pytest.fixture
def p2d(world, monkeypatch, command, tmp_path):
    """Runs a command in a folder of its own over the store; gives its exit code and its words."""
    monkeypatch.setenv("P2D_STORE", str(world.job.store))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return command


# -- in ----------------------------------------------------------------------------------------


def test_what_was_taken_is_recorded_with_its_commit_and_the_warning_says_how_to_pin_it(world):
    summary, store = world.summary, Store(world.job.store)
    assert (summary.base, summary.hub) == ("me/tiny", [world.target, world.base])
    settings = yaml.safe_load((store.root / f"runs/{summary.run_id}.yaml").read_text())
    assert settings["base"] == world.base
    assert settings["target"]["revision"] == world.target.rpartition("@")[2]
    (model,) = store.refs("model")
    assert model.manifest.facts["base"] == world.base
    commit = settings["target"]["revision"]
    assert any(
        ref.manifest.inputs.get("source", {}).get("revision") == commit
        for ref in store.refs("samples")
    )
    report = (store.root / f"reports/{summary.run_id}.html").read_text()
    assert world.base in report
    warned = [line for line in world.logged if "is not pinned" in line]
    assert f"`base: {world.base}`" in warned[0]
    assert f"`revision: {commit}`" in warned[1]


def test_the_hub_saw_the_token_and_nothing_that_is_kept_or_logged_has_it(world):
    assert {header for *_, header in world.hub.asked} == {f"Bearer {TOKEN}"}
    places = [world.job.folder, Path(os.environ["PREFECT_HOME"]), world.job.folder.parent / "hf"]
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    assert any(file.name == "mlflow.db" for file in files)
    assert any(file.name == "prefect.db" for file in files)
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []
    assert any("me/tiny" in line for line in world.logged)
    assert [line for line in world.logged if TOKEN in line] == []


def test_a_copy_in_a_folder_has_the_keys_of_the_hubs_model(world):
    inputs = check_inputs(world.job.settings(target={"limit": 40}))
    text = TextFormat(inputs.base.separator, inputs.base.max_tokens)
    copy = BaseModel.of(BASE_FOLDER, inputs.base.precision, text)
    assert inputs.base.hub == world.base
    assert inputs.base.folder != copy.folder
    assert inputs.base.identity == copy.identity


def test_a_commit_in_the_settings_is_not_warned_of_and_nothing_is_asked_twice(
    world, caplog, monkeypatch
):
    from flows.hub import pinned

    commit = world.target.rpartition("@")[2]
    settings = world.job.settings(base=world.base, target={"revision": commit})
    world.hub.asked.clear()
    assert pinned(settings) == settings
    assert world.hub.asked == []
    assert "not pinned" not in caplog.text


def job_with(world: World, folder: Path, **changes: object) -> Path:
    file = folder / "my.yaml"
    values = world.job.settings(**changes).model_dump(mode="json")
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "hf://me/no"}, "hf://me/no: there is no such model at"),
        ({"base": "hf://me/tiny@v9"}, "hf://me/tiny@v9: there is no revision 'v9'"),
        ({"base": "hf://tiny"}, "base 'hf://tiny' is no model of the hub"),
        ({"target": {"path": "hf://datasets/me/no"}}, "there is no such dataset at"),
        ({"target": {"revision": "v9"}}, "hf://datasets/me/target@v9: there is no revision"),
        ({"target": {"split": "dev"}}, "Bad split: dev."),
    ],
)
def test_what_the_hub_does_not_give_is_refused_and_nothing_started(
    world, p2d, tmp_path, changes, said
):
    file = job_with(world, tmp_path, **changes)
    code, _, err = p2d("adapt", str(file), "--store", str(tmp_path / "new"))
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    made = (tmp_path / "new").rglob("*")
    assert [each for each in made if each.is_file()] == []


def test_another_person_is_refused_and_offline_the_cache_will_do(world, p2d, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GUEST)
    code, _, err = p2d("adapt", str(job_with(world, tmp_path)), "--store", str(tmp_path / "new"))
    assert code == 2
    assert "or it is private" in err
    assert GUEST not in err
    go_offline(world.hub, monkeypatch)
    code, _, err = p2d("adapt", str(job_with(world, tmp_path)), "--store", str(tmp_path / "new"))
    assert code == 2  # the base is there; of a streamed dataset no copy is kept
    assert "hf download --repo-type dataset me/target" in err
    assert world.hub.asked == []


# -- out ---------------------------------------------------------------------------------------


def test_a_push_is_private_and_names_base_and_commit_as_others_find_them(world, p2d, tmp_path):
    run = world.summary.run_id
    code, out, err = p2d("export", run, "--as", "lora", "--to", "out", "--push", "me/adapter")
    assert code == 0, err
    repo = world.hub.repos["models/me/adapter"]
    assert repo.private
    assert f"Pushed to {world.hub.url}/me/adapter/commit/{repo.refs['main']}, which only" in out
    local = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {k: v for k, v in repo.files.items() if k != ".gitattributes"} == local
    commit = world.base.rpartition("@")[2]
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.revision) == ("me/tiny", commit)
    card = local["README.md"].decode()
    front, body = front_and_body(card)
    assert (front["base_model"], front["license"]) == ("me/tiny", "mit")
    assert f'from_pretrained("me/tiny", revision="{commit}", dtype' in code_of(card)
    assert f"me/tiny at commit `{commit}`" in body
    assert f"`{world.target}`" in body
    for data in local.values():
        assert TOKEN.encode() not in data
        assert str(world.job.folder).encode() not in data
    assert TOKEN not in out + err


def test_a_second_push_is_one_more_commit_that_is_the_new_folder_alone(world, p2d, tmp_path):
    run, name = world.summary.run_id, "me/twice"
    assert p2d("export", run, "--as", "delta", "--to", "one", "--push", name, "--public")[0] == 0
    repo = world.hub.repos[f"models/{name}"]
    assert not repo.private
    about = json.loads(repo.files["delta.json"])
    assert (about["base"], f"hf://me/tiny@{about['base_revision']}") == ("me/tiny", world.base)
    code, out, _ = p2d("export", run, "--as", "merged", "--to", "two", "--push", name)
    assert code == 2  # public by now
    code, out, err = p2d("export", run, "--as", "merged", "--to", "two", "--push", name, "--public")
    assert code == 0, err
    assert "which everybody may read" in out
    names = {file.name for file in (tmp_path / "two").iterdir()} | {".gitattributes"}
    assert set(repo.files) == names
    assert "model.safetensors" in names
    assert "delta.json" not in names
    assert len(repo.commits) == 3
    assert str(world.job.folder.parent).encode() not in b"".join(repo.files.values())


@pytest.mark.parametrize(
    ("words", "token", "said"),
    [
        (["--push", "me/new"], None, "no token is set. Set HF_TOKEN to one that may write"),
        (["--push", "me/new"], "hf_expired", "Invalid user token. The token from HF_TOKEN"),
        (["--push", "new"], TOKEN, "--push 'new' is no name of a model on the hub"),
        (["--push", "me/open"], TOKEN, "it is there already and public"),
        (["--public"], TOKEN, "--public says who may read what is pushed"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_written(
    world, p2d, tmp_path, monkeypatch, words, token, said
):
    world.hub.add("models/me/open", {"README.md": b""})
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = p2d("export", world.summary.run_id, "--as", "lora", "--to", "out", *words)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert "hf_expired" not in err
    assert os.listdir(tmp_path) == []
    assert "models/me/new" not in world.hub.repos


def test_offline_nothing_is_pushed(world, p2d, tmp_path, monkeypatch):
    go_offline(world.hub, monkeypatch)
    run = world.summary.run_id
    code, _, err = p2d("export", run, "--as", "lora", "--to", "out", "--push", "me/new")
    assert code == 2
    assert "HF_HUB_OFFLINE is set. Unset it, or leave --push out and upload" in err
    assert p2d("export", run, "--as", "lora", "--to", "out")[0] == 0
    assert world.hub.asked == []


def test_a_push_that_the_hub_refuses_leaves_the_folder_and_says_how_to_go_on(world, p2d, tmp_path):
    run = world.summary.run_id
    code, out, err = p2d("export", run, "--as", "delta", "--to", "out", "--push", "them/theirs")
    assert code == 1
    assert "Wrote out" in out
    assert "out is written, but was not pushed to them/theirs: the hub at" in err
    assert "You don't have the rights to create a model under them" in err
    assert "Then: hf upload them/theirs out --private" in err
    assert (tmp_path / "out/README.md").is_file()


def test_a_base_that_is_a_folder_has_to_be_named_for_those_who_take_it_from_the_hub(
    world, p2d, tmp_path
):
    store = tmp_path / "store"
    kept = ("mlflow", "prefect")
    shutil.copytree(world.job.store, store, ignore=shutil.ignore_patterns(*kept))
    settings = store / f"runs/{world.summary.run_id}.yaml"
    settings.write_text(settings.read_text().replace(world.base, str(BASE_FOLDER)))
    words = ["export", world.summary.run_id, "--as", "lora", "--store", str(store)]
    code, _, err = p2d(*words, "--to", "out", "--push", "me/other")
    assert code == 2
    assert "which nobody finds from a hub. Say with --base-name OWNER/NAME" in err
    code, _, err = p2d(*words, "--to", "out", "--push", "me/other", "--base-name", "you/base")
    assert code == 0, err
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.revision) == ("you/base", None)


# -- doctor ------------------------------------------------------------------------------------


def test_doctor_says_whether_there_is_a_token_which_hub_and_whether_offline(
    world, p2d, monkeypatch
):
    out = p2d("doctor", "--model", "hf://me/tiny")[1]
    assert "hf://me/tiny (LlamaForCausalLM)" in out
    assert "query heads" in out
    world.hub.asked.clear()
    out = p2d("doctor")[1]
    assert "there is one (HF_TOKEN)" in out
    assert TOKEN not in out
    assert f"{world.hub.url} (HF_ENDPOINT)" in out
    assert "HF_HUB_OFFLINE" not in out
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    go_offline(world.hub, monkeypatch)
    out = p2d("doctor")[1]
    assert "none: public models and datasets only" in out
    assert "HF_HUB_OFFLINE is set: only what is in its cache is used" in out
    assert "HF_ENDPOINT" not in out
    assert world.hub.asked == []
