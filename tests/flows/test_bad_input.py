"""Bad input: one clear message, exit code 2, and nothing started."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli.main import app, run
from p2d_core.synthetic.world import BASE_FOLDER
from tests.families import LATENT, SMALL


class Case:
    """A job that would run; a test breaks one thing of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(BASE_FOLDER, folder / "base")
        self.values = {
            "base": "base",
            "target": {"path": "target.jsonl"},
            "corpus": {"sources": [{"path": "pool.jsonl"}]},
            "evaluation": {"source": {"path": "test.jsonl"}},
            "proxy": {"samples": 5, "held_out": 2},
        }
        self.write("target.jsonl", [self.row(i) for i in range(20)])
        self.write("pool.jsonl", [self.row(i) for i in range(100, 130)])
        self.write("test.jsonl", [self.row(i) for i in range(200, 205)])

    def row(self, i: int) -> str:
        return json.dumps({"prompt": f"copy {i}", "response": f"word {i}"})

    def write(self, name: str, lines: list[str]) -> None:
        (self.folder / name).write_text("\n".join(lines) + "\n")


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def refusal(case: Case, capsys, monkeypatch) -> str:
    """The message; asserts that it is one, with exit code 2, and that nothing was started."""
    file = case.folder / "run.yaml"
    file.write_text(yaml.safe_dump(case.values))
    store = case.folder / "artifacts"
    monkeypatch.setattr("sys.argv", ["p2d", "adapt", str(file), "--store", str(store)])
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    made = [p for p in store.rglob("*") if p.is_file()] if store.exists() else []
    assert made == []
    return " ".join(shown.split())


def test_an_unknown_key(case, capsys, monkeypatch):
    case.values["selection"] = {"fractoin": 0.1}
    message = refusal(case, capsys, monkeypatch)
    assert "unknown key `selection.fractoin`. Known here: fraction, pool" in message
    assert "run.yaml" in message


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, "a tenth"])
@pytest.mark.parametrize(
    ("section", "meaning"),
    [
        ("selection", "Share of the corpus that training sees"),
        ("heads", "Share of all query heads"),
    ],
)
def test_a_fraction_out_of_bounds(case, capsys, monkeypatch, section, meaning, fraction):
    case.values[section] = {"fraction": fraction}
    message = refusal(case, capsys, monkeypatch)
    assert f"`{section}.fraction` was {fraction!r}" in message
    assert meaning in message


def test_a_missing_file(case, capsys, monkeypatch):
    case.values["target"]["path"] = "targets.jsonl"
    message = refusal(case, capsys, monkeypatch)
    assert "targets.jsonl" in message
    assert "Near names" in message
    assert "target.jsonl" in message


def test_an_empty_file(case, capsys, monkeypatch):
    (case.folder / "pool.jsonl").write_text("")
    assert "pool.jsonl: the file is empty" in refusal(case, capsys, monkeypatch)


def test_json_broken_at_a_line(case, capsys, monkeypatch):
    case.write("pool.jsonl", [case.row(1), case.row(2), '{"prompt": "a", "resp', case.row(3)])
    assert "pool.jsonl, line 3" in refusal(case, capsys, monkeypatch)


def test_a_row_without_a_response(case, capsys, monkeypatch):
    case.write("pool.jsonl", [case.row(1), '{"prompt": "a"}'])
    message = refusal(case, capsys, monkeypatch)
    assert "pool.jsonl, line 2" in message
    assert "response" in message


def test_text_that_is_not_utf8(case, capsys, monkeypatch):
    (case.folder / "pool.jsonl").write_bytes(b'{"prompt": "caf\xe9", "response": "x"}\n')
    message = refusal(case, capsys, monkeypatch)
    assert "pool.jsonl" in message
    assert "UTF-8" in message


def test_a_target_that_shares_samples_with_the_evaluation_set(case, capsys, monkeypatch):
    case.write("test.jsonl", [case.row(300), case.row(7)])
    message = refusal(case, capsys, monkeypatch)
    assert "target and evaluation share 1 sample" in message
    assert "row 8 of 'target'" in message


def test_a_base_without_a_config(case, capsys, monkeypatch):
    (case.folder / "base/config.json").unlink()
    assert "has no config.json" in refusal(case, capsys, monkeypatch)


def test_a_base_with_pickled_weights_only(case, capsys, monkeypatch):
    (case.folder / "base/model.safetensors").rename(case.folder / "base/pytorch_model.bin")
    message = refusal(case, capsys, monkeypatch)
    assert "has pickled weights only (pytorch_model.bin)" in message
    assert "safe_serialization=True" in message


def test_a_base_with_code_of_its_own(case, capsys, monkeypatch):
    config = case.folder / "base/config.json"
    values = json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    config.write_text(json.dumps(values))
    assert "names code of its own" in refusal(case, capsys, monkeypatch)


def test_a_base_with_quantised_weights(case, capsys, monkeypatch):
    config = case.folder / "base/config.json"
    values = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(values))
    assert "its weights are quantised (fp8): the slices" in refusal(case, capsys, monkeypatch)


def test_a_base_that_is_not_there(case, capsys, monkeypatch):
    case.values["base"] = "bsae"
    assert "there is no such folder" in refusal(case, capsys, monkeypatch)


def test_fewer_samples_than_the_proxy_asks_for(case, capsys, monkeypatch):
    case.values["proxy"]["samples"] = 100
    message = refusal(case, capsys, monkeypatch)
    assert "the target has 20 samples" in message
    assert "proxy.samples 100" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("heads", {"ranker": "spda"}, "there is no ranker 'spda'. Known: ablation"),
        ("scoring", {"scorer": "bm42"}, "there is no scorer 'bm42'. Known: bm25"),
        ("training", {"adaptation": "all"}, "there is no adaptation 'all'. Known: attention"),
        ("heads", {"options": {"tau": 1}}, "ranker 'frobenius' has no setting tau"),
        ("device", "cuda:9", "device 'cuda:9' cannot be used"),
        ("format", {"max_tokens": 2}, "`format.max_tokens` was 2"),
        ("tracking", {"experiment": 5}, "`tracking.experiment` was 5"),
        ("training", {"epochs": float("inf")}, "`training.epochs` was inf"),
        ("scoring", {"options": {"domain_quantile": 7}}, "setting `domain_quantile` was 7"),
        ("scoring", {"options": {"neighbours": 0}}, "setting `neighbours` was 0"),
        ("scoring", {"depth": 1.5}, "`scoring.depth` was 1.5"),
        ("scoring", {"depth": 0.5, "scorer": "tfidf"}, "the scorer 'tfidf' does not run the model"),
        (
            "scoring",
            {"scorer": "icl-attention", "options": {"draws": 0}},
            "setting `draws` was 0",
        ),
        ("evaluation", {"answer_pattern": "("}, "it is not a regular expression"),
        ("corpus", {"sources": [], "include_target": False}, "the corpus has no samples"),
    ],
)
def test_a_name_or_option_that_nobody_knows(case, capsys, monkeypatch, key, value, expected):
    case.values[key] = value
    assert expected in refusal(case, capsys, monkeypatch)


def test_two_sources_of_one_name(case, capsys, monkeypatch):
    case.values["corpus"]["sources"] = [
        {"path": "pool.jsonl"},
        {"path": "test.jsonl", "name": "pool"},
    ]
    assert "two sources of the corpus are called 'pool'" in refusal(case, capsys, monkeypatch)


def test_an_answer_pattern_that_a_reference_does_not_match(case, capsys, monkeypatch):
    case.values["evaluation"] |= {"metric": "exact_match", "answer_pattern": "#### (.*)"}
    message = refusal(case, capsys, monkeypatch)
    assert "row 1 of source 'test': its response has no match" in message


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"metric": "bleu"}, "there is no metric 'bleu'. Known: accuracy, exact_match, loss,"),
        ({"also": ["accuracy"]}, "the metric accuracy needs evaluation.choices"),
        (
            {"metric": "accuracy", "choices": "options"},
            "row 1 of source 'test': there is no column 'options'",
        ),
        ({"harness": {"tasks": []}}, "`evaluation.harness.tasks` was []"),
        ({"harness": {"tasks": ["any"], "include_path": "none"}}, "none is no folder"),
        ({"harness": {"tasks": ["no_such_task"]}}, "there is no task 'no_such_task' in lm-eval"),
    ],
)
def test_an_evaluation_that_cannot_be_done(case, capsys, monkeypatch, evaluation, message):
    case.values["evaluation"] |= evaluation
    assert message in refusal(case, capsys, monkeypatch)


def test_lm_eval_is_asked_for_but_not_installed(case, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    case.values["evaluation"]["harness"] = {"tasks": ["arc_easy"]}
    assert "pip install 'p2d[eval]'" in refusal(case, capsys, monkeypatch)


def test_a_base_whose_heads_cannot_be_found(case, capsys, monkeypatch):
    from transformers import DeepseekV3Config

    DeepseekV3Config(**SMALL, **LATENT).save_pretrained(case.folder / "base")
    message = refusal(case, capsys, monkeypatch)
    assert "kv_b_proj Linear" in message
    assert "docs/families.md" in message


def test_gradient_checkpointing_of_a_base_that_cannot(case, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    # every family that heads are found in can, as it comes
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    case.values["training"] = {"gradient_checkpointing": True}
    told = refusal(case, capsys, monkeypatch)
    assert "training.gradient_checkpointing: LlamaForCausalLM of" in told
    assert "cannot run its layers twice. Leave it out; a smaller training.batch_size" in told


def test_yaml_that_is_none(case, capsys, monkeypatch, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("base: [unclosed\n")
    result = CliRunner().invoke(app, ["adapt", str(file)])
    assert "is not YAML" in str(result.exception)


def test_yaml_tags_run_no_code(tmp_path):
    file = tmp_path / "tagged.yaml"
    file.write_text("base: !!python/object/apply:os.system ['touch ran']\n")
    result = CliRunner().invoke(app, ["adapt", str(file)])
    assert "is not YAML" in str(result.exception)
    assert not Path("ran").exists()


def test_a_quota_of_a_source_that_is_not_in_the_corpus(case, capsys, monkeypatch):
    case.values["selection"] = {"quotas": {"pol": 0.5}}
    told = refusal(case, capsys, monkeypatch)
    assert "selection.quotas: the corpus has no source 'pol'. It has pool, target." in told


def test_retention_samples_that_are_in_the_target(case, capsys, monkeypatch):
    """The proxy set is drawn from it, and trained on."""
    case.write("old.jsonl", [case.row(300), case.row(7)])
    case.values["evaluation"]["retention"] = {"path": "old.jsonl"}
    told = refusal(case, capsys, monkeypatch)
    assert "target and retention share 1 sample; the first: row 8 of 'target' is row 2 of" in told
