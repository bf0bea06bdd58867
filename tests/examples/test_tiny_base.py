"""The script that trains the examples' base model, at a small size."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "tiny_base.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tiny_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """As many rows as the script sets aside from, with short texts."""
    folder = tmp_path_factory.mktemp("data")
    gsm8k = [{"question": f"What is {n} + 1?", "answer": f"{n + 1}"} for n in range(4700)]
    (folder / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gsm8k))
    code = [
        {"instruction": f"Print {n}.", "input": "", "output": f"print({n})"} for n in range(2900)
    ]
    (folder / "codealpaca.json").write_text(json.dumps(code))
    return folder


def test_the_base_is_trained_and_loads_as_a_hugging_face_folder(script, data, tmp_path):
    out = tmp_path / "base"
    script.main(data, out, steps=2)
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= files
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    record = json.loads((out / "training.json").read_text())
    assert record["first_row_of"] == {"gsm8k_train.jsonl": 4500, "codealpaca.json": 2700}

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, 4)
    ids = tokenizer("What is 41 + 1?", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "What is 41 + 1?"
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.eos_token_id == model.config.eos_token_id == 2

    script.main(data, tmp_path / "again", steps=2)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, twin[name]), name


def test_missing_data_is_named(script, tmp_path, capsys):
    with pytest.raises(typer.Exit) as stop:
        script.main(tmp_path, tmp_path / "base")
    assert stop.value.exit_code == 2
    message = capsys.readouterr().err
    assert "has no gsm8k_train.jsonl and no codealpaca.json. Give a folder" in message


def test_a_folder_of_something_else_is_left_alone(script, data, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(typer.Exit) as stop:
        script.main(data, tmp_path, steps=1)
    assert stop.value.exit_code == 2
    assert "exists and was not made by this script" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"
