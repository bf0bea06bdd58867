"""lm-eval against our own metrics on the same samples, and what of its tasks is in a key."""

import importlib.metadata
import json
import math
import random
import socket
import sys

import pytest
import torch
import yaml

from p2d_core.errors import EvaluationError, SettingsError
from p2d_core.evaluation import EvaluationSpec
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.evaluation.harness import checked_tasks, run_tasks
from p2d_core.samples.tokens import Encoder, TextFormat
from tests.tiny import tiny_llama
from tests.tiny_task import as_samples, documents, word_tokenizer, write_task

CPU = torch.device("cpu")
ALIKE = 3
"""Words in the response of documents for perplexity, which lm-eval takes of whole responses."""


@pytest.fixture(scope="module")
def model():
    """8 query heads in 4 KV groups."""
    return tiny_llama(seed=3)


@pytest.fixture(scope="module", autouse=True)
def _no_network(request):
    """Nothing here may leave the machine."""

    def refused(*args):
        raise AssertionError(f"the network was asked for {args[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refused)
        patch.setattr(socket, "getaddrinfo", refused)
        yield


def answered(model, rows: list[dict]) -> list[dict]:
    """The rows; every other one has what the model answers as its response."""
    encoder = Encoder(word_tokenizer(), TextFormat())
    spec = EvaluationSpec("exact_match", max_new_tokens=6)
    answers = evaluate(model, encoder, as_samples(rows), spec, device=CPU).samples["answer"]
    return [
        row | {"response": answer if i % 2 else row["response"]}
        for i, (row, answer) in enumerate(zip(rows, answers.to_pylist(), strict=True))
    ]


def found(rows: list[dict]) -> dict[tuple[str, str], dict]:
    return {(row["task"], row["metric"]): row for row in rows}


def test_lm_eval_and_our_metrics_give_the_same_numbers(model, tmp_path, capfd):
    choices, answers = documents(40), answered(model, documents(20, seed=1))
    likely = [row for row in documents(60, seed=2) if len(row["response"].split()) == ALIKE]
    names = [
        write_task(tmp_path, "choices", choices),
        write_task(tmp_path, "answers", answers),
        write_task(tmp_path, "likelihood", likely),
    ]
    state, told = random.getstate(), []
    capfd.readouterr()
    spec = checked_tasks(names, str(tmp_path))
    rows = found(
        run_tasks(
            model, word_tokenizer(), spec, progress=lambda done, total: told.append((done, total))
        )
    )
    assert capfd.readouterr() == ("", "")
    assert random.getstate() == state
    assert told[-1][0] == told[-1][1] == 4 * len(choices) + len(answers) + len(likely)

    def ours(rows: list[dict], metric: str, **settings) -> float:
        encoder = Encoder(word_tokenizer(), TextFormat())
        asked = EvaluationSpec(metric, choices="options", max_new_tokens=6, **settings)
        return evaluate(model, encoder, as_samples(rows), asked, device=CPU).metrics[metric]

    acc, by_bytes = ours(choices, "accuracy"), ours(choices, "accuracy", normalise="bytes")
    assert rows["words_choices", "acc"]["value"] == acc != by_bytes
    assert rows["words_choices", "acc_bytes"]["value"] == by_bytes
    assert rows["words_choices", "acc"]["stderr"] == pytest.approx(
        math.sqrt(acc * (1 - acc) / (len(choices) - 1))
    )
    match = ours(answers, "exact_match")
    assert rows["words_answers", "exact_match"]["value"] == match
    assert 0.3 < match < 0.7
    # of whole responses, each of as many tokens: its perplexity of one is ours to that power
    perplexity = rows["words_likelihood", "perplexity"]
    assert perplexity["value"] == pytest.approx(ours(likely, "perplexity") ** (ALIKE + 1), rel=1e-4)
    assert perplexity["stderr"] > 0
    assert perplexity["higher_is_better"] is False


def test_a_limit_and_examples_reach_the_questions(model, tmp_path):
    name = write_task(tmp_path, "choices", documents(40), fewshot_split="test")
    whole = checked_tasks([name], str(tmp_path))
    short = checked_tasks([name], str(tmp_path), limit=7)
    taught = checked_tasks([name], str(tmp_path), limit=7, num_fewshot=3)
    assert len({whole.sha256, short.sha256, taught.sha256}) == 3
    rows = [run_tasks(model, word_tokenizer(), spec)[0] for spec in (whole, short, taught)]
    assert [row["samples"] for row in rows] == [40, 7, 7]
    assert documents_seen(model, short) < documents_seen(model, taught)


def documents_seen(model, spec) -> int:
    """Tokens that the model is shown."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or [kwargs["input_ids"]])[0].shape[1]),
        with_kwargs=True,
    )
    try:
        run_tasks(model, word_tokenizer(), spec, batch_size=1)
    finally:
        hook.remove()
    return sum(seen)


CODE = """\
def shown(doc):
    return BEFORE + doc["prompt"]

BEFORE = "{}"
"""


def test_a_group_is_the_mean_of_its_tasks(model, tmp_path):
    sizes = {"choices": 30, "likelihood": 20}
    names = [
        write_task(tmp_path, kind, documents(size), metric_list=[{"metric": "acc"}])
        for kind, size in sizes.items()
    ]
    group = {
        "group": "words",
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    spec = checked_tasks(["words"], str(tmp_path))
    rows = found(run_tasks(model, word_tokenizer(), spec))
    accs = [rows[name, "acc"]["value"] for name in names]
    mean = sum(acc * size for acc, size in zip(accs, sizes.values(), strict=True)) / 50
    assert rows["words", "acc"]["value"] == pytest.approx(mean)
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group | {"task": names[:1]}))
    assert checked_tasks(["words"], str(tmp_path)).sha256 != spec.sha256


def test_the_key_is_of_what_a_task_is_and_not_of_where_it_lies(tmp_path):
    def identity(folder: str, rows: list[dict], before: str = "") -> dict:
        name = write_task(tmp_path / folder, "choices", rows, doc_to_text="OWN")
        (tmp_path / folder / "own.py").write_text(CODE.format(before))
        file = tmp_path / folder / "choices.yaml"
        file.write_text(file.read_text().replace("OWN", "!function own.shown"))
        return checked_tasks([name], str(tmp_path / folder)).identity

    rows = documents(5)
    first = identity("one", rows)
    assert identity("elsewhere", rows) == first
    assert first["version"] == importlib.metadata.version("lm_eval")
    assert identity("other", [*rows[:4], rows[4] | {"prompt": "alo"}]) != first
    assert identity("code", rows, before="blo ") != first


def test_tasks_that_changed_after_the_check_are_not_run(model, tmp_path):
    name = write_task(tmp_path, "choices", documents(5))
    spec = checked_tasks([name], str(tmp_path))
    checked_tasks([write_task(tmp_path, "answers", documents(3))], str(tmp_path))  # forgets it
    write_task(tmp_path, "choices", documents(5, seed=9))
    with pytest.raises(SettingsError, match="words_choices or their documents have changed"):
        run_tasks(model, word_tokenizer(), spec)


def test_a_task_that_lm_eval_cannot_run_says_which(model, tmp_path):
    without = {"prompt": "alo", "response": "bru", "options": None}
    rows = [*documents(3), without]
    spec = checked_tasks([write_task(tmp_path, "choices", rows)], str(tmp_path))
    with pytest.raises(EvaluationError, match=r"could not run words_choices .*is kept: mend"):
        run_tasks(model, word_tokenizer(), spec)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"unsafe_code": True}, "runs code that the model writes, which P2D does not"),
        (
            {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
            "'words_choices' cannot be loaded .*nowhere.jsonl.*Mend its file or its data",
        ),
    ],
)
def test_what_is_not_run_here_is_refused(tmp_path, more, message):
    name = write_task(tmp_path, "choices", documents(3), **more)
    with pytest.raises(SettingsError, match=message):
        checked_tasks([name], str(tmp_path))


def test_a_metric_that_is_code_from_elsewhere_is_refused_and_not_run(tmp_path):
    """A script in a folder stands for one of the hub: lm-eval would load both in the same way."""
    script, ran = tmp_path / "odd" / "odd.py", tmp_path / "ran"
    script.parent.mkdir()
    script.write_text(f"open({str(ran)!r}, 'w')\n")
    metric = {"metric": str(script), "aggregation": "mean", "higher_is_better": True}
    name = write_task(tmp_path, "choices", documents(3), metric_list=[metric])
    with pytest.raises(SettingsError, match=r"odd.py', which lm-eval would load as code"):
        checked_tasks([name], str(tmp_path))
    assert not ran.exists()


def test_an_unknown_task_names_those_that_are_near(tmp_path):
    write_task(tmp_path, "choices", documents(3))
    with pytest.raises(SettingsError, match=r"no task 'words_choice' .* Near: words_choices"):
        checked_tasks(["words_choice"], str(tmp_path))


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"include_path: .*none is no folder"):
        checked_tasks(["any"], str(tmp_path / "none"))


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SettingsError, match=r"not installed .*pip install 'p2d\[eval\]'"):
        checked_tasks(["hellaswag"])


def test_results_are_plain_values(model, tmp_path):
    name = write_task(tmp_path, "choices", documents(1))
    rows = run_tasks(model, word_tokenizer(), checked_tasks([name], str(tmp_path)))
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0]["stderr"] is None  # of one document
