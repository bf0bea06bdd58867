"""Fine-tuning of an arm, and what full fine-tuning would cost."""

from __future__ import annotations

import heapq
import json
from dataclasses import asdict

import pyarrow.parquet as pq

from p2d_core.adaptation.adaptations import adaptations, n_trainable
from p2d_core.adaptation.calibration import UNTIMED_STEPS, calibrate_full
from p2d_core.adaptation.like_length import BATCHES
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.aer import Reference
from p2d_core.attention.layout import attention_layers, projection_weights
from p2d_core.models import load_model
from p2d_core.samples.schema import Sample, from_table
from p2d_core.selection.subset import SUBSET
from p2d_core.store import ArtifactRef, Making
from tasks.elsewhere import as_it_is
from tasks.heads import head_map_in
from tasks.progress import progress_of
from tasks.room import of_model
from tasks.samples import all_samples, target_part
from tasks.stage import BaseModel, Plugin, Runtime, stage
from tasks.together import together

REFERENCE = "reference.json"


@stage(
    "model", version="3", outside_key=("heads", "arm"), room=of_model, sent=as_it_is, together=True
)
def fine_tune(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    samples: ArtifactRef,
    adaptation: Plugin,
    task_heads: tuple[tuple[int, int], ...],
    training: TrainingSpec,
    heads: ArtifactRef | None,
    target: ArtifactRef | None,
    arm: str,
) -> None:
    """Trains on a subset (or a whole corpus), and on the proxy samples of ``target`` if it is
    given; keeps what moved and the loss curve."""
    # seconds to import, and a run that reuses everything does without
    from p2d_core.adaptation.training import train, write_curve

    captured = base.captured(runtime)
    plugin = adaptations.make(adaptation.name, adaptation.options)
    precision = "float32" if plugin.moves_weights else base.precision
    model = load_model(captured.folder, precision, captured.device)
    layers = attention_layers(model)
    in_model = sum(parameter.numel() for parameter in model.parameters())
    in_attention = sum(
        w.numel() for layer in layers for w in projection_weights(model, layer).values()
    )
    head_map = head_map_in(heads) if heads is not None else None
    attached = plugin.attach(model, layers, head_map, base.folder)
    trainable = n_trainable(attached.model)
    proxy = target_part(target, "proxy") if target is not None else []
    encoded = captured.encode([*samples_in(samples), *proxy])
    processes = together(runtime.parallel)
    with progress_of(f"model ({arm})") as progress:
        result = train(
            attached.model,
            encoded,
            training,
            pad_id=captured.pad_id,
            scratch=making.scratch,
            checkpoint_seconds=runtime.checkpoint_seconds,
            mixed_precision=base.precision == "bfloat16",
            gradient_checkpointing=runtime.gradient_checkpointing,
            micro_batch_tokens=runtime.micro_batch_tokens,
            progress=progress,
            processes=processes,
        )
    if not processes.first:
        return
    making.seconds_before = result.seconds_before
    attached.keep(making.folder)
    write_curve(result.curve, making.folder)
    making.samples, making.tokens = len(encoded), result.tokens
    making.facts |= {
        "adaptation": adaptation.name,
        "steps": result.steps,
        "proxy_samples": len(proxy),
        "learning_rate": training.learning_rate,
        "trainable": trainable,
        "share_of_model": trainable / in_model,
        "share_of_attention": trainable / in_attention,
    }


@stage("reference", sent=as_it_is, together=True)
def calibrate(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    corpus: ArtifactRef,
    training: TrainingSpec,
    steps: int,
    n_more: int,
    machine: str,
) -> None:
    """The seconds of full fine-tuning on the whole corpus and ``n_more`` samples, from some steps.

    ``machine`` is in the key: the same corpus takes another time on another machine.
    """
    captured = base.captured(runtime)
    model = load_model(captured.folder, "float32", captured.device)
    wanted = training.batch_size * (steps + UNTIMED_STEPS)
    if training.group_by_length:  # as many as are sorted together in training
        wanted = max(wanted, training.batch_size * BATCHES)
    # the smallest ids are a draw: they are hashes
    drawn = heapq.nsmallest(wanted, all_samples(corpus), key=lambda sample: sample.sample_id)
    encoded = captured.encode(drawn)
    processes = together(runtime.parallel)
    with progress_of("reference") as progress:
        reference = calibrate_full(
            model,
            encoded,
            training,
            pad_id=captured.pad_id,
            n_samples=sum(shard["rows"] for shard in corpus.manifest.facts["shards"]) + n_more,
            steps=steps,
            mixed_precision=base.precision == "bfloat16",
            gradient_checkpointing=runtime.gradient_checkpointing,
            micro_batch_tokens=runtime.micro_batch_tokens,
            progress=progress,
            processes=processes,
        )
    if not processes.first:
        return
    text = json.dumps(asdict(reference), indent=2) + "\n"
    (making.folder / REFERENCE).write_text(text, encoding="utf-8")
    making.facts |= asdict(reference)
    making.samples = len(drawn)


def reference_in(ref: ArtifactRef) -> Reference:
    """A calibrated reference."""
    return Reference(**json.loads((ref.path / REFERENCE).read_text(encoding="utf-8")))


def samples_in(ref: ArtifactRef) -> list[Sample]:
    """The samples of a subset, or all of a corpus."""
    if (ref.path / SUBSET).exists():
        return from_table(pq.read_table(ref.path / SUBSET))
    return list(all_samples(ref))
