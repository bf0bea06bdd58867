"""What `p2d doctor --model` says of a model folder."""

import json

import pytest
import transformers as hf

from flows.cli.doctor import examine_model
from tests.families import FAMILIES, LATENT, SMALL, family_model
from tests.tiny_tokenizer import tiny_bpe


def folder_of(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tiny_bpe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def said_of(model, tmp_path):
    return {each.what.strip(): each for each in examine_model(folder_of(model, tmp_path))}


def test_separate_projections(tmp_path):
    said = said_of(family_model("gemma2"), tmp_path)
    assert said["model"].found.endswith("(Gemma2ForCausalLM)")
    assert said["heads"].found == "3 layers of 8 query heads of 8, in 2 KV groups"
    at = "model.layers.0..2.self_attn"
    assert said["q"].found == f"{at}.q_proj: rows 0-7, 8-15, ..., 56-63; separate"
    assert said["k"].found == f"{at}.k_proj: rows 0-7, 8-15; separate"
    assert said["o"].found == f"{at}.o_proj: columns 0-7, 8-15, ..., 56-63; separate"
    assert said["attention"].found.startswith("eager: SDPA does not compute")
    assert not any(each.cure for each in said.values())


def test_fused_projections_interleaved_by_group(tmp_path):
    said = said_of(family_model("falcon, by group"), tmp_path)
    at = "transformer.h.0..2.self_attention"
    assert said["k"].found == f"{at}.query_key_value: rows 32-39, 80-87; fused with q and v"
    assert said["o"].found == f"{at}.dense: columns 0-7, 8-15, ..., 56-63; separate"
    assert said["attention"].found == "sdpa"


def test_transposed_projections(tmp_path):
    said = said_of(family_model("gpt2"), tmp_path)
    at = "transformer.h.0..2.attn"
    assert said["v"].found == (
        f"{at}.c_attn: columns 128-135, 136-143, ..., 184-191; fused with q and k"
    )
    assert said["o"].found == f"{at}.c_proj: rows 0-7, 8-15, ..., 56-63; separate"


def test_a_norm_over_all_heads_is_said(tmp_path):
    assert "normalised over all heads" in said_of(family_model("olmo2"), tmp_path)["norm"].found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recognised_from_its_folder(family, tmp_path):
    said = said_of(family_model(family), tmp_path)
    n = FAMILIES[family].n_kv_groups
    assert said["heads"].found.endswith(f"in {n} KV group{'s' if n > 1 else ''}")


def test_what_is_not_recognised_fails_with_module_and_shapes(tmp_path):
    config = hf.DeepseekV3Config(**SMALL, **LATENT, q_lora_rank=16)
    [finding] = examine_model(folder_of(hf.DeepseekV3ForCausalLM(config), tmp_path))
    assert finding.fatal
    assert "kv_b_proj Linear [128, 16]" in finding.found
    assert "docs/families.md" in finding.cure


def test_the_command_says_it_and_fails_where_it_has_to(tmp_path, monkeypatch, capfd):
    import sys

    from flows.cli import main

    def doctor(folder):
        monkeypatch.setattr(sys, "argv", ["p2d", "doctor", "--model", str(folder)])
        try:
            main.run()
        except SystemExit as ending:
            return int(ending.code or 0), capfd.readouterr().out
        return 0, capfd.readouterr().out

    folder = folder_of(family_model("phi3"), tmp_path)
    code, out = doctor(folder)
    assert code == 0
    assert "3 layers of 8 query heads of 8" in out
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3", "auto_map": {}}))
    code, out = doctor(folder)
    assert code == 1
    assert "auto_map" in out


def test_a_folder_without_a_model_is_a_finding_like_others(tmp_path):
    (said,) = examine_model(tmp_path / "nowhere")
    assert (said.what, said.fatal) == ("model", True)
    assert said.cure == "Give --model a folder as transformers saves one, or hf://OWNER/NAME."


def test_a_name_that_is_none_of_the_hub_is_a_finding_like_others():
    (said,) = examine_model("hf://no-owner")
    assert "hf://no-owner" in said.found
    assert said.fatal
