"""Whether a model folder is whole: no tensor is missing, of another shape, or not finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from p2d_core.attention.layout import (
    AttentionLayer,
)
from p2d_core.errors import ModelError
from p2d_core.models.folder import IN_FILES, n_tensors, not_whole, said, weight_files
from p2d_core.models.load import load_tokenizer
from p2d_core.models.shape import attention_of, without_weights
from p2d_core.progress import Progress, no_progress
from p2d_core.samples.tokens import (
    Encoder,
)


def check_loads(folder: Path, progress: Progress = no_progress) -> tuple[AttentionLayer, ...]:
    """Whether heads can be found in the model, and whether its files are whole and fit together.

    Reads the weights once, a tensor at a time, and keeps none.

    Args:
        progress: is told of tensors.

    Raises:
        UnsupportedModelError: single heads cannot be found in its attention.
        ModelError: transformers cannot make a model or a tokenizer of the folder, or weights are
            missing, of another shape or no numbers.
    """
    weights = weight_files(folder)
    model = without_weights(folder)
    layers = attention_of(model, folder)
    _check_weights(folder)
    _check_numbers(weights, progress)
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer)
    known = model.get_input_embeddings().weight.shape[0]
    # Gemma 3's text models share a tokenizer with those that see pictures: it may have a token more
    added = tokenizer.get_added_vocab()
    of_texts = [number for token, number in tokenizer.get_vocab().items() if token not in added]
    last = max([*of_texts, *encoder.always_used])
    if last >= known:
        raise ModelError(
            f"{folder}: its tokenizer has the token {last}, but the model knows {known} tokens. "
            "Give the tokenizer that the model was trained with."
        )
    return layers


def stored_precision(folder: Path) -> str:
    """The precision that most of the weights are kept in; float32 for any not in `DTYPES`.

    Raises:
        ModelError: the weights are not whole.
    """
    counted: Counter[str] = Counter()
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                counted.update(tensors.get_slice(name).get_dtype() for name in names)
        except (OSError, SafetensorError) as error:
            raise not_whole(file, error) from error
    return IN_FILES.get(counted.most_common(1)[0][0], "float32") if counted else "float32"


def _check_weights(folder: Path) -> None:
    """That every parameter of the model has its tensor, of its shape; loads none of them."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            device_map="meta",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{folder}: transformers cannot load it: {said(error)}") from error
    found = loaded[1]
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"{folder}: the weights lack {missing[0]} ({len(missing)} tensors in all), which its "
            "config.json asks for. They would be random. Save the model again, or mend config.json."
        )
    if found["mismatched_keys"]:
        name, theirs, due = min(found["mismatched_keys"])
        raise ModelError(
            f"{folder}: the weights have {name} in the shape {list(theirs)}, by its config.json it "
            f"has to be {list(due)}. Save the model again, or mend config.json."
        )


def _check_numbers(weights: Sequence[Path], progress: Progress) -> None:
    total = sum(map(n_tensors, weights))
    done = 0
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not _is_finite(tensor):
                    raise ModelError(
                        f"{file}: {name} has values that are not numbers (NaN or infinite). "
                        "The model is broken: save or download it again."
                    )
                done += 1
                progress(done, total)


def _is_finite(tensor: Tensor) -> bool:
    # torch does not look into the 8-bit types
    return bool((tensor.float() if tensor.element_size() < 2 else tensor).isfinite().all())
