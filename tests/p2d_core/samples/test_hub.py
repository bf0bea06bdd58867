import json

import datasets
import pytest

from p2d_core.errors import DataError, TransientError
from p2d_core.samples.read import SourceSpec, content_hash, read_samples
from p2d_core.samples.source import HUB_PREFIX


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def dataset(tmp_path, monkeypatch, offline):
    """A dataset folder as on the hub; `datasets` takes a folder in place of a name."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"question": f"q{n}", "answer": f"a{n}", "level": n} for n in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return HUB_PREFIX + str(folder)


def test_a_hub_dataset_is_streamed_as_samples(dataset):
    samples = list(read_samples(SourceSpec("hub", dataset, skip=1, limit=2)))
    assert [(s.prompt, s.response, s.row, s.extra) for s in samples] == [
        ("q1", "a1", 1, '{"level": 1}'),
        ("q2", "a2", 2, '{"level": 2}'),
    ]
    assert len(list(read_samples(SourceSpec("hub", dataset, split="test")))) == 1


def test_an_unknown_split_is_refused(dataset):
    with pytest.raises(
        DataError, match=r"cannot be opened: .*Check the network, the name and `spl"
    ):
        list(read_samples(SourceSpec("hub", dataset, split="dev")))


def test_without_a_network_the_way_out_is_told(offline):
    source = SourceSpec("hub", "hf://datasets/openai/gsm8k", config="main")
    for use in (lambda: list(read_samples(source)), lambda: content_hash(source)):
        with pytest.raises(
            DataError,
            match=r"hf://datasets/openai/gsm8k cannot be opened: .*download it where there is a "
            r"network \(hf download --repo-type dataset openai/gsm8k ",
        ):
            use()


def test_a_stop_on_the_way_may_pass_by_itself(dataset, monkeypatch):
    def interrupted(*args, **kwargs):
        yield {"question": "q", "answer": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", interrupted)
    samples = read_samples(SourceSpec("hub", dataset))
    assert next(samples).prompt == "q"
    with pytest.raises(
        TransientError, match=r"stopped after row 1: ConnectionError: reset by peer"
    ):
        next(samples)
