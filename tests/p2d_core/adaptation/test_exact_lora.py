import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import PeftModel
from safetensors.torch import load_file

from p2d_core.adaptation.exact_lora import addend, export_lora
from p2d_core.adaptation.masked import attach_head_deltas
from p2d_core.adaptation.slices import Block, TunedSlices
from p2d_core.attention.layout import attention_layers
from p2d_core.errors import ModelError, TrainingError
from tests.tiny import tiny_llama, token_batch

HEADS = [(0, 1), (1, 2), (1, 3), (1, 7)]
IDS, MASK = token_batch([6, 9, 4])


def base_model():
    return tiny_llama(initializer_range=0.05)


@cache
def trained():
    model = base_model()
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=1e-2)
    for _ in range(5):
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return deltas.tuned()


def logits_of(model):
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK).logits


def test_stock_peft_gives_the_tuned_models_logits_and_merges_to_its_weights(tmp_path):
    export_lora(trained(), base_model(), tmp_path, "base")
    model = base_model()
    base = logits_of(model)
    trained().apply_(model)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-6, rtol=1e-6)
    assert (logits_of(model) - base).abs().max() > 0.01
    merged = loaded.merge_and_unload()
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, model.get_parameter(name))


def test_only_tuned_modules_are_in_it_and_its_scale_is_one(tmp_path):
    export_lora(trained(), base_model(), tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(trained().blocks)
    assert not any("layers.2" in module for module in config["target_modules"])
    assert config["base_model_name_or_path"] == "base"
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"][r"^model\.layers\.1\.self_attn\.q_proj"] == 24
    assert config["rank_pattern"][r"^model\.layers\.1\.self_attn\.v_proj"] == 16
    assert not config["use_rslora"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(trained().blocks)


def test_exporting_again_writes_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        export_lora(trained(), base_model(), tmp_path / name, "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_base_in_bf16_merges_exactly(tmp_path):
    model = base_model().to(torch.bfloat16)
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    with torch.no_grad():
        for delta in deltas.parameters():
            delta.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    tuned = deltas.tuned()
    base = base_model().to(torch.bfloat16)
    export_lora(tuned, base, tmp_path, "base")
    merged = PeftModel.from_pretrained(base_model().to(torch.bfloat16), tmp_path)
    merged = merged.merge_and_unload()
    with tuned.applied(base):
        for name, weight in merged.named_parameters():
            assert torch.equal(weight, base.get_parameter(name))


@settings(max_examples=100, deadline=None)
@given(
    arrays("float32", (4, 4), elements=st.floats(-2, 2, width=32)),
    arrays("float32", (4, 4), elements=st.floats(-2, 2, width=32)),
)
def test_adding_the_addend_gives_the_target_exactly(base, delta):
    base, delta = torch.from_numpy(base), torch.from_numpy(delta)
    target = base + delta
    change = addend(base, Block(0, torch.arange(4), target))
    assert torch.equal(base + change, target)


def test_nothing_tuned_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="nothing was tuned"):
        export_lora(TunedSlices({}), base_model(), tmp_path, "base")


def test_slices_of_another_model_are_refused(tmp_path):
    other = tiny_llama(hidden_size=32, head_dim=8)
    with pytest.raises(ModelError, match="do not fit"):
        export_lora(trained(), other, tmp_path, "base")
    assert not list(Path(tmp_path).iterdir())
