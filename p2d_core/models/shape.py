"""What a model consists of, from its config alone."""

from __future__ import annotations

import functools
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
from p2d_core.models.folder import said


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


def without_weights(folder: Path) -> Any:
    """The model that a folder's config makes, on the meta device.

    Raises:
        ModelError: transformers cannot make a model of the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:
        # a config can be wrong in more ways than transformers looks for
        raise ModelError(
            f"{folder}: transformers cannot make a model of its config.json: {said(error)} "
            "Save the model again."
        ) from error
