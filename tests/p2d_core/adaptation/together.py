"""Trainings that one process does in a test, and several together when torchrun starts this file.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.p2d_core.adaptation.together FOLDER``
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from p2d_core.adaptation.adaptations import adaptations
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.training import TrainingResult, train
from p2d_core.attention.layout import attention_layers
from p2d_core.heads.head_map import HeadMap
from p2d_core.processes import ALONE, Processes, join
from p2d_core.samples.tokens import EncodedSample
from tests.tiny import tiny_llama

SPEC = TrainingSpec(epochs=2, learning_rate=1e-2, batch_size=3, seed=1)
"""Of 10 samples: the last step of a pass has one, and one of two processes none."""


@dataclass(frozen=True)
class Case:
    """One training, and how two processes do it."""

    adaptation: str
    parallel: str
    precision: str = "float32"
    gradient_checkpointing: bool = False
    micro_batch_tokens: int | None = None
    """In two processes; one passes whole steps."""


CASES = {
    f"{adaptation}, {parallel}": Case(adaptation, parallel)
    for adaptation, parallel in [
        ("heads", "ddp"),
        ("heads", "fsdp"),
        ("full", "ddp"),
        ("full", "fsdp"),
        ("attention", "ddp"),
        ("lora", "ddp"),
        ("lora", "fsdp"),
    ]
} | {
    f"heads in {precision}, checkpointed, fsdp": Case("heads", "fsdp", precision, True)
    for precision in ("float32", "bfloat16")
}
CASES |= {
    f"full in parts, {parallel}": Case("full", parallel, micro_batch_tokens=8)
    for parallel in ("ddp", "fsdp")
}
STOPPED = ("heads, ddp", "full, fsdp")
"""Cases that are also stopped in the middle and gone on with."""
AT_STEP = 5


class Stop(Exception):
    """Instead of a kill, which a test of the whole command does."""


def stop(done: int, total: int) -> None:
    """Called when the checkpoint of the step before is there."""
    if done > AT_STEP:
        raise Stop


def encoded(n: int = 10) -> list[EncodedSample]:
    """Prompts of 3 tokens, responses of 1 to 13."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + 1 + 5 * i % 13 for i in range(n)]
    return [
        EncodedSample(str(i), torch.randint(3, 50, (length,), generator=generator).tolist(), 3)
        for i, length in enumerate(lengths)
    ]


def head_map() -> HeadMap:
    """Two heads of two layers; 8 query heads in 4 KV groups."""
    scores = torch.zeros(3, 8, dtype=torch.float64)
    scores[0, 5], scores[2, 1] = 2, 1
    return HeadMap.from_scores(scores, n_kv_groups=4, fraction=2 / 24)


def trained(
    case: Case,
    scratch: Path,
    processes: Processes = ALONE,
    *,
    keep: Path | None = None,
    checkpoint_seconds: float = 60,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, torch.Tensor], TrainingResult]:
    """What moved, by name, and what training said."""
    torch.set_num_threads(1)
    model = tiny_llama().to(getattr(torch, case.precision))
    attached = adaptations.make(case.adaptation, {}).attach(
        model, attention_layers(model), head_map(), "base"
    )
    result = train(
        attached.model,
        encoded(),
        SPEC,
        pad_id=0,
        scratch=scratch,
        checkpoint_seconds=checkpoint_seconds,
        mixed_precision=case.precision == "bfloat16",
        gradient_checkpointing=case.gradient_checkpointing,
        micro_batch_tokens=case.micro_batch_tokens if processes.size > 1 else None,
        progress=progress,
        processes=processes,
    )
    moved = {
        name: parameter.detach().clone()
        for name, parameter in attached.model.named_parameters()
        if parameter.requires_grad
    }
    if keep is not None and processes.first:
        keep.mkdir()
        attached.keep(keep)
    return moved, result


def main(folder: Path) -> None:
    """Every case, in this process and those beside it; the first writes what came of it."""
    processes = join()
    for number, (name, case) in enumerate(CASES.items()):
        of_case = replace(processes.sharding(case.parallel), work=str(number))
        with of_case.group():
            moved, result = trained(case, folder / f"{name} scratch", of_case, keep=folder / name)
        if processes.first:
            save_file(moved, folder / name / "moved.safetensors")
            (folder / name / "curve.json").write_text(json.dumps(result.curve))
    for name in STOPPED:
        case, at = CASES[name], folder / f"{name} stopped"
        of_case = replace(processes.sharding(case.parallel), work=f"{name} stopped")
        with of_case.group(), suppress(Stop):
            trained(case, at, of_case, checkpoint_seconds=0, progress=stop)
        if processes.first:
            shutil.copytree(at, folder / f"{name} for one")
        seen: list[int] = []
        again = replace(of_case, work=f"{name} again")
        with again.group():
            moved, _ = trained(case, at, again, progress=lambda done, _, s=seen: s.append(done))
        if processes.first:
            save_file(moved, folder / name / "again.safetensors")
            (folder / name / "again.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
