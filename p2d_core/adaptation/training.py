"""Supervised fine-tuning of whatever parameters an adaptation has made trainable."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import safe_globals

from p2d_core.adaptation.like_length import LikeLength
from p2d_core.adaptation.micro_batches import MicroBatches
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.spread import share_like, spread, whole, whole_states
from p2d_core.errors import TrainingError
from p2d_core.processes import ALONE, Processes
from p2d_core.progress import Progress
from p2d_core.samples.tokens import EncodedSample
from p2d_core.store.recipe import hash_file

log = logging.getLogger(__name__)

NOT_LOADED = (pickle.UnpicklingError, SafetensorError, KeyError, AttributeError, IndexError)
"""What a broken or hostile checkpoint raises, beside the errors of reading files."""
CHECKPOINT_WEIGHTS = "trainable.safetensors"
SAVES_TO_A_PAUSE = 20
"""Checkpoints take a twentieth of the time at most: it counts, in T_full too."""
ROWS = "rows"
"""Of a batch its samples, as what they are: `MicroBatches` makes tensors of them."""
SEAL = "seal.json"
"""Written last into a checkpoint, with the hashes of its files and the seconds up to it: one
without it was cut short, one that it does not fit was damaged, and neither is gone on from."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a training run left behind, the weights apart."""

    curve: list[dict[str, float]]
    """One entry a log: step, epoch, loss (nats a response token), learning_rate."""
    steps: int
    tokens: int
    """Tokens that went through the model, padding not counted."""
    seconds_before: float = 0.0
    """Spent by runs that were stopped, up to the checkpoint that this one went on from."""


class _Samples(Dataset[EncodedSample]):
    def __init__(self, encoded: Sequence[EncodedSample]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> EncodedSample:
        return self.encoded[index]


class _Trainer(Trainer):
    """Keeps only the trainable parameters in checkpoints: the base is on disk already.

    Transformers knows of one process. All of them draw the same batches, of which each runs its
    share; gradients are brought together by what `spread` made of the model.
    """

    def __init__(self, passes: MicroBatches, sampler: Sampler[int] | None, **settings: Any) -> None:
        super().__init__(model=passes.parts.model, **settings)
        self.passes, self.processes, self.sampler = passes, passes.processes, sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler or super()._get_train_sampler(train_dataset)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One batch is one step, whole or in parts."""
        model.train()
        return self.passes.backward(inputs[ROWS], self.compute_loss_context_manager)

    def create_optimizer(self, model: Any = None) -> Any:
        """One whose states are kept whole, whoever has a share of them."""
        optimizer = super().create_optimizer(model)
        if self.processes.shards_model:
            whole_states(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        return whole(super()._clip_grad_norm(model))  # type: ignore[no-untyped-call]

    def _maybe_log_save_evaluate(self, tr_loss: Any, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self.processes.size > 1:
            torch.distributed.all_reduce(tr_loss)
            tr_loss /= self.processes.size
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.processes.first:
            super()._save_checkpoint(model, trial)
        elif self.processes.shards_model:
            # the first cannot put together what it keeps without the others' shares
            _trainable(self.model)
            assert self.optimizer is not None
            self.optimizer.state_dict()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trainable(self.model), folder / CHECKPOINT_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / CHECKPOINT_WEIGHTS)
        assert self.model is not None
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in saved:
                    parameter.copy_(share_like(saved[name], parameter))


class _Watch(TrainerCallback):
    """Progress, checkpoints by the clock, and an end when the loss is no number."""

    def __init__(
        self,
        progress: Progress | None,
        checkpoint_seconds: float,
        seconds_before: float,
        processes: Processes,
    ) -> None:
        self.progress = progress
        self.processes = processes
        self.checkpoint_seconds = checkpoint_seconds
        self.seconds_before = seconds_before
        self.pause = checkpoint_seconds
        """Seconds from the end of a save to the next."""
        self.started_at = self.saved_at = self.asked_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            # what is there of a run that was killed
            self.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)
        self.asked_at = time.monotonic()
        due = self.asked_at - self.saved_at >= self.pause
        # not after the last step: whoever went on from there would take one more
        due = due and state.global_step < state.max_steps
        if self.processes.as_the_first_decides(due):
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.processes.first:
            return
        spent = self.seconds_before + time.monotonic() - self.started_at
        _seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", spent)
        self.saved_at = time.monotonic()
        if self.pause:
            took = self.saved_at - self.asked_at
            self.pause = max(self.checkpoint_seconds, SAVES_TO_A_PAUSE * took)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step} of {state.max_steps}. "
                "Lower the learning rate, or look for broken samples in the subset."
            )


def train(
    model: nn.Module,
    encoded: Sequence[EncodedSample],
    spec: TrainingSpec,
    *,
    pad_id: int,
    scratch: Path,
    checkpoint_seconds: float = 60,
    mixed_precision: bool = False,
    gradient_checkpointing: bool = False,
    micro_batch_tokens: int | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> TrainingResult:
    """Trains, in place, the parameters that require a gradient; loss on response tokens only.

    Goes on from the last whole checkpoint in ``scratch`` if there is one, however many processes
    wrote it. One device a process.

    Args:
        checkpoint_seconds: between checkpoints, or 20 times what saving one takes if that is more;
            0: one after each step.
        mixed_precision: bfloat16 in the passes; the parameters stay in the precision they have.
        gradient_checkpointing: layers run a second time for the backward pass, in place of keeping
            what they computed: less memory, a third more computing.
        micro_batch_tokens: padded tokens that pass at once in each process; a step of more passes
            in parts of like length, with the same gradients up to rounding. None: a whole step, or
            what fits in memory.
        processes: all of them call this alike, in their group, and share each batch. What was
            trained is in the first one's model.

    Raises:
        TrainingError: there is nothing to train or to learn from, or the loss is not a number.
        DeviceMemoryError: a step of a single sample does not fit in memory.
    """
    if not encoded:
        raise TrainingError("there are no samples to train on. Raise selection.fraction.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("the adaptation leaves no parameter to train. Raise heads.fraction.")
    steps_an_epoch = math.ceil(len(encoded) / spec.batch_size)
    steps = spec.steps(len(encoded))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=spec.batch_size,
        max_steps=steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(spec.warmup * steps),
        weight_decay=0.0,
        seed=spec.seed,
        data_seed=spec.seed,
        logging_strategy="steps",
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
        bf16=mixed_precision,
        activation_checkpointing=gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    # with several GPUs it would split batches over them, and the same settings mean more epochs
    arguments._n_gpu = min(1, arguments.n_gpu)
    found = _last_checkpoint(scratch) if processes.first else None
    last, seconds_before = processes.as_the_first_says("checkpoint", found) or (None, 0.0)
    with spread(model, processes) as parts:
        trainer = _Trainer(
            MicroBatches(parts, pad_id, micro_batch_tokens, processes),
            LikeLength([len(sample) for sample in encoded], spec.batch_size, spec.seed)
            if spec.group_by_length
            else None,
            args=arguments,
            train_dataset=_Samples(encoded),
            data_collator=lambda rows: {ROWS: rows},
            callbacks=[_Watch(progress, checkpoint_seconds, seconds_before, processes)],
        )
        # the table of figures that it prints at the end is for a console of its own
        trainer.remove_callback(PrinterCallback)
        if last is not None:
            log.info("training goes on from %s of %s", Path(last).name, scratch.name)
        trainer.train(resume_from_checkpoint=last)
        if gradient_checkpointing:
            parts.model.activation_checkpointing_disable()
        if mixed_precision:
            # accelerate's forward, under autocast, would stay, and later losses be rounded
            for name in ("forward", "_original_forward"):
                vars(parts.model).pop(name, None)
    model.eval()
    if processes.first:
        _check_weights(model)
    curve = [
        {key: float(entry[key]) for key in ("step", "epoch", "loss", "learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    tokens = round(sum(len(sample.input_ids) for sample in encoded) * steps / steps_an_epoch)
    return TrainingResult(curve, steps, tokens, seconds_before)


def _seal(checkpoint: Path, seconds: float) -> None:
    text = json.dumps({"seconds": seconds, "files": _hashes(checkpoint)})
    (checkpoint / SEAL).write_text(text, encoding="utf-8")


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SEAL)
    return {str(file.relative_to(checkpoint)): hash_file(file) for file in files}


def _try_to_load(checkpoint: Path) -> None:
    load_file(checkpoint / CHECKPOINT_WEIGHTS)
    json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        with safe_globals():  # type: ignore[no-untyped-call]
            torch.load(file, map_location="cpu", weights_only=True)


def _check_weights(model: nn.Module) -> None:
    """The loss is logged every few steps, and before a step: the last update shows here alone."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise TrainingError(
                f"after the last step {name} has values that are no numbers. "
                "Lower the learning rate, or look for broken samples in the subset."
            )


def _last_checkpoint(scratch: Path) -> tuple[str | None, float]:
    """The newest whole checkpoint and the seconds up to it; those that are not are removed.

    What torch kept in it is tried as it will be loaded, with weights only: a file that names code
    is as good as broken.
    """
    found = sorted(scratch.glob("checkpoint-*"), key=lambda f: -int(f.name.split("-")[1]))
    for folder in found:
        try:
            seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
            if seal["files"] == _hashes(folder):
                _try_to_load(folder)
                return str(folder), float(seal["seconds"])
            why = "a file has other content than when it was saved"
        except FileNotFoundError:
            why = "it was cut short"
        except (OSError, ValueError, TypeError, RuntimeError, EOFError, *NOT_LOADED) as error:
            why = f"it cannot be loaded: {str(error)[:200]!r}"
        log.warning("%s of %s is not gone on from (%s)", folder.name, scratch.name, why)
        shutil.rmtree(folder)
    return None, 0.0


def write_curve(curve: list[dict[str, float]], folder: Path) -> None:
    """Writes ``loss.json``."""
    (folder / "loss.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")


def _trainable(model: Any) -> dict[str, Tensor]:
    return {
        name: whole(parameter.detach()).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
