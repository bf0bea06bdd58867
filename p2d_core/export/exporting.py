"""An adapted model in a form that other tools load, read back and compared before it counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2d_core.adaptation.adaptations import ADAPTER, adapted
from p2d_core.errors import ExportError, StorageError
from p2d_core.export.delta import apply_delta, delta_bytes, write_delta
from p2d_core.export.lora import WEIGHTS, LoraParts, copy_low_rank, lora_parts
from p2d_core.export.moved import Moved, what_moved, write_moved
from p2d_core.export.rounding import Rounding, Shift, logits_of, rounded, shift
from p2d_core.models import DTYPES, load_model, load_tokenizer, stored_precision
from p2d_core.progress import Progress, no_progress
from p2d_core.samples.tokens import EncodedSample
from p2d_core.store.room import free_bytes

FORMS = ("lora", "merged", "delta")
STEPS = 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class AdaptedModel:
    """An adapted model as the store keeps it."""

    base: Path
    base_sha256: str
    precision: str
    """That it was adapted and evaluated in."""
    kept: Path
    """Folder of the `model` artifact."""
    low_rank: bool = False
    """It was trained as a LoRA, and is kept as that."""

    @property
    def usual_dtype(self) -> str:
        """In which the base is loaded by those who do not ask for another."""
        return self.precision if self.precision != "float32" else stored_precision(self.base)


@dataclass(frozen=True)
class Exported:
    """What was written, and what it was found to be."""

    form: str
    dtype: str
    precision: str
    """That the model was adapted in."""
    sizes: Mapping[str, int]
    """Bytes of each form's numbers; without ``lora`` where no LoRA says what moved."""
    no_lora: str
    """Why there is none; empty if there is."""
    rank: int
    """The largest rank of the LoRA; 0 where it was trained as one."""
    whole: tuple[str, ...]
    """Modules that the LoRA replaces whole."""
    rounding: Rounding
    as_loaded: Shift | None
    """Of the logits, when it is loaded as its card says; None without samples."""
    when_merged: Shift | None
    """Of a LoRA's, after it was merged into the base."""
    compared: bool
    """Every weight was found to be what it has to be, bit for bit."""

    @property
    def advised(self) -> str:
        """The smaller of the forms that need no code to load."""
        ready = [form for form in ("lora", "merged") if form in self.sizes]
        return min(ready, key=lambda form: self.sizes[form])


def export(
    model: AdaptedModel,
    form: str,
    folder: Path,
    *,
    dtype: str | None = None,
    base_name: str = "",
    base_revision: str = "",
    samples: Sequence[EncodedSample] = (),
    progress: Progress = no_progress,
) -> Exported:
    """Writes one of `FORMS` into a folder, loads it again, and compares every weight.

    Loaded in ``dtype``, and merged, an export has the adapted model's moved weights rounded to
    ``dtype`` bit for bit; what did not move is the base's own. A LoRA keeps its changes in float32
    whatever ``dtype`` is, so that they are rounded only when they are merged. One that was trained
    as a LoRA is that very adapter, and is not compared in another precision than it was trained in.

    It takes the memory of two models, on the CPU.

    Args:
        dtype: one of `DTYPES`; `AdaptedModel.usual_dtype` if None.
        base_name: what whoever loads it finds the base by; its folder if empty.
        base_revision: commit of the base, where that is a name on a hub.
        samples: a few, to compare logits on.

    Raises:
        ExportError: nothing moved, the form cannot say what moved, the numbers do not fit
            ``dtype``, or what is read back is not what was written.
        StorageError: there is no room for it.
    """
    dtype = dtype or model.usual_dtype
    base_name = base_name or str(model.base)
    base = load_model(model.base, model.precision, CPU)
    tuned = adapted(load_model(model.base, model.precision, CPU), model.kept)
    expected = logits_of(tuned, samples)
    progress(1, STEPS)
    moved = what_moved(base, _merged(tuned))
    del tuned
    if not moved:
        raise ExportError(f"the model in {model.kept} is its base: nothing moved in training.")
    rounding = rounded(moved, base, DTYPES[dtype])
    if dtype != model.precision:
        base = load_model(model.base, dtype, CPU)
    parts, no_lora = _parts(model, moved, base)
    sizes = _sizes(model, moved, base, parts, DTYPES[dtype])
    if form == "lora" and no_lora:
        raise ExportError(f"{no_lora} Use --as merged or --as delta.")
    _check_room(folder, sizes[form])
    progress(2, STEPS)
    if form == "lora":
        _write_lora(model, parts, base, folder, base_name, base_revision)
    write_moved(moved, base)
    _check_finite(base, dtype)
    if form == "merged":
        base.save_pretrained(str(folder))
        load_tokenizer(model.base).save_pretrained(str(folder))
    if form == "delta":
        write_delta(moved, DTYPES[dtype], folder, base_name, model.base_sha256, base_revision)
    progress(3, STEPS)
    loaded = _loaded(form, folder, model.base, dtype)
    as_loaded = shift(expected, logits_of(loaded, samples))
    progress(4, STEPS)
    when_merged = None
    if form == "lora":
        loaded = _merged(loaded)
        when_merged = shift(expected, logits_of(loaded, samples))
    compared = not (form == "lora" and model.low_rank and dtype != model.precision)
    if compared:
        _compare(base, loaded, form)
    progress(STEPS, STEPS)
    return Exported(
        form=form,
        dtype=dtype,
        precision=model.precision,
        sizes=sizes,
        no_lora=no_lora,
        rank=parts.rank if parts else 0,
        whole=tuple(parts.whole) if parts else (),
        rounding=rounding,
        as_loaded=as_loaded,
        when_merged=when_merged,
        compared=compared,
    )


def _merged(model: Any) -> Any:
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _parts(model: AdaptedModel, moved: Moved, base: nn.Module) -> tuple[LoraParts | None, str]:
    """None where it is a LoRA as it is, or no LoRA says it; why it does not."""
    if model.low_rank:
        return None, ""
    try:
        return lora_parts(moved, base), ""
    except ExportError as error:
        return None, str(error)


def _sizes(
    model: AdaptedModel,
    moved: Moved,
    base: nn.Module,
    parts: LoraParts | None,
    dtype: torch.dtype,
) -> dict[str, int]:
    sizes = {}
    if model.low_rank:
        sizes["lora"] = (model.kept / ADAPTER / WEIGHTS).stat().st_size
    elif parts is not None:
        sizes["lora"] = parts.n_bytes
    sizes["merged"] = sum(each.numel() * each.itemsize for each in base.parameters())
    sizes["delta"] = delta_bytes(moved, dtype)
    return sizes


def _check_room(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if needed > free:
        raise StorageError(
            f"the export takes {needed / 1e6:,.1f} MB, but {folder.parent} has "
            f"{free / 1e6:,.1f} MB free. Make room there, or name another folder with --to."
        )


def _write_lora(
    model: AdaptedModel,
    parts: LoraParts | None,
    base: nn.Module,
    folder: Path,
    base_name: str,
    base_revision: str,
) -> None:
    if parts is None:
        copy_low_rank(model.kept / ADAPTER, folder, base_name, base_revision)
    else:
        parts.write(base, folder, base_name, base_revision)


def _loaded(form: str, folder: Path, base: Path, dtype: str) -> Any:
    """As stock tools load it; a delta as its card does."""
    if form == "merged":
        return load_model(folder, dtype, CPU)
    model = load_model(base, dtype, CPU)
    if form == "delta":
        apply_delta(folder, model)
        return model
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT asks transformers for a name that it is about to rename
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return PeftModel.from_pretrained(model, str(folder)).eval()


def _check_finite(model: nn.Module, dtype: str) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ExportError(
                f"{name} has values that {dtype} cannot hold. Use --dtype bfloat16 or float32."
            )


def _compare(expected: nn.Module, loaded: nn.Module, form: str) -> None:
    found: dict[str, Tensor] = dict(loaded.named_parameters())
    for name, weight in expected.named_parameters():
        if name not in found or not torch.equal(weight, found[name]):
            others = [each for each in ("merged", "delta") if each != form]
            raise ExportError(
                f"read back, {name} is not bit for bit what was to be exported as {form}: nothing "
                f"was kept. Use --as {' or --as '.join(others)}."
            )
