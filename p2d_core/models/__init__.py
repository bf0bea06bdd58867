"""Base models: their folders, how they are loaded, and how scorers see them."""

from p2d_core.models.captured import CapturedModel, checked_losses
from p2d_core.models.folder import DTYPES, check_model_folder, model_hash
from p2d_core.models.hub import download_model, hub_model_at_commit, is_hub_model
from p2d_core.models.load import load_model, load_tokenizer, pick_device
from p2d_core.models.shape import (
    ParameterCounts,
    check_gradient_checkpointing,
    layers_of,
    most_tokens,
    parameter_counts,
    positions_of,
    without_weights,
)
from p2d_core.models.whole import check_loads, stored_precision

__all__ = [
    "DTYPES",
    "CapturedModel",
    "ParameterCounts",
    "check_gradient_checkpointing",
    "check_loads",
    "check_model_folder",
    "checked_losses",
    "download_model",
    "hub_model_at_commit",
    "is_hub_model",
    "layers_of",
    "load_model",
    "load_tokenizer",
    "model_hash",
    "most_tokens",
    "parameter_counts",
    "pick_device",
    "positions_of",
    "stored_precision",
    "without_weights",
]
