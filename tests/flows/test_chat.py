"""A corpus of conversations for an instruct model, from files to an adapted model."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from flows.inputs import check_inputs
from flows.settings import parse_settings
from p2d_core.errors import DataError
from p2d_core.models import load_tokenizer
from p2d_core.samples.conversation import turns_of
from p2d_core.samples.schema import Sample, from_table
from p2d_core.samples.source import SourceSpec
from p2d_core.samples.tokens import Encoder, TextFormat
from p2d_core.store import Store
from tasks.samples import read_source, refuse_unforeseen_chats
from tasks.stage import Runtime, SourceInput
from tests.chat_base import save_chat_base
from tests.conftest import Command

CHAT = TextFormat(max_tokens=256, template="chat")


def question(i: int) -> str:
    return f"Is {i} a number?"


def sharegpt(i: int) -> dict:
    return {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": question(i)},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": f"And {i + 1}?"},
            {"from": "gpt", "value": "yes"},
        ],
    }


def openai(i: int) -> dict:
    return {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": question(i)}]},
            {"role": "assistant", "content": "yes"},
        ]
    }


def texts(i: int) -> dict:
    return {"prompt": question(i), "response": "no"}


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class ChatJob:
    """Files of every shape, and settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "artifacts"
        # the end of a turn is not the end of sequence: what is generated has to stop at the former
        save_chat_base(folder / "base", eos="<|endoftext|>")
        write(folder / "target.jsonl", [sharegpt(i) for i in range(24)])
        write(folder / "chats.jsonl", [openai(i) for i in range(100, 116)])
        write(folder / "texts.jsonl", [texts(i) for i in range(200, 216)])
        write(folder / "test.jsonl", [sharegpt(i) for i in range(300, 304)])
        self.values = {
            "name": "chat",
            "base": "base",
            "target": {"path": "target.jsonl"},
            "corpus": {"sources": [{"path": "chats.jsonl"}, {"path": "texts.jsonl"}]},
            "evaluation": {"source": {"path": "test.jsonl"}, "metric": "exact_match"},
            "format": {"max_tokens": 256},
            "proxy": {"samples": 8, "held_out": 6, "epochs": 1},
            "heads": {"ranker": "frobenius", "proxy_epochs": 1},
            "selection": {"fraction": 0.5},
            "training": {"adaptation": "full", "epochs": 8, "learning_rate": 0.01},
            "arms": {"random": False, "full": "calibrated", "calibration_steps": 4},
        }

    def save(self) -> Path:
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.values))
        return file


@pytest.fixture
def job(tmp_path) -> ChatJob:
    return ChatJob(tmp_path)


def corpus_of(store: Store) -> list[Sample]:
    (ref,) = [ref for ref in store.refs("samples") if "duplicates" in ref.manifest.facts]
    return [
        sample
        for shard in ref.manifest.facts["shards"]
        for sample in from_table(pq.read_table(ref.path / shard["file"]))
    ]


def test_conversations_are_scored_learnt_and_answered_by_the_bases_template(job, command: Command):
    summary_file = job.folder / "summary.json"
    code, _, said = command(
        "adapt", str(job.save()), "--store", str(job.store), "--summary", str(summary_file)
    )
    assert code == 0, said
    summary, store = json.loads(summary_file.read_text()), Store(job.store)
    model = store.resolve(Path(summary["artifacts"]["model"]).name, "model")
    assert model.manifest.inputs["base"]["template"] == "chat"

    # scorers saw what training sees: texts became chats too
    encoder = Encoder(load_tokenizer(job.folder / "base"), CHAT)
    corpus = corpus_of(store)
    assert {sample.source for sample in corpus} == {"target", "chats", "texts"}
    expected = {e.sample_id: (len(e), e.n_learnt) for e in encoder.encode_all(corpus)}
    scores = pq.read_table(Path(summary["artifacts"]["scores"]) / "scores.parquet").to_pylist()
    assert {
        row["sample_id"]: (row["n_tokens"], row["n_response_tokens"]) for row in scores
    } == expected
    (two_answers,) = {e.n_learnt for e in encoder.encode_all(corpus) if e.earlier}
    (one_answer,) = {
        e.n_learnt for e, s in zip(encoder.encode_all(corpus), corpus, strict=True)
        if len(turns_of(s)) == 2 and s.response == "yes"
    }  # fmt: skip
    assert two_answers == 2 * one_answer

    # it learns to say the word and to stop
    assert summary["quality"]["base"] == 0
    assert summary["quality"]["p2d"] == 1


def refusal(job: ChatJob, command: Command) -> str:
    """The message; with exit code 2, and nothing started."""
    code, _, said = command("adapt", str(job.save()), "--store", str(job.store))
    assert code == 2, said
    assert not job.store.exists() or not [p for p in job.store.rglob("*") if p.is_file()]
    return " ".join(said.split())


def test_a_base_without_a_chat_template_is_refused_before_anything_starts(job, command: Command):
    save_chat_base(job.folder / "other", template=False)
    job.values["base"] = "other"
    said = refusal(job, command)
    assert f"the tokenizer of {job.folder / 'other'} has no chat template" in said
    assert "set `format.template: plain`" in said


def test_a_template_that_refuses_the_system_turn_is_refused_before_anything_starts(
    job, command: Command
):
    save_chat_base(job.folder / "gemma", "gemma2")
    job.values["base"] = "gemma"
    write(job.folder / "target.jsonl", [openai(i) for i in range(24)])
    write(job.folder / "test.jsonl", [openai(i) for i in range(300, 304)])
    system = {"role": "system", "content": "Be brief."}
    with_system = {"messages": [system, *openai(101)["messages"]]}
    write(job.folder / "chats.jsonl", [openai(100), with_system])
    said = refusal(job, command)
    assert "row 2 of source 'chats': the base's chat template does not take this" in said
    assert "System role not supported" in said


def test_a_tool_call_in_the_corpus_is_refused_with_its_file_and_line(job, command: Command):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    write(job.folder / "chats.jsonl", [openai(1), {"messages": [*openai(2)["messages"], call]}])
    said = refusal(job, command)
    assert "chats.jsonl, line 2: message 3 of 'messages' holds `tool_calls`" in said


def identity(job: ChatJob, **text) -> dict:
    inputs = check_inputs(parse_settings(job.values | {"format": text}, job.folder / "run.yaml"))
    return inputs.base.identity


def test_the_format_says_whether_the_template_is_used(job):
    plain = {"sha256", "precision", "separator", "max_tokens"}
    assert identity(job)["template"] == "chat"
    assert set(identity(job, template="plain")) == plain
    # without conversations auto is plain, and keys are what they were before there were templates
    job.values["target"] = {"path": "texts.jsonl"}
    job.values["corpus"] = {"sources": []}
    job.values["evaluation"] = {"samples": 1}
    assert set(identity(job)) == plain
    assert identity(job, template="chat")["template"] == "chat"
    target = SourceInput(SourceSpec("s", "file"), "sha")
    named = SourceInput(SourceSpec("s", "file", messages="talk"), "sha")
    assert set(named.identity) - set(target.identity) == {"messages"}


def test_messages_named_in_the_settings_are_read(job):
    write(job.folder / "target.jsonl", [{"talk": openai(i)["messages"]} for i in range(24)])
    job.values["target"] = {"path": "target.jsonl", "messages": "talk"}
    assert identity(job)["template"] == "chat"


def test_conversations_that_were_not_looked_at_before_are_not_mixed_in(tmp_path):
    """Such as those of a hub dataset, which is read when the run has begun."""
    file = tmp_path / "chats.jsonl"
    write(file, [openai(1)])
    runtime = Runtime(store=str(tmp_path / "store"), run_id="run")
    source = read_source.fn(runtime, SourceInput.of(SourceSpec("late", str(file))))
    with pytest.raises(DataError, match="source 'late' has 1 conversations, the samples looked at"):
        refuse_unforeseen_chats([source])
