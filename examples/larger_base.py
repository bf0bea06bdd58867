"""Train a base of 42 M parameters on text and on the synthetic world: for a machine with a GPU.

    python examples/larger_base.py --data FOLDER --out examples/larger-base

Its steps take turns: exercises of the world's skills (never of the target), exercises of one
function in a row under words drawn anew, repeated segments, and the rows of GSM8K and CodeAlpaca
that the examples set aside. One byte-level tokenizer is trained on all of it. Takes 10 minutes by
default, of which most are training; ``training.json`` has exact match by skill on exercises held
out, and the loss on text held out.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import torch
import typer
from tiny_base import (
    EXAMPLES,
    HELD_OUT_ROWS,
    Budget,
    new_model,
    read_set_aside,
    response_loss,
    save,
    train_tokenizer,
)
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import IGNORED_LABEL, EncodedSample, Encoder, TextFormat
from p2d_core.synthetic.disguise import FUNCTIONS, INVENTED, draw_disguised, draw_surface
from p2d_core.synthetic.skills import (
    CONTENT_WORDS,
    SKILLS,
    TARGET_SKILL,
    Exercise,
    draw_ledger,
    lookup_exercise,
)

log = logging.getLogger("larger_base")

VOCABULARY = 8192
TEXT_TOKENS = 512
"""Of a row of text."""
STEP_TOKENS = 24_576
SHAPE = {"hidden": 512, "feed_forward": 1536, "layers": 12}
"""96 query heads."""
PEAK_LEARNING_RATE = 1e-3
WARMUP_SHARE = 0.03
CYCLE = ("skills", "in a row", "skills", "repeated", "skills", "in a row", "skills", "text")
FIRST = ("repeated", "text")
"""Until FIRST_SHARE of the training: skills alone teach copying, and leave look-ups at chance."""
FIRST_SHARE = 0.08
IN_A_ROW = 5
CLOSING_SECONDS = 20.0
N_TEST = 200

Table = tuple[np.ndarray, np.ndarray]
"""Token ids and labels, int16, ``[rows, tokens]``, padded on the right."""


def exercise_of(rng: Random) -> Exercise:
    """Of any skill; or a table of which more is asked, since one answer teaches little about it."""
    kind = rng.randrange(len(SKILLS) + 1)
    if kind == len(SKILLS):
        return lookup_exercise(rng, "lookup2", rng.randint(2, 4))
    return tuple(SKILLS.values())[kind](rng)


def repeated(rng: Random) -> Exercise:
    """A segment of 4 to 10 words, then the same again."""
    words = " ".join(rng.sample(CONTENT_WORDS, rng.randint(4, 10)))
    return Exercise(words, words)


class Drawn:
    """Draws and encodes many exercises, for one process of several."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, job: tuple[str, int, int]) -> Table:
        kind, n, seed = job
        rng = Random(f"{kind} {seed}")
        rows: list[tuple[list[int], list[int]]] = []
        if kind == "in a row":
            for _ in range(n):
                function, surface = rng.choice(tuple(FUNCTIONS)), draw_surface(rng)
                row = [draw_disguised(rng, function, surface) for _ in range(IN_A_ROW)]
                ids: list[int] = []
                labels: list[int] = []
                for place, each in enumerate(self.encoded(row)):
                    ids += each.input_ids
                    # the first answer cannot be known: nothing was shown yet
                    answer = each.input_ids[each.n_prompt :]
                    labels += [IGNORED_LABEL] * each.n_prompt
                    labels += answer if place else [IGNORED_LABEL] * len(answer)
                rows.append((ids, labels))
        else:
            draw = exercise_of if kind == "skills" else repeated
            for each in self.encoded([draw(rng) for _ in range(n)]):
                answer = each.input_ids[each.n_prompt :]
                rows.append((each.input_ids, [IGNORED_LABEL] * each.n_prompt + answer))
        longest = max(len(ids) for ids, _ in rows)
        table = np.full((2, n, longest), IGNORED_LABEL, dtype=np.int16)
        table[0] = self.encoder.pad_id
        for place, (ids, labels) in enumerate(rows):
            table[0, place, : len(ids)] = ids
            table[1, place, : len(labels)] = labels
        return table[0], table[1]

    def encoded(self, exercises: list[Exercise]) -> Iterator[EncodedSample]:
        return self.encoder.encode_all(as_sample(each) for each in exercises)


def as_sample(exercise: Exercise) -> Sample:
    return Sample("", "world", exercise.prompt, exercise.response, 0)


class Rows:
    """Batches of one kind on the device, in another order each time through."""

    def __init__(self, table: Table, pad_id: int, device: torch.device, seed: int) -> None:
        self.ids, self.labels = (torch.from_numpy(each).to(device) for each in table)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.order, self.pad_id = torch.empty(0, dtype=torch.long, device=device), pad_id
        self.n = max(1, STEP_TOKENS // self.ids.shape[1])
        self.n_passes = 0.0

    def next(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels, int64."""
        if len(self.order) < self.n:
            self.order = torch.randperm(
                len(self.ids), generator=self.generator, device=self.ids.device
            )
        chosen, self.order = self.order[: self.n], self.order[self.n :]
        self.n_passes += len(chosen) / len(self.ids)
        ids, labels = self.ids[chosen].long(), self.labels[chosen].long()
        return ids, labels


def text_table(encoded: list[EncodedSample]) -> Table:
    """All samples one after the other, cut into rows; prompts are learnt too."""
    stream = np.concatenate([np.array(each.input_ids, dtype=np.int16) for each in encoded])
    rows = stream[: len(stream) // TEXT_TOKENS * TEXT_TOKENS].reshape(-1, TEXT_TOKENS)
    return rows, rows


def train(
    model: LlamaForCausalLM,
    rows: dict[str, Rows],
    budget: Budget,
    quality: Callable[[], dict[str, float]],
) -> int:
    """AdamW in bfloat16 passes over float32 weights, until the budget is spent; returns steps."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=0.01, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    reported = measured = budget.started
    step = 0
    model.train()
    while (progress := budget.progress(step)) < 1:
        warm = min(1.0, max(progress / WARMUP_SHARE, 0.02))
        falling = 0.03 + 0.97 * (1 + np.cos(np.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * warm * falling
        turns = FIRST if progress < FIRST_SHARE else CYCLE
        kind = turns[step % len(turns)]
        ids, labels = rows[kind].next()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            # padding stands on the right, where a causal model never looks from a word: no mask
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            now = time.monotonic()
            if now - reported > 15:
                shown = (step, 100 * progress, loss.item(), kind)
                log.info("step %d (%.0f%%): loss %.3f on %s", *shown)
                reported = now
            if now - measured > 60:
                log.info("exact match: %s", quality())
                measured = now
                model.train()
    return step


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, table: Table) -> float:
    """Share of rows of which every token of the answer, its end too, is the likeliest.

    That is what greedy decoding writes: it goes wrong at the first token that is not.
    """
    device = next(model.parameters()).device
    model.eval()
    ids, labels = (torch.from_numpy(each).to(device).long() for each in table)
    likeliest = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    wrong = (likeliest != labels[:, 1:]) & (labels[:, 1:] != IGNORED_LABEL)
    return float((~wrong.any(1)).float().mean())


def main(
    data: Annotated[
        Path, typer.Option(help="Folder with gsm8k_train.jsonl and codealpaca.json.")
    ] = EXAMPLES / "../../shared/data",
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write.")] = EXAMPLES
    / "larger-base",
    minutes: Annotated[float, typer.Option(help="Time for everything, in minutes.", min=0.2)] = 10,
    steps: Annotated[
        int | None, typer.Option(help="Train for so many steps; the time does not count.", min=1)
    ] = None,
    drawn: Annotated[int, typer.Option(help="Exercises to draw, of all skills.")] = 1_600_000,
    seed: Annotated[int, typer.Option(help="Of weights, exercises and order.")] = 0,
) -> None:
    """Trains a base on text and on the synthetic world."""
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    disable_progress_bar()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = read_set_aside(data)
    trained_on = [each for part in text.values() for each in part[:-HELD_OUT_ROWS]]
    rng = Random(f"tokenizer {seed}")
    shown = [as_sample(exercise_of(rng)) for _ in range(10_000)]
    shown += [as_sample(Exercise(f"{TARGET_SKILL} {' '.join(INVENTED)}", ""))] * 100
    tokenizer = train_tokenizer(trained_on + shown, VOCABULARY)
    encoder = Encoder(tokenizer, TextFormat(max_tokens=TEXT_TOKENS))

    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    jobs = [
        (kind, max(N_TEST, n // workers), seed * 1000 + number)
        for kind, n in (("skills", drawn), ("in a row", drawn // 8), ("repeated", drawn // 4))
        for number in range(workers)
    ]
    with get_context("fork").Pool(workers) as pool:
        tables = pool.map(Drawn(encoder), jobs, chunksize=1)
    rows = {
        kind: Rows(
            joined([table for table, job in zip(tables, jobs, strict=True) if job[0] == kind],
                   encoder.pad_id),
            encoder.pad_id, device, seed,
        )
        for kind in ("skills", "in a row", "repeated")
    }  # fmt: skip
    encoded = list(encoder.encode_all(trained_on))
    rows["text"] = Rows(text_table(encoded), encoder.pad_id, device, seed)
    tests = held_out(encoder)
    model = new_model(tokenizer, **SHAPE).to(device)
    log.info(
        "%d exercises, %d tokens of text, drawn in %.0f s; %.1f M parameters",
        sum(len(each.ids) for name, each in rows.items() if name != "text"),
        rows["text"].ids.numel(), time.monotonic() - started, model.num_parameters() / 1e6,
    )  # fmt: skip

    def quality() -> dict[str, float]:
        return {name: round(exact_match(model, table), 3) for name, table in tests.items()}

    begun = time.monotonic()
    seconds = max(5.0, 60 * minutes - CLOSING_SECONDS - (begun - started))
    n_steps = train(model, rows, Budget(steps, seconds, begun), quality)
    record: dict[str, object] = {
        "exact_match": quality(),
        "held_out_loss": {
            name: response_loss(
                model, list(encoder.encode_all(part[-HELD_OUT_ROWS:])), encoder.pad_id
            )
            for name, part in text.items()
        },
        "passes": {name: round(each.n_passes, 2) for name, each in rows.items()},
        "steps": n_steps,
        "seconds": round(time.monotonic() - begun),
        "parameters": model.num_parameters(),
        "seed": seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    log.info("%s", record)
    save(model.cpu(), tokenizer, record, out)
    log.info("saved to %s after %.0f s", out, time.monotonic() - started)


def joined(tables: list[Table], pad_id: int) -> Table:
    """One table of several, as wide as the widest."""
    longest = max(ids.shape[1] for ids, _ in tables)

    def padded(which: int, value: int) -> np.ndarray:
        return np.concatenate([
            np.pad(t[which], ((0, 0), (0, longest - t[which].shape[1])), constant_values=value)
            for t in tables
        ])  # fmt: skip

    return padded(0, pad_id), padded(1, IGNORED_LABEL)


def held_out(encoder: Encoder) -> dict[str, Table]:
    """Exercises of every skill, of the target, and of what is shown in a row, from own seeds."""
    tables = {}
    drawn = Drawn(encoder)
    for name, draw in (*SKILLS.items(), (TARGET_SKILL, draw_ledger)):
        rng = Random(f"quality {name}")
        exercises = [draw(rng) for _ in range(N_TEST)]
        rows = list(drawn.encoded([Exercise(each.prompt, each.response) for each in exercises]))
        longest = max(map(len, rows))
        table = np.full((2, N_TEST, longest), IGNORED_LABEL, dtype=np.int16)
        table[0] = encoder.pad_id
        for place, each in enumerate(rows):
            table[0, place, : len(each)] = each.input_ids
            table[1, place, each.n_prompt : len(each)] = each.input_ids[each.n_prompt :]
        tables[name] = (table[0], table[1])
    tables["four in a row"] = drawn(("in a row", N_TEST, -1))
    return tables


if __name__ == "__main__":
    typer.run(main)
