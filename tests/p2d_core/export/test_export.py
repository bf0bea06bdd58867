"""Exported models, loaded by stock libraries, are the adapted model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2d_core.adaptation.adaptations import ADAPTER, WEIGHTS, adaptations, adapted
from p2d_core.attention.layout import attention_layers
from p2d_core.errors import ExportError, StorageError
from p2d_core.export import exporting
from p2d_core.export.delta import apply_delta
from p2d_core.export.exporting import AdaptedModel, export
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import load_model
from p2d_core.samples.tokens import EncodedSample
from tests.families import FAMILIES, HEAD_DIM, N_HEADS, N_LAYERS, family_model
from tests.stock import run_stock
from tests.tiny import token_batch
from tests.tiny_tokenizer import tiny_bpe

GROUPED = ["llama", "qwen2", "phi3", "falcon, by group", "mixtral"]
"""Families with fewer KV groups than heads; Qwen 2 and this Falcon have biases."""
TRIED = [*GROUPED, "gpt2"]
IDS, MASK = token_batch([6, 9, 4])
SAMPLES = [EncodedSample("a", IDS[1].tolist(), 2), EncodedSample("b", IDS[0, :6].tolist(), 2)]
CPU = torch.device("cpu")

LOAD_ALL = """
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids, mask = torch.tensor(ids), torch.tensor(mask)
for number, (base, adapter, merged) in enumerate(models):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits
        again = AutoModelForCausalLM.from_pretrained(merged).eval()
        of_merged = again(input_ids=ids, attention_mask=mask).logits
    forms = {"lora": model.merge_and_unload(), "merged": again}
    found = {f"{f}.{n}": p.clone() for f, m in forms.items() for n, p in m.named_parameters()}
    save_file(found | {"logits": logits, "logits of merged": of_merged}, f"{number}.safetensors")
"""


@dataclass(frozen=True)
class Made:
    """An adapted model, where it is kept, and what it is in this process."""

    model: AdaptedModel
    adapted: torch.nn.Module
    moved: dict[str, torch.Tensor]
    """Parameter name -> which of its numbers differ from the base's."""


def base_model(family: str):
    """With weights of a usual size: families begin with 0.15, where logits are of tens."""
    model = family_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(3)
    return model


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_bpe().save_pretrained(folder)
    return folder


def two_heads(family: str) -> HeadMap:
    scores = torch.zeros(N_LAYERS, N_HEADS)
    scores[1, 3], scores[0, 2] = 2, 1
    return HeadMap.from_scores(scores, FAMILIES[family].n_kv_groups, 2 / scores.numel())


def trained(
    family: str,
    folder: Path,
    adaptation: str = "heads",
    step: float = 1e-2,
    precision: str = "float32",
) -> Made:
    """Three steps of training, kept as the `model` stage does."""
    base = base_model(family)
    where = saved(base, folder / "base")
    model = load_model(where, precision, CPU)
    attached = adaptations.make(adaptation, {}).attach(
        model, attention_layers(model), two_heads(family), str(where)
    )
    moving = [p for p in attached.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=step)
    for _ in range(3):
        attached.model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (folder / "kept").mkdir()
    attached.keep(folder / "kept")
    return made(AdaptedModel(where, "5ha", precision, folder / "kept", adaptation == "lora"))


def with_new_values(family: str, folder: Path, *endings: str) -> Made:
    """Kept as whole weights, as an adaptation that moves other things than slices would."""
    base = base_model(family)
    where = saved(base, folder / "base")
    (folder / "kept").mkdir()
    moved = {
        name: parameter.detach() + 0.125
        for name, parameter in base.named_parameters()
        if name.endswith(endings)
    }
    assert moved
    save_file(moved, folder / "kept" / WEIGHTS)
    return made(AdaptedModel(where, "5ha", "float32", folder / "kept"))


def made(model: AdaptedModel) -> Made:
    base = load_model(model.base, model.precision, CPU)
    tuned = adapted(load_model(model.base, model.precision, CPU), model.kept)
    if hasattr(tuned, "merge_and_unload"):
        tuned = copy.deepcopy(tuned).merge_and_unload()
    before = dict(base.named_parameters())
    differs = {name: weight != before[name] for name, weight in tuned.named_parameters()}
    return Made(model, tuned, {name: where for name, where in differs.items() if where.any()})


def logits_of(model):
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK).logits


def assert_same_weights(found, expected):
    found = dict(found.named_parameters()) if isinstance(found, torch.nn.Module) else found
    for name, weight in expected.named_parameters():
        assert torch.equal(found[name], weight), name


def stock_model(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def stock_lora(base: Path, adapter: Path, dtype: torch.dtype = torch.float32):
    from peft import PeftModel

    return PeftModel.from_pretrained(stock_model(base, dtype), adapter).eval()


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> dict[str, Made]:
    """An adapted model a family."""
    return {family: trained(family, tmp_path_factory.mktemp("model")) for family in TRIED}


@pytest.fixture(scope="module")
def loaded_elsewhere(tried, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What stock PEFT and transformers load in a process without P2D, by family."""
    folder = tmp_path_factory.mktemp("stock")
    models = []
    for number, each in enumerate(tried.values()):
        forms = {form: folder / f"{number}-{form}" for form in ("lora", "merged")}
        for form, place in forms.items():
            export(each.model, form, place)
        models.append([str(each.model.base), str(forms["lora"]), str(forms["merged"])])
    run_stock(LOAD_ALL, folder, models=models, ids=IDS.tolist(), mask=MASK.tolist())
    return {family: load_file(folder / f"{n}.safetensors") for n, family in enumerate(tried)}


# -- what stock libraries load -----------------------------------------------------------------


@pytest.mark.parametrize("family", TRIED)
def test_stock_peft_without_p2d_gives_the_adapted_models_logits_and_its_weights(
    family, tried, loaded_elsewhere
):
    found, expected = loaded_elsewhere[family], tried[family].adapted
    torch.testing.assert_close(found["logits"], logits_of(expected), atol=1e-6, rtol=1e-6)
    merged = {n.removeprefix("lora."): w for n, w in found.items() if n.startswith("lora.")}
    assert_same_weights(merged, expected)
    away = (logits_of(expected) - logits_of(base_model(family))).abs().max()
    assert away > 0.01


@pytest.mark.parametrize("family", TRIED)
def test_stock_transformers_without_p2d_loads_the_merged_model(family, tried, loaded_elsewhere):
    found, expected = loaded_elsewhere[family], tried[family].adapted
    torch.testing.assert_close(found["logits of merged"], logits_of(expected), atol=1e-6, rtol=1e-6)
    merged = {n.removeprefix("merged."): w for n, w in found.items() if n.startswith("merged.")}
    assert_same_weights(merged, expected)


def test_a_merged_model_has_its_tokenizer(tried, tmp_path):
    export(tried["llama"].model, "merged", tmp_path)
    text = "Natalia sold 48 clips."
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found(text)["input_ids"] == tiny_bpe()(text)["input_ids"]
    assert found.eos_token_id == tiny_bpe().eos_token_id


@pytest.mark.parametrize("family", TRIED)
def test_a_delta_is_what_moved_and_no_more_and_gives_the_weights_back(family, tried, tmp_path):
    each = tried[family]
    done = export(each.model, "delta", tmp_path)
    values = load_file(tmp_path / "delta.safetensors")
    assert set(values) == set(each.moved)
    assert sum(v.numel() for v in values.values()) * 4 == done.sizes["delta"]
    # slices of two heads: q and o of each, k and v of their KV groups
    assert done.sizes["delta"] == 2 * 4 * HEAD_DIM * 64 * 4
    assert done.sizes["delta"] < done.sizes["lora"] < done.sizes["merged"]
    assert done.whole == ()
    model = stock_model(each.model.base)
    apply_delta(tmp_path, model)
    assert_same_weights(model, each.adapted)
    about = json.loads((tmp_path / "delta.json").read_text())
    assert (about["base"], about["base_sha256"]) == (str(each.model.base), "5ha")
    assert about["dtype"] == "float32"


def test_the_sizes_are_those_of_the_files(tried, tmp_path):
    for form, pattern in {
        "lora": "adapter_*.s*",
        "merged": "model.s*",
        "delta": "delta.s*",
    }.items():
        done = export(tried["qwen2"].model, form, tmp_path / form)
        (file,) = (tmp_path / form).glob(pattern)
        tensors = load_file(file)
        assert sum(t.numel() * t.itemsize for t in tensors.values()) == done.sizes[form]
    assert done.advised == "lora"
    assert done.rank == 2 * HEAD_DIM or done.rank == HEAD_DIM


def test_the_base_is_named_as_asked(tried, tmp_path):
    export(tried["llama"].model, "lora", tmp_path, base_name="someone/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"


# -- precision ---------------------------------------------------------------------------------


def test_what_rounding_does_is_counted_by_hand(tmp_path):
    # in bf16, 1.0 and the next number are 2**-7 apart
    each = with_new_values("llama", tmp_path, "layers.1.post_attention_layernorm.weight")
    base = each.model.base
    model = stock_model(base)
    norm = model.model.layers[1].post_attention_layernorm.weight
    with torch.no_grad():
        norm.fill_(1.0)
    saved(model, base)
    tuned = torch.ones(64)
    tuned[:10] += 2**-10  # rounds back
    tuned[10:16] += 2**-6  # stays
    projection = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    projection[3, 5] = 7.0  # the others of its row are the base's, and count as nothing
    new = {"post_attention_layernorm.weight": tuned, "self_attn.q_proj.weight": projection}
    layers = zip((1, 0), new.items(), strict=True)
    kept = {f"model.layers.{layer}.{name}": values for layer, (name, values) in layers}
    save_file(kept, each.model.kept / WEIGHTS)
    done = export(each.model, "delta", tmp_path / "out", dtype="bfloat16", samples=SAMPLES)
    assert (done.rounding.moved, done.rounding.lost) == (17, 10)
    assert done.rounding.share_lost == 10 / 17
    done = export(each.model, "delta", tmp_path / "out", samples=SAMPLES)
    assert (done.rounding.lost, done.as_loaded.highest) == (0, 0.0)


def test_exports_in_bf16_merge_to_the_rounded_weights_and_the_lora_loses_less(tmp_path):
    each = trained("qwen2", tmp_path, step=1e-3)
    done = {
        form: export(each.model, form, tmp_path / form, dtype="bfloat16", samples=SAMPLES)
        for form in ("lora", "merged", "delta")
    }
    base, half = stock_model(each.model.base, torch.bfloat16), copy.deepcopy(each.adapted)
    half = half.to(torch.bfloat16)
    merged = stock_lora(each.model.base, tmp_path / "lora", torch.bfloat16).merge_and_unload()
    for found in (merged, stock_model(tmp_path / "merged", torch.bfloat16)):
        assert_same_weights(found, half)
    apply_delta(tmp_path / "delta", base)
    assert_same_weights(base, half)
    assert done["delta"].rounding.lost > 0
    assert {load_file(tmp_path / "delta/delta.safetensors")[n].dtype for n in each.moved} == {
        torch.bfloat16
    }
    assert done["lora"].when_merged == done["merged"].as_loaded == done["delta"].as_loaded
    # by hand, on the same samples
    away = []
    for sample in SAMPLES:
        ids = torch.tensor([sample.input_ids])
        with torch.inference_mode():
            a, b = (m(input_ids=ids).logits.float() for m in (each.adapted, merged))
        away.append((a - b).abs().flatten())
    assert done["merged"].as_loaded.highest == pytest.approx(float(torch.cat(away).max()), rel=1e-3)
    assert done["merged"].as_loaded.mean == pytest.approx(float(torch.cat(away).mean()), rel=1e-3)


def test_over_a_bf16_base_a_lora_keeps_what_rounding_would_lose(tmp_path):
    base = saved(base_model("llama").to(torch.bfloat16), tmp_path / "base")
    model = load_model(base, "float32", CPU)
    attached = adaptations.make("heads", {}).attach(
        model, attention_layers(model), two_heads("llama"), str(base)
    )
    with torch.no_grad():
        for delta in attached.model.parameters():
            if delta.requires_grad:
                delta.normal_(std=1e-4, generator=torch.Generator().manual_seed(1))
    (tmp_path / "kept").mkdir()
    attached.keep(tmp_path / "kept")
    each = made(AdaptedModel(base, "5ha", "float32", tmp_path / "kept"))
    assert each.model.usual_dtype == "bfloat16"
    done = export(each.model, "lora", tmp_path / "lora", samples=SAMPLES)
    assert (done.dtype, done.precision) == ("bfloat16", "float32")
    assert done.rounding.share_lost > 0.5
    exact = stock_lora(base, tmp_path / "lora").merge_and_unload()
    assert_same_weights(exact, each.adapted)
    merged = stock_lora(base, tmp_path / "lora", torch.bfloat16).merge_and_unload()
    assert_same_weights(merged, copy.deepcopy(each.adapted).to(torch.bfloat16))
    assert done.whole == ()


def test_a_model_adapted_in_bf16_is_exported_in_bf16(tmp_path):
    each = trained("qwen2", tmp_path, precision="bfloat16")
    for form in ("lora", "merged"):
        done = export(each.model, form, tmp_path / form, samples=SAMPLES)
        assert (done.dtype, done.precision, done.rounding.lost) == ("bfloat16", "bfloat16", 0)
    loaded = stock_lora(each.model.base, tmp_path / "lora", torch.bfloat16)
    assert_same_weights(loaded.merge_and_unload(), each.adapted)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), each.adapted)
    done = export(each.model, "delta", tmp_path / "delta", dtype="float32")
    # the base's files are float32, and what did not move is as they have it
    model = stock_model(each.model.base)
    apply_delta(tmp_path / "delta", model)
    for name, weight in model.named_parameters():
        if name in each.moved:
            expected, where = each.adapted.get_parameter(name).float(), each.moved[name]
            assert torch.equal(weight[where], expected[where]), name
        else:
            assert torch.equal(weight, base_model("qwen2").get_parameter(name)), name


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    each = with_new_values("llama", tmp_path, "layers.0.self_attn.q_proj.weight")
    save_file(
        {"model.layers.0.self_attn.q_proj.weight": torch.full((64, 64), 1e6)},
        each.model.kept / WEIGHTS,
    )
    with pytest.raises(ExportError, match=r"q_proj\.weight has values that float16 cannot hold"):
        export(each.model, "delta", tmp_path / "out", dtype="float16")


# -- what a LoRA cannot say --------------------------------------------------------------------


def test_biases_and_norms_that_moved_replace_their_modules_whole(tmp_path):
    each = with_new_values(
        "qwen2", tmp_path, "layers.1.self_attn.q_proj.bias", "layers.1.input_layernorm.weight"
    )
    done = export(each.model, "lora", tmp_path / "lora")
    at = "model.layers.1"
    assert set(done.whole) == {f"{at}.input_layernorm", f"{at}.self_attn.q_proj"}
    loaded = stock_lora(each.model.base, tmp_path / "lora")
    torch.testing.assert_close(logits_of(loaded), logits_of(each.adapted), atol=1e-6, rtol=1e-6)
    assert_same_weights(loaded.merge_and_unload(), each.adapted)


def test_a_bias_and_a_slice_of_one_layer_are_both_there(tmp_path):
    each = trained("qwen2", tmp_path)
    bias = "model.layers.2.self_attn.v_proj.bias"
    weights = dict(each.adapted.named_parameters())
    kept = {name: weights[name].detach().clone() for name in (*each.moved, bias)}
    kept[bias] += 0.5
    in_slice = next(name for name in each.moved if name.endswith("q_proj.weight"))
    kept[in_slice.replace("weight", "bias")] = weights[in_slice.replace("weight", "bias")] + 1
    (tmp_path / "whole").mkdir()
    save_file(kept, tmp_path / "whole" / WEIGHTS)
    each = made(replace(each.model, kept=tmp_path / "whole"))
    done = export(each.model, "lora", tmp_path / "lora")
    assert set(done.whole) == {n.rpartition(".")[0] for n in (bias, in_slice)}
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == set(done.whole)
    assert {f"{module}.weight" for module in config["target_modules"]} == set(each.moved) - {
        in_slice, in_slice.replace("weight", "bias"), bias
    }  # fmt: skip
    merged = stock_lora(each.model.base, tmp_path / "lora").merge_and_unload()
    assert_same_weights(merged, each.adapted)


def test_square_projections_that_moved_altogether_are_replaced_whole(tmp_path):
    each = trained("llama", tmp_path, "attention")
    done = export(each.model, "lora", tmp_path / "lora")
    square = {
        name.rpartition(".")[0] for name in each.moved if "q_proj" in name or "o_proj" in name
    }
    assert square <= set(done.whole)
    assert done.sizes["lora"] < 1.5 * sum(each.moved[name].numel() * 4 for name in each.moved)
    loaded = stock_lora(each.model.base, tmp_path / "lora").merge_and_unload()
    assert_same_weights(loaded, each.adapted)


def test_values_that_no_change_gives_exactly_replace_their_layer_whole(tmp_path):
    each = with_new_values("gpt2", tmp_path, "h.0.attn.c_attn.weight")
    name = "transformer.h.0.attn.c_attn.weight"
    base = base_model("gpt2").get_parameter(name).detach()
    tuned = base.clone()
    tuned[3] = 1e-12  # 1e-12 - 0.1 is -0.1 in float32
    save_file({name: tuned}, each.model.kept / WEIGHTS)
    each = made(each.model)
    done = export(each.model, "lora", tmp_path / "lora")
    assert (done.whole, done.rank) == (("transformer.h.0.attn.c_attn",), 0)
    loaded = stock_lora(each.model.base, tmp_path / "lora").merge_and_unload()
    assert_same_weights(loaded, each.adapted)


def test_a_moved_embedding_is_refused_as_a_lora_and_exported_otherwise(tmp_path):
    each = trained("llama", tmp_path, "full")
    with pytest.raises(ExportError, match=r"embed_tokens\.weight moved.*--as merged"):
        export(each.model, "lora", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    done = export(each.model, "merged", tmp_path / "merged")
    assert "embed_tokens" in done.no_lora
    assert (set(done.sizes), done.advised) == ({"merged", "delta"}, "merged")
    assert_same_weights(stock_model(tmp_path / "merged"), each.adapted)
    export(each.model, "delta", tmp_path / "delta")
    model = stock_model(each.model.base)
    apply_delta(tmp_path / "delta", model)
    assert_same_weights(model, each.adapted)


def test_a_weight_that_modules_share_is_refused_as_a_lora(tmp_path):
    # GPT-2's output layer is its embedding
    each = with_new_values("gpt2", tmp_path, "wte.weight")
    with pytest.raises(ExportError, match=r"transformer\.wte\.weight moved"):
        export(each.model, "lora", tmp_path / "lora")
    export(each.model, "merged", tmp_path / "merged")
    assert_same_weights(stock_model(tmp_path / "merged"), each.adapted)


def test_what_was_trained_as_a_lora_is_exported_as_that_lora(tmp_path):
    each = trained("llama", tmp_path, "lora")
    done = export(each.model, "lora", tmp_path / "lora", base_name="named")
    file = "adapter_model.safetensors"
    kept = each.model.kept / ADAPTER
    assert (tmp_path / "lora" / file).read_bytes() == (kept / file).read_bytes()
    assert done.sizes["lora"] == (kept / file).stat().st_size
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("named", 8)
    export(each.model, "merged", tmp_path / "merged")
    assert_same_weights(stock_model(tmp_path / "merged"), each.adapted)


# -- what is not right is not kept -------------------------------------------------------------


def test_an_export_that_drops_something_is_found_when_it_is_read_back(tried, tmp_path, monkeypatch):
    def drop_one(model, parts, base, folder, *base_name):
        fewer = dict(parts.slices.blocks)
        fewer.pop(max(fewer))
        replace(parts, slices=type(parts.slices)(fewer)).write(base, folder, *base_name)

    monkeypatch.setattr(exporting, "_write_lora", drop_one)
    with pytest.raises(ExportError, match=r"v_proj\.weight is not bit for bit.*--as merged"):
        export(tried["llama"].model, "lora", tmp_path)


def test_a_model_that_did_not_move_is_refused(tmp_path):
    each = with_new_values("llama", tmp_path, "layers.0.self_attn.q_proj.weight")
    weight = base_model("llama").get_parameter("model.layers.0.self_attn.q_proj.weight")
    save_file({"model.layers.0.self_attn.q_proj.weight": weight}, each.model.kept / WEIGHTS)
    with pytest.raises(ExportError, match="nothing moved"):
        export(each.model, "delta", tmp_path / "out")


def test_a_disk_without_room_is_said_before_anything_is_written(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "free_bytes", lambda folder: 1000)
    with pytest.raises(StorageError, match=r"takes 0\.\d MB.*--to"):
        export(tried["llama"].model, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
