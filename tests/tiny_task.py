"""A task of lm-eval on local files, and the same documents as samples; no download."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerFast

from p2d_core.samples.schema import Sample, sample_id_of
from tests.tiny_tokenizer import tiny_word_level

WORDS = [f"{a}{b}" for a in "abcdefg" for b in ("lo", "mit", "ru", "sa", "tonn")]
KINDS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{options.index(response)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_target": "{{response}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "likelihood": {
        "output_type": "loglikelihood",
        "doc_to_target": "{{response}} </s>",
        "metric_list": [{"metric": "perplexity"}],
    },
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word and none at the beginning: prompt and response apart are both together."""
    tokenizer = tiny_word_level(WORDS)
    tokenizer.bos_token = None
    return tokenizer


def documents(n: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of 3 to 9 words, four options of 1 to 4, of which one is the response."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))
        options = [" ".join(rng.sample(WORDS, size)) for size in rng.sample([1, 2, 3, 4], 4)]
        made.append({"prompt": prompt, "response": rng.choice(options), "options": options})
    return made


def as_samples(rows: list[dict[str, Any]]) -> list[Sample]:
    """As the files of these rows are read."""
    return [
        Sample(
            sample_id_of(row["prompt"], row["response"]), "words", row["prompt"], row["response"],
            i, json.dumps({"options": row["options"]}),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


def write_task(folder: Path, kind: str, rows: list[dict[str, Any]], **more: Any) -> str:
    """A task file and its documents beside it; the task's name."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{kind}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"words_{kind}"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}\n",
        "target_delimiter": "",
    }
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(task | KINDS[kind] | more))
    return name
