"""GSM8K in a corpus in which some of its answers are those of other questions."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

Row = dict[str, Any]


def write_mistaken(
    folder: Path, gsm8k: Path, code: Path, seed: int, *, n_target: int, counts: tuple[int, int, int]
) -> tuple[Path, Path]:
    """A target file, and a corpus file with a ``label`` that no stage reads.

    Args:
        gsm8k: JSON lines with ``question`` and ``answer``.
        code: A JSON list of rows with ``instruction``, ``input`` and ``response``.
        counts: Samples of the corpus that are clean, wrong (each has the answer of the next wrong
            one's question) and other (code). Which rows, and their order, is drawn by ``seed``.
    """
    clean, wrong, other = counts
    draw = Random(seed)
    rows = draw.sample(gsm8k.read_text(encoding="utf-8").splitlines(), n_target + clean + wrong)
    solved = [_sample(row["question"], row["answer"], "clean") for row in map(json.loads, rows)]
    mixed_up = solved[n_target + clean :]
    answers = [sample["response"] for sample in mixed_up]
    corpus = solved[n_target : n_target + clean]
    for sample, answer in zip(mixed_up, answers[1:] + answers[:1], strict=True):
        corpus.append(sample | {"response": answer, "label": "wrong"})
    for row in draw.sample(json.loads(code.read_text(encoding="utf-8")), other):
        prompt = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        corpus.append(_sample(prompt, row["response"], "other"))
    draw.shuffle(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    return (
        _written(folder / "target.jsonl", solved[:n_target]),
        _written(folder / "corpus.jsonl", corpus),
    )


def _sample(prompt: str, response: str, label: str) -> Row:
    return {"prompt": prompt, "response": response, "label": label}


def _written(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
