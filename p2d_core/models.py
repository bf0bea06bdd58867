"""Base models: checked before anything starts, hashed by content, loaded from safetensors only."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2d_core.adaptation.slices import TunedSlices
from p2d_core.attention.layout import AttentionLayer, attention_layers
from p2d_core.errors import ModelError
from p2d_core.progress import Progress, no_progress
from p2d_core.response_loss import response_losses
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import (
    EncodedSample,
    Encoder,
    TextFormat,
    TokenBudget,
    collate,
    each_batch,
)
from p2d_core.store.recipe import hash_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model_folder(folder: Path) -> None:
    """Refuses what cannot be loaded safely, without loading it.

    Raises:
        ModelError: no folder, no config, no tokenizer, code of its own, or pickled weights only.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: there is no such folder. `base` is the folder of a Hugging Face model, "
            "with config.json, safetensors weights and a tokenizer."
        )
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder}: has no config.json. Give a folder that save_pretrained wrote.")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{config}: is not JSON ({error}). Save the model again.") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"{config}: has no `model_type`. Give a folder of a Hugging Face model.")
    if "auto_map" in values:
        raise ModelError(
            f"{config}: names code of its own (`auto_map`), which is never run. "
            "Use a model that transformers knows, or remove auto_map if it does."
        )
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


def most_tokens(folder: Path) -> int:
    """How many tokens the model's positions reach; without a limit in its config, very many."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or sys.maxsize)


def check_attention(folder: Path) -> tuple[AttentionLayer, ...]:
    """Where heads are in the model, from its config alone.

    Raises:
        UnsupportedModelError: single heads cannot be found in its attention.
        ModelError: transformers cannot make a model of the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: transformers cannot make a model of it: {error}") from error
    return attention_layers(model)


def model_hash(folder: Path, progress: Progress = no_progress) -> str:
    """SHA-256 (hex) over config, weights and tokenizer: the same wherever the folder lies."""
    kept = (".json", ".safetensors", ".txt", ".model", ".jinja")
    files = [file for file in folder.iterdir() if file.suffix in kept and file.is_file()]
    return hash_files(files, progress)


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
    """A causal language model in evaluation mode, attention through SDPA.

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
    except (OSError, ValueError, RuntimeError, KeyError) as error:
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
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


@dataclass
class CapturedModel:
    """A base model as scorers see it: loaded when first needed, never changed for long.

    Threads may share it: one at a time runs the model, while others read, encode and write.
    ``tuned`` holds the task heads' slices after the proxy set (head_proxy), for scorers that look
    through tuned heads.
    """

    folder: Path
    precision: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    text: TextFormat = field(default_factory=TextFormat)
    tokens_per_batch: int = 8192
    tuned: TunedSlices | None = None
    _running: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)
    _of_thread: threading.local = field(default_factory=threading.local, init=False, repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded without the weights."""
        return load_tokenizer(self.folder)

    @cached_property
    def encoder(self) -> Encoder:
        """From samples to token ids."""
        return Encoder(self.tokenizer, self.text)

    @cached_property
    def model(self) -> Any:
        """The weights, on the device."""
        with self._running:
            if "model" not in self.__dict__:  # another thread was first
                model = load_model(self.folder, self.precision, self.device)
                self.__dict__["model"] = model.requires_grad_(False)
        return self.__dict__["model"]

    @cached_property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """Where its heads are."""
        return attention_layers(self.model)

    @cached_property
    def budget(self) -> TokenBudget:
        """Of the batches: ``tokens_per_batch``, or less once memory ran out."""
        return TokenBudget(self.tokens_per_batch)

    @property
    def pad_id(self) -> int:
        """Token id that fills batches; never attended to."""
        return self.encoder.pad_id

    def encode(self, samples: Sequence[Sample]) -> list[EncodedSample]:
        """Token ids of each sample, in order; kept until the thread asks for other samples."""
        kept: tuple[Any, list[EncodedSample]] = getattr(self._of_thread, "encoded", (None, []))
        if kept[0] is not samples:
            kept = (samples, list(self.encoder.encode_all(samples)))
            self._of_thread.encoded = kept
        return kept[1]

    def each_batch(
        self, encoded: Sequence[EncodedSample], work: Callable[[dict[str, Tensor]], Tensor]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """What ``work`` makes of each collated batch (on the CPU), with positions in ``encoded``.

        Batches become smaller when memory runs out; see `p2d_core.samples.tokens.each_batch`.
        """

        def of(positions: list[int]) -> Tensor:
            batch = collate([encoded[i] for i in positions], self.pad_id)
            with self._running:
                return work(batch)

        return each_batch(encoded, self.budget, of)

    @contextmanager
    def looking_through(self, *, tuned: bool) -> Iterator[None]:
        """With ``tuned`` the task heads' tuned slices stand in the model while the block runs."""
        if tuned and self.tuned is None:
            raise ValueError("this model was made without tuned slices")
        with (
            self._running,
            self.tuned.applied(self.model) if tuned and self.tuned else nullcontext(),
        ):
            yield

    def response_losses(self, encoded: Sequence[EncodedSample]) -> Tensor:
        """Mean cross-entropy (nats) of each sample's response tokens, float32, shape ``[n]``."""
        return self.losses_of(self.model, encoded)

    def losses_of(self, model: nn.Module, encoded: Sequence[EncodedSample]) -> Tensor:
        """`response_losses` under another model on the same device, such as one in training."""

        def of(batch: dict[str, Tensor]) -> Tensor:
            return response_losses(model, {k: v.to(self.device) for k, v in batch.items()})

        losses = torch.empty(len(encoded), dtype=torch.float32, device=self.device)
        for positions, part in self.each_batch(encoded, of):
            losses[positions] = part.float()
        return losses.cpu()
