"""Folders of base models: what lies in them, refused where it is not safe to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from p2d_core.errors import ModelError
from p2d_core.progress import Progress, no_progress
from p2d_core.store.recipe import hash_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IN_FILES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What safetensors calls the precisions."""
CONFIGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
PLAIN_ATTENTION = ("mxfp4",)
"""Ways to quantise that leave the attention as it is: gpt-oss has only its experts so."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model_folder(folder: Path) -> None:
    """Refuses what cannot be loaded safely, without loading it.

    Raises:
        ModelError: no folder, no config, no tokenizer, code of its own, or pickled weights only.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: there is no such folder. Give as `base` the folder of a Hugging Face "
            "model, with config.json, safetensors weights and a tokenizer; or hf://OWNER/NAME for "
            "one of the hub."
        )
    check_configs(folder)
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder}: has pickled weights only ({pickled[0]}); loading them can run code. "
                "Convert them once: model.save_pretrained(folder, safe_serialization=True)."
            )
        raise ModelError(f"{folder}: has no weights (*.safetensors). Save the model again.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(
            f"{folder}: has no tokenizer. Save it beside the model: tokenizer.save_pretrained(...)."
        )


def check_configs(folder: Path) -> None:
    """Refuses what the JSON files of a model folder say already; its weights may be missing yet.

    Raises:
        ModelError: no config, code of its own, an adapter, or quantised weights.
    """
    config = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: is an adapter or holds one (adapter_config.json), which could name another "
            "base. Merge it into its base and save that, or move the adapter's files elsewhere."
        )
    if not config.is_file():
        raise ModelError(f"{folder}: has no config.json. Give a folder that save_pretrained wrote.")
    values = json_object(config)
    if not isinstance(values.get("model_type"), str):
        raise ModelError(f"{config}: has no `model_type`. Give a folder of a Hugging Face model.")
    quantised = values.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if quantised and method not in PLAIN_ATTENTION:
        raise ModelError(
            f"{config}: its weights are quantised ({method}): the slices of a head could not be "
            "tuned. Take the checkpoint in bfloat16 or float32."
        )
    for name in CONFIGS:
        if (folder / name).is_file():
            _refuse_code(folder / name)


def json_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is not JSON ({error}). Save the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: is not a JSON object. Save the model again.")
    return values


def _refuse_code(file: Path) -> None:
    """Refuses a config that names code of its own, or an attention that is fetched from a hub."""
    waiting: list[Any] = [json_object(file)]
    while waiting:
        here = waiting.pop()
        for key, value in here.items() if isinstance(here, dict) else enumerate(here):
            if key == "auto_map":
                raise ModelError(
                    f"{file}: names code of its own (`auto_map`), which is never run. "
                    "Use a model that transformers knows, or remove auto_map if it does."
                )
            is_attention = isinstance(key, str) and key.endswith("attn_implementation")
            if is_attention and isinstance(value, str) and "/" in value:
                raise ModelError(
                    f"{file}: `{key}` is {value!r}, code that would be fetched from a hub and is "
                    f"never run. Remove {key}."
                )
            if isinstance(value, dict | list):
                waiting.append(value)


def said(error: Exception) -> str:
    text = " ".join(str(error).split())[:500].rstrip(".")
    return f"{type(error).__name__}{': ' if text else ''}{text}."


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the model is loaded from."""
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ModelError(
            f"{folder}: has neither model.safetensors nor model.safetensors.index.json. "
            "Give a folder that save_pretrained wrote."
        )
    named = json_object(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{index}: has no `weight_map`. Save the model again.")
    for name in set(map(str, named.values())):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: names {name!r}, which is no safetensors file of this folder. "
                "Save the model again."
            )
        if not (folder / name).is_file():
            raise ModelError(f"{index}: names {name}, which is not there. Copy it, too.")
    return sorted({folder / name for name in named.values()})


def n_tensors(file: Path) -> int:
    """How many tensors a safetensors file has, by its header.

    Raises:
        ModelError: it is not whole.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return len(list(tensors.keys()))
    except (OSError, SafetensorError) as error:
        raise not_whole(file, error) from error


def not_whole(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file}: not a whole safetensors file ({said(error)}) Copy or save the model again."
    )


def model_hash(folder: Path, progress: Progress = no_progress) -> str:
    """SHA-256 (hex) over config, weights and tokenizer: the same wherever the folder lies."""
    kept = (".json", ".safetensors", ".txt", ".model", ".jinja")
    files = [file for file in folder.iterdir() if file.suffix in kept and file.is_file()]
    return hash_files(files, progress)
