"""Base models of the hub, over its stand-in on loopback."""

import json
import os
import shutil
from pathlib import Path

import pytest

from p2d_core.errors import ModelError, SettingsError, StorageError
from p2d_core.hub import HubName, in_one_line, without_tokens
from p2d_core.models import check_model_folder, download_model, hub_model_at_commit, model_hash
from p2d_core.synthetic.world import BASE_FOLDER
from tests.hub import GUEST, TOKEN, Repo, go_offline

BASE = "hf://me/tiny"
BESIDE = {
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"raise SystemExit",
    "README.md": b"---\nlicense: mit\n---\n",
    "onnx/model.safetensors": b"of another runtime",
    "chat_template.jinja": b"{{ messages[0]['content'] }}",
}


@pytest.fixture
def repo(hub) -> Repo:
    files = {file.name: file.read_bytes() for file in BASE_FOLDER.iterdir() if file.is_file()}
    return hub.add("models/me/tiny", files | BESIDE)


def downloaded(base: str = BASE) -> Path:
    return download_model(hub_model_at_commit(base))


def test_a_name_has_a_revision_and_only_a_commit_pins_it():
    sha = "0123456789" * 4
    name = HubName.of_model(f"hf://me/tiny@{sha}")
    assert (name.repo, name.revision, str(name)) == ("me/tiny", sha, f"hf://me/tiny@{sha}")
    assert name.is_pinned
    branch = HubName.of_model("hf://me/tiny@refs/pr/1")
    assert (branch.repo, branch.revision, branch.is_pinned) == ("me/tiny", "refs/pr/1", False)


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("hf://tiny", "must be 'namespace/name'"),
        ("hf://datasets/me/tiny", "is a dataset"),
        ("hf://me/tiny/config.json", "names a file"),
        ("hf://me/tiny@", "evision"),
    ],
)
def test_what_is_no_name_of_a_model_is_refused(base, why):
    with pytest.raises(SettingsError, match=f"base '{base}' is .*{why}.*hf://OWNER/NAME@COMMIT"):
        hub_model_at_commit(base)


def test_a_branch_or_tag_is_the_commit_that_it_is_today(repo):
    first = repo.refs["v1"] = repo.refs["main"]
    assert str(hub_model_at_commit(BASE)) == f"{BASE}@{first}"
    second = repo.commit(repo.files | {"config.json": b"{}"})
    assert str(hub_model_at_commit(BASE)) == f"{BASE}@{second}"
    assert str(hub_model_at_commit(f"{BASE}@v1")) == f"{BASE}@{first}"


def test_weights_config_tokenizer_and_card_are_downloaded_and_no_code_or_pickle(hub, repo):
    told = []
    folder = download_model(hub_model_at_commit(BASE), lambda done, of: told.append((done, of)))
    of_base = {file.name for file in BASE_FOLDER.iterdir()} - {"base.sha256"}
    assert {file.name for file in folder.iterdir()} == hub.downloads()
    assert hub.downloads() == of_base | {"README.md", "chat_template.jinja"}
    size = (BASE_FOLDER / "model.safetensors").stat().st_size // 10**6
    assert told[-1] == (size, size)
    check_model_folder(folder)


def test_a_copy_in_a_folder_has_the_same_hash(repo, tmp_path):
    for name, data in repo.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    shutil.copytree(BASE_FOLDER, tmp_path / "other")
    assert model_hash(downloaded()) == model_hash(tmp_path / "copy")
    # the chat template is in it
    assert model_hash(downloaded()) != model_hash(tmp_path / "other")


def test_what_is_in_the_cache_is_not_asked_for_again(hub, repo):
    pinned = f"{BASE}@{repo.refs['main']}"
    folder = downloaded(pinned)
    hub.asked.clear()
    assert downloaded(pinned) == folder
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"model_type": "llama", "auto_map": {"AutoModel": "evil.M"}}, "auto_map"),
        ("adapter_config.json", {"base_model_name_or_path": "x/y"}, "is an adapter"),
    ],
)
def test_a_config_that_is_refused_costs_no_download_of_weights(hub, repo, name, content, said):
    repo.commit(repo.files | {name: json.dumps(content).encode()})
    with pytest.raises(ModelError, match=rf"^hf://me/tiny@\w+: .*{said}"):
        downloaded()
    assert "model.safetensors" not in hub.downloads()


def test_a_repository_with_pickled_weights_alone_is_refused(repo):
    repo.commit({name: data for name, data in repo.files.items() if name != "model.safetensors"})
    with pytest.raises(ModelError, match=r"no safetensors weights, and pickled.*save_pretrained"):
        downloaded()


def test_a_cache_without_room_is_said_before_the_weights_are_fetched(hub, repo, monkeypatch):
    monkeypatch.setattr("p2d_core.models.hub.free_bytes", lambda folder: 10**6)
    with pytest.raises(
        StorageError, match=r"weights take 2.\d MB, but .* 1.0 MB free.*HF_HUB_CACH"
    ):
        downloaded()
    assert "model.safetensors" not in hub.downloads()


# -- who may, and what is there ----------------------------------------------------------------


def test_a_private_model_is_had_with_the_token_of_the_environment_or_of_the_login(
    hub, repo, monkeypatch, tmp_path
):
    repo.private = True
    with pytest.raises(ModelError, match=r"no such model at .*, or it is private.*no token is set"):
        downloaded()
    monkeypatch.setenv("HF_TOKEN", GUEST)
    with pytest.raises(ModelError, match=r"or it is private.*the token sent was that of HF_TOKEN"):
        downloaded()
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf/token").write_text(TOKEN)
    check_model_folder(downloaded())
    (tmp_path / "hf/token").unlink()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_model_folder(downloaded())


def test_a_gated_model_says_where_to_ask(hub, repo, monkeypatch):
    repo.gated = True
    cure = rf"Ask for access at {hub.url}/me/tiny, and set HF_TOKEN"
    for token, words in ((None, "no token is set"), (GUEST, "that of HF_TOKEN")):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ModelError, match=rf"is gated.*{cure}.*{words}"):
            downloaded()


def test_a_missing_model_or_revision_says_what_to_mend(hub, repo):
    with pytest.raises(ModelError, match=r"hf://me/no: there is no such model at .*Mend the name"):
        downloaded("hf://me/no")
    for revision in ("v9", "0" * 40):
        with pytest.raises(ModelError, match=rf"there is no revision '{revision}'. Give a branch"):
            downloaded(f"{BASE}@{revision}")


def test_offline_the_cache_is_used_and_the_hub_not_asked(hub, repo, monkeypatch):
    folder = downloaded()
    go_offline(hub, monkeypatch)
    assert downloaded() == folder
    cure = r"Unset it; or run `hf download me/other` where there is a network"
    with pytest.raises(ModelError, match=rf"is not in the cache .*HF_HUB_OFFLINE is set.*{cure}"):
        downloaded("hf://me/other")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="or not whole, and HF_HUB_OFFLINE is set"):
        downloaded()
    assert hub.asked == []


def test_a_hub_that_is_away_or_out_of_order_is_named(hub, repo, monkeypatch):
    hub.fails_with = 503
    with pytest.raises(
        ModelError, match=r"cannot be opened: .*503.*Check the network and HF_ENDPOI"
    ):
        downloaded()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://who:secret@127.0.0.1:9")
    with pytest.raises(ModelError, match=r"cannot be opened: Connect.*\(http://127.0.0.1:9\)"):
        downloaded()


def test_no_message_holds_a_token(hub, monkeypatch, tmp_path):
    """HTTP libraries show a header that they refuse to send."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text(f"{GUEST}\n")
    error = ValueError(f"Illegal header value b'Bearer {TOKEN}\\x01', not {GUEST}")
    assert in_one_line(error) == "ValueError: Illegal header value b'Bearer ***', not ***."
    assert (
        without_tokens("Authorization: bearer of_a_kind_not_known") == "Authorization: bearer ***"
    )
    assert os.environ["HF_TOKEN"] == TOKEN
