"""Base models: checked before anything starts, hashed by content, loaded from safetensors only."""

from __future__ import annotations

import functools
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from p2d_core.adaptation.slices import TunedSlices
from p2d_core.aer import in_turn
from p2d_core.attention.layout import (
    AttentionLayer,
    all_heads,
    attention_layers,
    projection_weights,
    slices_of,
)
from p2d_core.errors import ModelError, NumericalError, UnsupportedModelError
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
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model_folder(folder: Path) -> None:
    """Refuses what cannot be loaded safely, without loading it.

    Raises:
        ModelError: no folder, no config, no tokenizer, code of its own, or pickled weights only.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: there is no such folder. Give as `base` the folder of a Hugging Face "
            "model, with config.json, safetensors weights and a tokenizer."
        )
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder}: has no config.json. Give a folder that save_pretrained wrote.")
    if not isinstance(_json_object(config).get("model_type"), str):
        raise ModelError(f"{config}: has no `model_type`. Give a folder of a Hugging Face model.")
    for name in CONFIGS:
        if (folder / name).is_file():
            _refuse_code(folder / name)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: is an adapter or holds one (adapter_config.json), which could name another "
            "base. Merge it into its base and save that, or move the adapter's files elsewhere."
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


def _json_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is not JSON ({error}). Save the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: is not a JSON object. Save the model again.")
    return values


def _refuse_code(file: Path) -> None:
    """Refuses a config that names code of its own, or an attention that is fetched from a hub."""
    waiting: list[Any] = [_json_object(file)]
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


def most_tokens(folder: Path) -> int:
    """How many tokens the model's positions reach; without a limit in its config, very many.

    Raises:
        ModelError: the limit is no number of tokens.
    """
    limit = _json_object(folder / "config.json").get("max_position_embeddings")
    if limit is None:
        return sys.maxsize
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ModelError(
            f"{folder / 'config.json'}: `max_position_embeddings` is {limit!r}; it has to be a "
            "number of tokens. Save the model again."
        )
    return limit


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
    weights = _weight_files(folder)
    n_tensors = _n_tensors(weights)
    config_file = folder / "config.json"
    n_layers = _json_object(config_file).get("num_hidden_layers")
    if isinstance(n_layers, int) and n_layers > n_tensors:
        raise ModelError(
            f"{config_file}: `num_hidden_layers` is {n_layers}, but the weights are {n_tensors} "
            "tensors in all. Save the model again."
        )
    model = without_weights(folder)
    layers = _attention_of(model, folder)
    _check_weights(folder)
    _check_numbers(weights, n_tensors, progress)
    tokenizer = load_tokenizer(folder)
    Encoder(tokenizer)
    known = model.get_input_embeddings().weight.shape[0]
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= known:
        raise ModelError(
            f"{folder}: its tokenizer has the token {last}, but the model knows {known} tokens. "
            "Give the tokenizer that the model was trained with."
        )
    return layers


def layers_of(folder: Path) -> tuple[AttentionLayer, ...]:
    """Where the model's heads are, from its config alone; raises as `check_loads`."""
    return _attention_of(without_weights(folder), folder)


def _attention_of(model: Any, folder: Path) -> tuple[AttentionLayer, ...]:
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
            f"{folder}: transformers cannot make a model of its config.json: {_said(error)} "
            "Save the model again."
        ) from error


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:500].rstrip(".")
    return f"{type(error).__name__}{': ' if text else ''}{text}."


def _weight_files(folder: Path) -> list[Path]:
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
    named = _json_object(index).get("weight_map")
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


def _n_tensors(weights: Sequence[Path]) -> int:
    n_tensors = 0
    for file in weights:
        try:
            with safe_open(file, framework="pt") as tensors:
                n_tensors += len(list(tensors.keys()))
        except (OSError, SafetensorError) as error:
            raise _not_whole(file, error) from error
    return n_tensors


def stored_precision(folder: Path) -> str:
    """The precision that most of the weights are kept in; float32 for any not in `DTYPES`.

    Raises:
        ModelError: the weights are not whole.
    """
    counted: Counter[str] = Counter()
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                counted.update(tensors.get_slice(name).get_dtype() for name in names)
        except (OSError, SafetensorError) as error:
            raise _not_whole(file, error) from error
    return IN_FILES.get(counted.most_common(1)[0][0], "float32") if counted else "float32"


def _not_whole(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file}: not a whole safetensors file ({_said(error)}) Copy or save the model again."
    )


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
        raise ModelError(f"{folder}: transformers cannot load it: {_said(error)}") from error
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


def _check_numbers(weights: Sequence[Path], n_tensors: int, progress: Progress) -> None:
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
                progress(done, n_tensors)


def _is_finite(tensor: Tensor) -> bool:
    # torch does not look into the 8-bit types
    return bool((tensor.float() if tensor.element_size() < 2 else tensor).isfinite().all())


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
            f"{folder}: its tokenizer cannot be loaded: {_said(error)} "
            "Save it again beside the model: tokenizer.save_pretrained(...)."
        ) from error


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
        with in_turn(self._running):
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
            with in_turn(self._running):
                return work(batch)

        return each_batch(encoded, self.budget, of)

    @contextmanager
    def looking_through(self, *, tuned: bool) -> Iterator[None]:
        """With ``tuned`` the task heads' tuned slices stand in the model while the block runs."""
        if tuned and self.tuned is None:
            raise ValueError("this model was made without tuned slices")
        with (
            in_turn(self._running),
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
        return checked_losses(losses.cpu(), encoded)


def checked_losses(losses: Tensor, encoded: Sequence[EncodedSample]) -> Tensor:
    """The losses as they are, if all are numbers.

    Raises:
        NumericalError: names the first sample whose loss is none.
    """
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise NumericalError(
            f"the loss of {len(bad)} of {len(encoded)} responses is no number; the first, of "
            f"sample {encoded[first].sample_id[:12]}, is {float(losses[first])}. Look at that "
            "sample and at the weights of the model, lower the learning rate if it was tuned, or "
            "use precision: float32."
        )
    return losses
