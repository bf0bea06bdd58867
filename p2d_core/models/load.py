"""Models and tokenizers as transformers loads them, from safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from p2d_core.errors import ModelError
from p2d_core.models.folder import DTYPES, check_model_folder, said


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {name!r} cannot be used ({error}). Use `device: auto`."
        ) from error
    if device.type == "cuda" and device.index:
        raise ModelError(
            f"device {name!r} cannot be used: training takes the first GPU that it sees. "
            f"Set CUDA_VISIBLE_DEVICES={device.index} and `device: cuda`."
        )
    return device


def load_model(folder: Path, precision: str, device: torch.device) -> Any:
    """A causal language model in evaluation mode.

    Its attention is what transformers takes by itself: SDPA where the family has it.

    Raises:
        ModelError: transformers cannot make a model of the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    check_model_folder(folder)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=DTYPES[precision],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: transformers cannot load it: {error}") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: transformers cannot make a tokenizer of the folder.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # the tokenizers library raises nothing more special
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded: {said(error)} "
            "Save it again beside the model: tokenizer.save_pretrained(...)."
        ) from error
