"""The search for a learning rate, on the proxy samples."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from p2d_core.adaptation.adaptations import SLICES, adaptations
from p2d_core.adaptation.rates import best_rate, gentle_rate
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.attention.layout import attention_layers
from p2d_core.errors import NumericalError, TrainingError
from p2d_core.models import load_model
from p2d_core.store import ArtifactRef, Making
from tasks.elsewhere import as_it_is
from tasks.heads import head_map_in
from tasks.progress import progress_of
from tasks.proxy import mean_loss, write_learnt
from tasks.room import of_model
from tasks.samples import target_part
from tasks.stage import BaseModel, Plugin, Runtime, stage
from tasks.together import together

if TYPE_CHECKING:
    from p2d_core.adaptation.training import TrainingResult

TRIED = "tried.json"
"""Learning rate -> mean loss (nats a response token) on the held-out proxy samples; 0: untuned."""


@stage("rate", version="3", outside_key=("heads",), room=of_model, sent=as_it_is, together=True)
def find_rate(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    target: ArtifactRef,
    adaptation: Plugin,
    task_heads: tuple[tuple[int, int], ...],
    training: TrainingSpec,
    heads: ArtifactRef | None,
) -> None:
    """Tunes on the proxy samples with several rates; keeps the loss of each on the held-out ones.

    The one to take is the best, or, if that is at the edge of what training bears, the next lower
    one. Rates that were tried before a kill are not tried again. The rate of ``training`` is not
    looked at. Of task heads what they became with the rate to take is kept, as by `head_proxy_run`.
    """
    # seconds to import, and a run that reuses everything does without
    from p2d_core.adaptation.training import train

    captured = base.captured(runtime)
    plugin = adaptations.make(adaptation.name, adaptation.options)
    precision = "float32" if plugin.moves_weights else base.precision
    head_map = head_map_in(heads) if heads is not None else None
    proxy, held_out = (captured.encode(target_part(target, p)) for p in ("proxy", "held_out"))
    processes = together(runtime.parallel)
    done_file = making.scratch / TRIED
    done: dict[str, dict[str, float]] = {}
    if processes.first and done_file.exists():
        done = json.loads(done_file.read_text(encoding="utf-8"))
    done = processes.as_the_first_says("tried", done)
    making.seconds_before = sum(each["seconds"] for each in done.values())
    scratch, kept = making.scratch / "training", making.scratch / "kept"

    def loss_at(rate: float) -> float:
        name = f"{rate:g}"
        if name in done:
            return done[name]["loss"]
        start, before, loss, result = time.monotonic(), 0.0, math.inf, None
        model = load_model(captured.folder, precision, captured.device)
        attached = plugin.attach(model, attention_layers(model), head_map, base.folder)
        try:
            if rate:
                result = train_at(rate, attached.model)
                before = result.seconds_before
            if processes.first:
                # first: it refuses what is not finite, and then there is no loss either
                tuned = attached.tuned() if attached.tuned is not None else None
                loss = mean_loss(captured, attached.model, held_out)
                if result is not None and tuned is not None:
                    (kept / name).mkdir(parents=True, exist_ok=True)
                    tuned.save(kept / name / SLICES)
                    write_learnt(result, done["0"]["loss"], loss, kept / name)
        except (TrainingError, NumericalError):
            pass  # it ran away
        loss = processes.as_the_first_says(f"loss at {name}", loss)
        making.seconds_before += before
        done[name] = {"loss": loss, "seconds": time.monotonic() - start + before}
        if processes.first:
            # a file that was cut short would stop every later try
            done_file.with_suffix(".tmp").write_text(json.dumps(done), encoding="utf-8")
            done_file.with_suffix(".tmp").replace(done_file)
            shutil.rmtree(scratch, ignore_errors=True)
        return loss

    def train_at(rate: float, model: Any) -> TrainingResult:
        making.samples += len(proxy)
        name = f"{rate:g}"
        with progress_of(f"rate ({name})") as progress:
            result = train(
                model,
                proxy,
                replace(training, learning_rate=rate),
                pad_id=captured.pad_id,
                scratch=scratch / name,
                checkpoint_seconds=runtime.checkpoint_seconds,
                mixed_precision=base.precision == "bfloat16",
                gradient_checkpointing=runtime.gradient_checkpointing,
                micro_batch_tokens=runtime.micro_batch_tokens,
                progress=progress,
                # what is told for one training is not heard in the next
                processes=replace(processes, work=f"{processes.work}/{name}"),
            )
        making.tokens += result.tokens
        return result

    untuned = loss_at(0.0)
    _, losses = best_rate(loss_at)
    rate = gentle_rate(losses, untuned)
    losses[0.0] = untuned
    if not processes.first:
        return
    tried: dict[str, Any] = {f"{each:g}": losses[each] for each in sorted(losses)}
    # JSON has no infinity
    tried = {name: loss if math.isfinite(loss) else None for name, loss in tried.items()}
    text = json.dumps({"learning_rate": rate, "tried": tried}, indent=2) + "\n"
    (making.folder / TRIED).write_text(text, encoding="utf-8")
    if kept.exists():
        shutil.copytree(kept / f"{rate:g}", making.folder, dirs_exist_ok=True)
    making.facts |= {"learning_rate": rate, "tried": tried, "adaptation": adaptation.name}
    making.facts["steps"] = training.steps(len(proxy))
    making.facts["training_seconds"] = done[f"{rate:g}"]["seconds"]
