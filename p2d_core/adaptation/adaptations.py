"""Adaptations: which parameters may move, and in what form what they became is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from p2d_core.adaptation.exact_lora import export_lora
from p2d_core.adaptation.masked import attach_head_deltas
from p2d_core.adaptation.slices import TunedSlices
from p2d_core.attention.layout import ROLES, AttentionLayer, Roles, all_heads, slices_of
from p2d_core.heads.head_map import HeadMap
from p2d_core.registry import Registry

ADAPTER = "adapter"
SLICES = "slices.safetensors"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Attached:
    """A model that is ready to be trained."""

    model: Any
    """What to train; the base itself, or the base in a wrapper."""
    keep: Callable[[Path], None]
    """Writes what moved into a folder, once training is done."""
    tuned: Callable[[], TunedSlices] | None = None
    """What the task heads' slices have become so far; None where something else moves."""


class Adaptation(Protocol):
    """Makes some of a model's parameters trainable."""

    version: str
    needs_heads: bool
    """False: the head map is not looked at, and not part of what the model is made from."""
    moves_weights: bool
    """True: the base's own weights move, and need float32 to add small steps up."""

    def attach(
        self, model: Any, layers: tuple[AttentionLayer, ...], heads: HeadMap | None, base: str
    ) -> Attached:
        """Leaves only what may move with ``requires_grad``. ``base`` is what exports name."""
        ...


adaptations: Registry[type[Any]] = Registry("adaptation")


@adaptations.register("heads")
@dataclass(frozen=True)
class Heads:
    """Only the task heads' slices: q rows, o columns, k and v rows of their KV groups.

    Kept as a plain PEFT adapter, exact: a set of rows or columns is a LoRA of that rank.
    Source: P2D, arXiv 2605.21558.
    """

    slices: Roles = ROLES
    """Which of a head's slices move: q and o are its own, k and v those of its KV group."""

    version: ClassVar[str] = "1"
    needs_heads: ClassVar[bool] = True
    moves_weights: ClassVar[bool] = False

    def attach(
        self, model: Any, layers: tuple[AttentionLayer, ...], heads: HeadMap | None, base: str
    ) -> Attached:
        """Deltas on the slices; see `attach_head_deltas`."""
        assert heads is not None
        deltas = attach_head_deltas(model, layers, heads.task_heads, self.slices)

        def keep(folder: Path) -> None:
            tuned = deltas.tuned()
            deltas.detach(merge=False)
            export_lora(tuned, model, folder / ADAPTER, base)

        return Attached(model, keep, deltas.tuned)


@adaptations.register("attention")
@dataclass(frozen=True)
class Attention:
    """The q, k, v and o projections of all heads, biases left alone."""

    version: ClassVar[str] = "1"
    needs_heads: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = True

    def attach(
        self, model: Any, layers: tuple[AttentionLayer, ...], heads: HeadMap | None, base: str
    ) -> Attached:
        """The projections' own weights."""
        model.requires_grad_(False)
        for layer in layers:
            for path in (layer.q, layer.k, layer.v, layer.o):
                model.get_submodule(path).weight.requires_grad_(True)
        return Attached(model, lambda folder: _keep_trainable(model, folder))


@adaptations.register("full")
@dataclass(frozen=True)
class Full:
    """Every parameter."""

    version: ClassVar[str] = "1"
    needs_heads: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = True

    def attach(
        self, model: Any, layers: tuple[AttentionLayer, ...], heads: HeadMap | None, base: str
    ) -> Attached:
        """The whole model."""
        model.requires_grad_(True)
        return Attached(model, lambda folder: _keep_trainable(model, folder))


@adaptations.register("lora")
@dataclass(frozen=True)
class Lora:
    """Low-rank updates of q, k, v and o in every layer. Source: arXiv 2106.09685, through PEFT."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(ge=1)] = 16
    seed: int = 0
    """Of the random half that an update begins with."""

    version: ClassVar[str] = "1"
    needs_heads: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False

    def attach(
        self, model: Any, layers: tuple[AttentionLayer, ...], heads: HeadMap | None, base: str
    ) -> Attached:
        """A PEFT model around the base."""
        from peft import LoraConfig, get_peft_model

        targets = [path for layer in layers for path in (layer.q, layer.k, layer.v, layer.o)]
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=targets, task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                wrapped = get_peft_model(model, config)
        wrapped.peft_config["default"].base_model_name_or_path = base

        def keep(folder: Path) -> None:
            # what PEFT would look up otherwise stands on a hub, under the base's name
            wrapped.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)

        return Attached(wrapped, keep)


def adapted(model: Any, folder: Path) -> Any:
    """The base with what a `model`, `proxy` or `head_proxy` artifact keeps; it is changed."""
    if (folder / SLICES).exists():
        TunedSlices.load(folder / SLICES).apply_(model)
        return model.eval()
    if (folder / ADAPTER).is_dir():
        from peft import PeftModel

        with warnings.catch_warnings():
            # PEFT asks transformers for a name that it is about to rename
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            return PeftModel.from_pretrained(model, str(folder / ADAPTER)).eval()
    kept = load_file(folder / WEIGHTS)
    unknown = model.load_state_dict(kept, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{folder / WEIGHTS} is of another model: it has {unknown[0]}")
    return model.eval()


def attention_slices(model: Any, layers: tuple[AttentionLayer, ...]) -> TunedSlices:
    """A copy of all heads' slices as they are now."""
    return TunedSlices.from_model(model, slices_of(layers, all_heads(layers)))


def n_trainable(model: Any) -> int:
    """How many numbers may move."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _keep_trainable(model: Any, folder: Path) -> None:
    save_file(
        {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
