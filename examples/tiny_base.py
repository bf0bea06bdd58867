"""Trains a small Llama with its own tokenizer: the base model of the examples.

    python examples/tiny_base.py --data FOLDER --out examples/tiny-base

It reads the rows that the examples set aside: of gsm8k_train.jsonl those after the first 4500, of
codealpaca.json those after the first 2700. The examples use the rows before (``limit:``), so that
target and corpus are new to the base. Of the rows set aside, the last 100 of each file are held
out, and the loss of their responses is printed.

By default the script takes 10 minutes, however fast the machine is. ``--steps`` trains for a number
of steps instead, which gives the same model again on the same machine and number of threads.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from p2d_core.errors import DataError
from p2d_core.samples.read import SourceSpec, read_samples
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import (
    IGNORED_LABEL,
    EncodedSample,
    Encoder,
    TextFormat,
    batches_by_tokens,
    collate,
)

SET_ASIDE = {"gsm8k_train.jsonl": 4500, "codealpaca.json": 2700}
"""File -> the first of its rows (from 0) that belong to the base model."""

HELD_OUT_ROWS = 100
VOCABULARY = 4096
MAX_TOKENS = 512
TOKENS_PER_STEP = 512
"""Few: in so short a training, more steps are worth more than larger batches."""
PEAK_LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.05
CLOSING_SECONDS = 20.0
"""Of the time allowed, for the held-out losses and for saving."""

EXAMPLES = Path(__file__).resolve().parent

log = logging.getLogger("tiny_base")


def read_set_aside(folder: Path) -> dict[str, list[Sample]]:
    """Samples of each file that no example uses."""
    missing = [name for name in SET_ASIDE if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} has no {' and no '.join(missing)}. Give a folder with --data that holds "
            "gsm8k_train.jsonl (question, answer) and codealpaca.json (instruction, input, output)."
        )
    return {
        name: list(read_samples(SourceSpec(Path(name).stem, str(folder / name), skip=skip)))
        for name, skip in SET_ASIDE.items()
    }


def train_tokenizer(samples: list[Sample], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text for sample in samples for text in (sample.prompt, sample.response)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast, hidden: int = 192, feed_forward: int = 512, layers: int = 6
) -> LlamaForCausalLM:
    """8 query heads a layer, two to a KV group; by default 6 layers and about 3 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@dataclass
class Budget:
    """How far the training is, in [0, 1]: by steps where their number is given, else by time."""

    steps: int | None
    seconds: float
    started: float

    def progress(self, step: int) -> float:
        if self.steps is not None:
            return step / self.steps
        return (time.monotonic() - self.started) / self.seconds


def learning_rate(progress: float) -> float:
    """Warm-up, then half a cosine down to a twentieth of the peak."""
    if progress < WARMUP_SHARE:
        return PEAK_LEARNING_RATE * max(progress / WARMUP_SHARE, 0.02)
    falling = (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * min(falling, 1))) / 2)


def shuffled_batches(encoded: list[EncodedSample], seed: int) -> Iterator[list[EncodedSample]]:
    """Endless batches, in another order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        epoch = [encoded[index] for index in order]
        batches = list(batches_by_tokens(epoch, TOKENS_PER_STEP, window=512))
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield [epoch[each] for each in batches[index]]


def train(
    model: LlamaForCausalLM, encoded: list[EncodedSample], pad_id: int, budget: Budget, seed: int
) -> int:
    """Trains on all tokens, prompts included, until the budget is spent; returns the steps."""
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = shuffled_batches(encoded, seed)
    model.train()
    step, n_tokens, reported, recent = 0, 0, time.monotonic(), []
    while (progress := budget.progress(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        batch = collate(next(batches), pad_id)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        n_tokens += int(batch["attention_mask"].sum())
        recent.append(loss.item())
        now = time.monotonic()
        if now - reported > 15:
            progress = budget.progress(step)
            spent = now - budget.started
            log.info(
                "step %d (%.0f%%): loss %.3f, %.0f tokens/s, %.0f s left",
                step,
                100 * progress,
                sum(recent) / len(recent),
                n_tokens / spent,
                max(0.0, spent / progress - spent),
            )
            reported, recent = now, []
    log.info("%d steps, %.1f times through the samples", step, n_tokens / sum(map(len, encoded)))
    return step


@torch.no_grad()
def response_loss(model: LlamaForCausalLM, encoded: list[EncodedSample], pad_id: int) -> float:
    """Mean loss over all response tokens, in nats a token."""
    model.eval()
    total, n_tokens = 0.0, 0
    device = next(model.parameters()).device
    for indices in batches_by_tokens(encoded):
        batch = collate([encoded[index] for index in indices], pad_id)
        batch = {name: each.to(device) for name, each in batch.items()}
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        total += cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
        ).item()
        n_tokens += int((labels != IGNORED_LABEL).sum())
    return total / n_tokens


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
    out: Path,
) -> None:
    """Writes a Hugging Face folder beside ``out`` and renames it when it is complete."""
    staged = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    (staged / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    if out.exists():
        shutil.rmtree(out)
    staged.rename(out)


def main(
    data: Annotated[
        Path, typer.Option(help="Folder with gsm8k_train.jsonl and codealpaca.json.")
    ] = EXAMPLES / "../../shared/data",
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write.")] = EXAMPLES
    / "tiny-base",
    minutes: Annotated[float, typer.Option(help="Time for everything, in minutes.", min=0.5)] = 10,
    steps: Annotated[
        int | None, typer.Option(help="Train for so many steps; the time does not count.", min=1)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; without it, as torch chooses.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
) -> None:
    """Trains a small base model on the rows that the examples set aside."""
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    try:
        if out.exists() and not (out / "training.json").is_file():
            raise DataError(
                f"{out} exists and was not made by this script. Give another folder with --out."
            )
        samples = read_set_aside(data)
    except DataError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None

    trained_on = [each for part in samples.values() for each in part[:-HELD_OUT_ROWS]]
    tokenizer = train_tokenizer(trained_on)
    encoder = Encoder(tokenizer, TextFormat(max_tokens=MAX_TOKENS))
    encoded = list(encoder.encode_all(trained_on))
    model = new_model(tokenizer)
    log.info(
        "%d samples, %d tokens (vocabulary %d); %.1f M parameters",
        len(encoded),
        sum(map(len, encoded)),
        len(tokenizer),
        model.num_parameters() / 1e6,
    )

    begun = time.monotonic()
    seconds = max(5.0, 60 * minutes - CLOSING_SECONDS - (begun - started))
    n_steps = train(model, encoded, encoder.pad_id, Budget(steps, seconds, begun), seed)
    losses = {
        name: response_loss(model, list(encoder.encode_all(part[-HELD_OUT_ROWS:])), encoder.pad_id)
        for name, part in samples.items()
    }
    for name, loss in losses.items():
        log.info("held-out responses of %s: loss %.3f", name, loss)
    record: dict[str, object] = {
        "first_row_of": SET_ASIDE,
        "held_out_loss": losses,
        "steps": n_steps,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    save(model, tokenizer, record, out)
    log.info(
        "saved to %s after %.0f s; --steps %d --seed %d --threads %d trains it again",
        out,
        time.monotonic() - started,
        n_steps,
        seed,
        torch.get_num_threads(),
    )


if __name__ == "__main__":
    typer.run(main)
