"""What a model's config alone says, in the words of every family."""

import json
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from p2d_core.errors import ModelError
from p2d_core.models import layers_of, most_tokens
from tests.families import FAMILIES, GROUPED, N_LAYERS


def folder_of(config, folder, **changes):
    """A model folder whose weights are no more than their number."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    save_file({f"weight{i}": torch.zeros(1) for i in range(30)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("family", "n_tokens"),
    [
        ("llama", 2048),  # transformers' default
        ("gpt2", 64),
        ("gpt_bigcode, by head", 64),
        ("codegen", 64),
        ("mpt", 64),
        ("bloom", sys.maxsize),  # its biases go as far as one likes
    ],
)
def test_positions_reach_as_far_as_the_familys_config_says(family, n_tokens, tmp_path):
    assert most_tokens(folder_of(FAMILIES[family].config(), tmp_path)) == n_tokens


def test_of_a_model_for_pictures_too_the_positions_of_its_text_count(tmp_path):
    config = hf.Gemma3Config(text_config=GROUPED | {"max_position_embeddings": 96})
    assert most_tokens(folder_of(config, tmp_path)) == 96


@pytest.mark.parametrize(("family", "n_tokens"), [("phi3", 32), ("qwen2", 256)])
def test_longrope_reaches_as_far_as_no_sample_changes_what_another_gets(family, n_tokens, tmp_path):
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": 32}
    if family == "phi3":
        longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        config = hf.Phi3Config(
            **GROUPED, max_position_embeddings=256, original_max_position_embeddings=32,
            rope_parameters=rope | longrope,
        )  # fmt: skip
    else:
        yarn = {"rope_type": "yarn", "factor": 8.0}
        config = hf.Qwen2Config(**GROUPED, max_position_embeddings=256, rope_parameters=rope | yarn)
    assert most_tokens(folder_of(config, tmp_path)) == n_tokens


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("mpt", "max_seq_len")],
)
def test_positions_that_are_no_number_of_tokens_are_refused_by_their_name(family, name, tmp_path):
    folder = folder_of(FAMILIES[family].config(), tmp_path, **{name: 0})
    with pytest.raises(
        ModelError, match=rf"config\.json: `{name}` is 0; it has to be a number of tokens\. Save"
    ):
        most_tokens(folder)


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2", "num_hidden_layers"), ("gpt2", "n_layer"), ("mpt", "n_layers")]
)
@pytest.mark.parametrize("look", [layers_of, most_tokens])
def test_a_billion_layers_are_refused_before_they_are_listed(family, name, look, tmp_path):
    config = FAMILIES[family].config()
    assert config.num_hidden_layers == N_LAYERS
    with pytest.raises(
        ModelError, match=rf"`{name}` is 1000000000, but the weights are 30 tensors in all\. Save"
    ):
        look(folder_of(config, tmp_path, **{name: 10**9}))


def test_a_billion_layers_of_a_part_are_refused_too(tmp_path):
    config = hf.Gemma3Config(text_config=GROUPED)
    folder = folder_of(config, tmp_path, text_config={"num_hidden_layers": 10**9})
    with pytest.raises(ModelError, match="`num_hidden_layers` is 1000000000, but the weights"):
        layers_of(folder)
