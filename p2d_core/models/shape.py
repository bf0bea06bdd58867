"""What a model consists of, from its config alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from p2d_core.attention.layout import (
    AttentionLayer,
    all_heads,
    attention_layers,
    projection_weights,
    slices_of,
)
from p2d_core.errors import ModelError, SettingsError, UnsupportedModelError
from p2d_core.models.folder import json_object, n_tensors, said, weight_files

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""What configs call the tokens that positions reach; transformers takes GPT-2's ``n_positions`` for
the first."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
"""What config.json calls the number of layers."""


def layers_of(folder: Path) -> tuple[AttentionLayer, ...]:
    """Where the model's heads are, from its config alone; raises as `check_loads`."""
    return attention_of(without_weights(folder), folder)


def attention_of(model: Any, folder: Path) -> tuple[AttentionLayer, ...]:
    try:
        return attention_layers(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{folder}: {error} Use another base model.") from error


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model has, without loading them."""

    total: int
    layers: tuple[AttentionLayer, ...]
    width: int
    """Of the residual stream: what a row of q, k and v and a column of o have."""

    @property
    def attention(self) -> int:
        """In all q, k, v and o projections."""
        return self.of_heads(all_heads(self.layers))

    def of_heads(self, heads: Iterable[tuple[int, int]]) -> int:
        """In these heads' slices, of their KV groups all."""
        pieces = slices_of(self.layers, [(layer, head) for layer, head in heads])
        return sum(piece.stop - piece.start for piece in pieces) * self.width


@functools.lru_cache(maxsize=4)
def parameter_counts(folder: Path) -> ParameterCounts:
    """From the model's config alone.

    Raises:
        ModelError: as `check_loads`.
    """
    model = without_weights(folder)
    layers = attention_layers(model)
    width = projection_weights(model, layers[0])["q"].shape[1]
    return ParameterCounts(sum(each.numel() for each in model.parameters()), layers, width)


def check_gradient_checkpointing(folder: Path) -> None:
    """That the layers of the model can be run twice in place of keeping what they compute.

    Raises:
        SettingsError: they cannot.
    """
    model = without_weights(folder)
    if not model.supports_gradient_checkpointing:
        raise SettingsError(
            f"training.gradient_checkpointing: {type(model).__name__} of {folder} cannot run its "
            "layers twice. Leave it out; a smaller training.batch_size takes less memory too."
        )


def most_tokens(folder: Path) -> int:
    """How many tokens the model's positions reach; without a limit in its config, very many.

    Of LongRoPE (Phi-3) as many as it was made for: where a sample has more, transformers takes
    other factors for all of its batch, and what is measured of the others would depend on it.

    Raises:
        ModelError: transformers cannot read the config, or the limit is no number of tokens.
    """
    config = config_of(folder)
    name, limit = positions_of(config)
    if limit is None:
        return sys.maxsize
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ModelError(
            f"{folder / 'config.json'}: `{name}` is {limit!r}; it has to be a number of tokens. "
            "Save the model again."
        )
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
        made_for = rope.get("original_max_position_embeddings")
        return min(limit, made_for) if isinstance(made_for, int) and made_for > 0 else limit
    return limit


def vocabulary_of(folder: Path) -> int | None:
    """How many tokens the model knows, if there is a config.json that says so.

    Raises:
        ModelError: it is not JSON.
    """
    config = folder / "config.json"
    size = json_object(config).get("vocab_size") if config.exists() else None
    return size if isinstance(size, int) else None


def positions_of(config: Any) -> tuple[str, Any]:
    """What a config calls the tokens that positions reach, and how many it says; None: no limit."""
    text = config.get_text_config()
    for name in POSITIONS:
        if (limit := getattr(text, name, None)) is not None:
            return text.attribute_map.get(name, name), limit
    return POSITIONS[0], None


def without_weights(folder: Path) -> Any:
    """The model that a folder's config makes, on the meta device.

    Raises:
        ModelError: transformers cannot make a model of the config.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(folder)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise _no_model(folder, error) from error


def config_of(folder: Path) -> Any:
    """The config of a model folder, as transformers reads it.

    Raises:
        ModelError: transformers cannot read it, or it has more layers than the weights have
            tensors.
    """
    from transformers import AutoConfig

    # first: transformers' own configs list their layers, and a billion of them fill the memory
    _check_layers(folder)
    try:
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        config.get_text_config()  # fails where there are several
        return config
    except Exception as error:
        raise _no_model(folder, error) from error


def _no_model(folder: Path, error: Exception) -> ModelError:
    # a config can be wrong in more ways than transformers looks for
    return ModelError(
        f"{folder}: transformers cannot make a model of its config.json: {said(error)} "
        "Save the model again."
    )


def _check_layers(folder: Path) -> None:
    file = folder / "config.json"
    values = json_object(file)
    total = sum(map(n_tensors, weight_files(folder)))
    # one of a model for more than texts has its parts inside
    for part in (values, *(each for each in values.values() if isinstance(each, dict))):
        for name in LAYERS:
            n_layers = part.get(name)
            if isinstance(n_layers, int) and n_layers > total:
                raise ModelError(
                    f"{file}: `{name}` is {n_layers}, but the weights are {total} tensors in all. "
                    "Save the model again."
                )
