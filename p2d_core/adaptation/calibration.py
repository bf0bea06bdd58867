"""What full fine-tuning on everything would take, from the time of some of its steps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from p2d_core.adaptation.like_length import like_length
from p2d_core.adaptation.micro_batches import MicroBatches
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.spread import spread
from p2d_core.aer import Reference
from p2d_core.errors import TrainingError
from p2d_core.processes import ALONE, Processes
from p2d_core.samples.tokens import EncodedSample

UNTIMED_STEPS = 3


def calibrate_full(
    model: Any,
    encoded: Sequence[EncodedSample],
    spec: TrainingSpec,
    *,
    pad_id: int,
    n_samples: int,
    steps: int,
    mixed_precision: bool = False,
    gradient_checkpointing: bool = False,
    micro_batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> Reference:
    """Times full fine-tuning steps (forward, backward, AdamW) on batches drawn from the corpus.

    The model is trained by it: its weights have moved after, all of its parameters take gradients,
    and it is in training mode.

    Args:
        encoded: a random draw of the corpus, at least a batch; used in order (or as batches of like
            length), again and again.
        n_samples: that are trained on; with epochs and batch size they give the number of steps.
        steps: how many steps are timed, after `UNTIMED_STEPS` that are not.
        mixed_precision: bfloat16 in the passes, as training has it for a base in bfloat16.
        gradient_checkpointing, micro_batch_tokens: as training has them.
        processes: all of them call this alike, in their group, and share each batch.

    Returns:
        Mean seconds a step times the steps; the spread is its standard error scaled likewise.

    Raises:
        TrainingError: there are no samples.
        DeviceMemoryError: a step of a single one does not fit in memory.
    """
    if len(encoded) < 1:
        raise TrainingError("there are no samples to time full fine-tuning on.")
    order = list(range(len(encoded)))
    if spec.group_by_length:
        lengths = [len(sample) for sample in encoded]
        order = like_length(lengths, spec.batch_size, spec.seed, n_samples)
    device = next(model.parameters()).device
    model.requires_grad_(True).train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    seconds = []
    with spread(model, processes) as parts:
        parameters = [*parts.model.parameters()]
        # fused, as training has it: the plain one can take longer than the passes
        optimizer = torch.optim.AdamW(
            parameters, lr=spec.learning_rate, weight_decay=0.0, fused=True
        )
        passes = MicroBatches(parts, pad_id, micro_batch_tokens, processes)
        context = partial(torch.autocast, device.type, torch.bfloat16, enabled=mixed_precision)
        for step in range(UNTIMED_STEPS + steps):
            start = time.perf_counter()
            first = step * spec.batch_size
            rows = [encoded[order[(first + i) % len(order)]] for i in range(spec.batch_size)]
            passes.backward(rows, context)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
            if progress is not None:
                progress(step + 1, UNTIMED_STEPS + steps)
    if gradient_checkpointing:
        model.activation_checkpointing_disable()
    timed = seconds[UNTIMED_STEPS:]
    total = spec.steps(n_samples)
    error = statistics.stdev(timed) / math.sqrt(len(timed)) if len(timed) > 1 else 0.0
    return Reference("calibrated", statistics.fmean(timed) * total, error * total)
