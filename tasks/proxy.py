"""The proxy run: all attention projections, tuned shortly on the proxy samples; or the heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from p2d_core.adaptation.adaptations import SLICES, Attention, attention_slices
from p2d_core.adaptation.masked import attach_head_deltas
from p2d_core.adaptation.slices import TunedSlices
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.attention.layout import Roles, attention_layers
from p2d_core.heads.head_map import HEADS, read_head_map
from p2d_core.models import CapturedModel, load_model
from p2d_core.samples.tokens import EncodedSample
from p2d_core.store import ArtifactRef, Making
from tasks.elsewhere import as_it_is
from tasks.progress import progress_of
from tasks.room import of_attention, of_heads
from tasks.samples import target_part
from tasks.stage import BaseModel, Runtime, stage
from tasks.together import together

if TYPE_CHECKING:
    from p2d_core.adaptation.training import TrainingResult

CURVE, HELD_OUT = "loss.json", "held_out.json"


@stage("proxy", version="2", room=of_attention, sent=as_it_is, together=True)
def proxy_run(
    making: Making, runtime: Runtime, base: BaseModel, target: ArtifactRef, training: TrainingSpec
) -> None:
    """Keeps the tuned attention slices, not a second whole model, and the loss curve."""
    captured = base.captured(runtime)
    model = load_model(captured.folder, "float32", captured.device)
    layers = attention_layers(model)
    Attention().attach(model, layers, None, base.folder)
    if _tune(making, runtime, captured, model, target, training, "proxy"):
        attention_slices(model, layers).save(making.folder / SLICES)


@stage("head_proxy", version="2", room=of_heads, sent=as_it_is, together=True)
def head_proxy_run(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    heads: ArtifactRef,
    target: ArtifactRef,
    slices: Roles,
    training: TrainingSpec,
    searched: ArtifactRef | None,
) -> None:
    """The task heads' slices alone, tuned on the proxy set, for scorers that look through them.

    Taken from ``searched`` where the search for a rate has done the same training.
    """
    if searched is not None:
        if not together(runtime.parallel).first:
            return
        for name in (SLICES, CURVE, HELD_OUT):
            shutil.copyfile(searched.path / name, making.folder / name)
        making.facts |= json.loads((searched.path / HELD_OUT).read_text(encoding="utf-8"))
        # its own seconds are those of copying
        making.facts["training_seconds"] = searched.manifest.facts.get("training_seconds")
        _note_size(making, TunedSlices.load(making.folder / SLICES))
        return
    captured = base.captured(runtime)
    model = load_model(captured.folder, base.precision, captured.device)
    head_map = read_head_map(heads.path / HEADS)
    deltas = attach_head_deltas(model, attention_layers(model), head_map.task_heads, slices)
    if _tune(making, runtime, captured, model, target, training, "head_proxy"):
        tuned = deltas.tuned()
        tuned.save(making.folder / SLICES)
        _note_size(making, tuned)


def _note_size(making: Making, tuned: TunedSlices) -> None:
    making.facts["trainable"] = sum(block.values.numel() for block in tuned.blocks.values())


def slices_in(ref: ArtifactRef) -> TunedSlices:
    """What a proxy or head_proxy run keeps."""
    return TunedSlices.load(ref.path / SLICES)


def _tune(
    making: Making,
    runtime: Runtime,
    captured: CapturedModel,
    model: torch.nn.Module,
    target: ArtifactRef,
    training: TrainingSpec,
    name: str,
) -> bool:
    """Whether this is the process that keeps what was tuned."""
    # seconds to import, and a run that reuses everything does without
    from p2d_core.adaptation.training import train

    encoded = captured.encode(target_part(target, "proxy"))
    processes = together(runtime.parallel)
    held_out = captured.encode(target_part(target, "held_out"))
    before = mean_loss(captured, model, held_out) if processes.first else 0.0
    with progress_of(name) as progress:
        result = train(
            model,
            encoded,
            training,
            pad_id=captured.pad_id,
            scratch=making.scratch,
            checkpoint_seconds=runtime.checkpoint_seconds,
            mixed_precision=captured.precision == "bfloat16",
            gradient_checkpointing=runtime.gradient_checkpointing,
            micro_batch_tokens=runtime.micro_batch_tokens,
            progress=progress,
            processes=processes,
        )
    if not processes.first:
        return False
    making.seconds_before = result.seconds_before
    making.facts |= write_learnt(
        result, before, mean_loss(captured, model, held_out), making.folder
    )
    making.samples, making.tokens = len(encoded), result.tokens
    return True


def write_learnt(
    result: TrainingResult, before: float, after: float, folder: Path
) -> dict[str, Any]:
    """Writes the loss curve with the held-out losses in it, and these alone; returns them."""
    from p2d_core.adaptation.training import write_curve

    result.curve[-1]["eval_loss"] = after
    start = {"step": 0.0, "epoch": 0.0, "eval_loss": before}
    write_curve([start, *result.curve], folder)
    facts = {"held_out_loss_before": before, "held_out_loss_after": after, "steps": result.steps}
    (folder / HELD_OUT).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return facts


def mean_loss(
    captured: CapturedModel, model: torch.nn.Module, encoded: list[EncodedSample]
) -> float:
    """Of the samples' own mean losses, in nats a response token."""
    return float(captured.losses_of(model, encoded).mean())
