import json
from dataclasses import replace

import datasets
import pytest

from p2d_core.errors import DataError, TransientError
from p2d_core.samples.read import SourceSpec, content_hash, read_samples
from tests.hub import GUEST, TOKEN, go_offline

ROWS = [{"question": f"q{n}", "answer": f"a{n}", "level": n} for n in range(4)]
FILES = {
    "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "test.jsonl": json.dumps(ROWS[0]).encode(),
    "README.md": b"# Questions\n",
}
SOURCE = SourceSpec("qa", "hf://datasets/me/qa")
USES = (lambda source: list(read_samples(source)), content_hash)


@pytest.fixture
def repo(hub):
    return hub.add("datasets/me/qa", FILES)


def test_a_hub_dataset_is_streamed_as_samples(repo):
    samples = list(read_samples(replace(SOURCE, skip=1, limit=2)))
    assert [(s.prompt, s.response, s.row, s.extra) for s in samples] == [
        ("q1", "a1", 1, '{"level": 1}'),
        ("q2", "a2", 2, '{"level": 2}'),
    ]
    assert len(list(read_samples(replace(SOURCE, split="test")))) == 1


def test_a_commit_stays_what_it_was_and_a_branch_moves(repo):
    first, before = repo.refs["main"], content_hash(SOURCE)
    repo.commit(FILES | {"train.jsonl": FILES["test.jsonl"]})
    assert content_hash(replace(SOURCE, revision=first)) == before != content_hash(SOURCE)
    assert len(list(read_samples(replace(SOURCE, revision=first)))) == 4
    assert len(list(read_samples(SOURCE))) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"split": "dev"},
            r"Bad split: dev.* and `split:`, `config:`, `revision:`; or download it",
        ),
        (
            {"config": "main"},
            r"'main' not found.*hf download --repo-type dataset me/qa --local-dir",
        ),
        ({"revision": "v9"}, r"me/qa@v9: there is no revision 'v9'. Give a branch, tag or commit"),
        ({"path": "hf://datasets/me/no"}, "no such dataset at .*, or it is private.*HF_TOKEN"),
        ({"path": "hf://datasets/me/qa@v1"}, "names a revision. Give hf://datasets/me/qa .* `revi"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_with_the_cure(repo, change, said):
    with pytest.raises(DataError, match=rf"^source 'qa': {'.*'}{said}"):
        list(read_samples(replace(SOURCE, **change)))


def test_a_private_dataset_is_read_with_the_token_of_the_environment(hub, repo, monkeypatch):
    repo.private = True
    for use in USES:
        with pytest.raises(DataError, match=r"or it is private.*\(no token is set\)"):
            use(SOURCE)
    monkeypatch.setenv("HF_TOKEN", GUEST)
    for use in USES:
        with pytest.raises(DataError, match=r"or it is private.*sent was that of HF_TOKEN"):
            use(SOURCE)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(list(read_samples(SOURCE))) == 4
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    for use in USES:
        with pytest.raises(DataError, match=r"refuses: Invalid credentials.*that of HF_TOKEN"):
            use(SOURCE)


def test_a_gated_dataset_says_where_to_ask(hub, repo, monkeypatch):
    repo.gated = True
    with pytest.raises(DataError, match=rf"is gated.*Ask for access at {hub.url}/datasets/me/qa"):
        list(read_samples(SOURCE))
    monkeypatch.setenv("HF_TOKEN", GUEST)
    with pytest.raises(DataError, match=r"is gated.*\(the token sent was that of HF_TOKEN\)"):
        list(read_samples(SOURCE))


def test_offline_the_copy_in_the_cache_is_read_and_the_hub_not_asked(hub, repo, monkeypatch):
    from huggingface_hub import snapshot_download

    streamed, sha = list(read_samples(SOURCE)), content_hash(SOURCE)
    with monkeypatch.context() as patch:
        go_offline(hub, patch)
        # streaming has left the commit and the card in the cache, not the rows
        assert content_hash(SOURCE) == sha
        cure = r"Unset it; or run `hf download --repo-type dataset me/qa` where there is a network"
        with pytest.raises(DataError, match=rf"not in the cache .*HF_HUB_OFFLINE is set.*{cure}"):
            list(read_samples(SOURCE))
        assert hub.asked == []
    snapshot_download("me/qa", repo_type="dataset")
    go_offline(hub, monkeypatch)
    assert list(read_samples(SOURCE)) == streamed
    assert hub.asked == []


def test_without_a_network_the_way_out_is_told(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    cure = r"download it where there is a network \(hf download --repo-type dataset me/qa "
    with pytest.raises(DataError, match=rf"hf://datasets/me/qa cannot be opened: Conn.*{cure}"):
        content_hash(SOURCE)


def test_a_stop_on_the_way_may_pass_by_itself(repo, monkeypatch):
    def interrupted(*args, **kwargs):
        yield {"question": "q", "answer": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", interrupted)
    samples = read_samples(SOURCE)
    assert next(samples).prompt == "q"
    with pytest.raises(
        TransientError, match=r"stopped after row 1: ConnectionError: reset by peer"
    ):
        next(samples)
