"""A tiny model with task heads, samples in its words, and scorers run on them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from p2d_core.adaptation.slices import TunedSlices
from p2d_core.affinity import Target, scorers
from p2d_core.affinity.measuring import measure_shard
from p2d_core.attention.layout import slices_of
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample, sample_id_of
from tests.tiny import tiny_llama
from tests.tiny_tokenizer import tiny_word_level

WORDS = [f"w{i}" for i in range(40)]
PARTS = {
    "head-activation": 1.0,
    "loss-shift": 0.5,
    "head-influence": 0.1,
    "icl-attention": 0.3,
    "less": -0.1,
    "bm25": 0.2,
}
NEEDED: dict[str, dict] = {"sum": {"parts": PARTS}}
"""Options without which a scorer is none."""


def sample_of(prompt: str, response: str, row: int = 0) -> Sample:
    return Sample(sample_id_of(prompt, response), "s", prompt, response, row)


def samples(n: int, seed: int = 0) -> list[Sample]:
    """With prompts of 2 to 9 words and responses of 2."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(n):
        words = [WORDS[i] for i in rng.integers(0, 40, rng.integers(4, 12))]
        made.append(sample_of(" ".join(words[:-2]), " ".join(words[-2:]), row))
    return made


TARGET = Target(samples(8, seed=1), samples(5, seed=2))
NO_TARGET = Target((), ())


def three_heads() -> HeadMap:
    scores = torch.zeros(3, 8, dtype=torch.float64)
    scores[1, 3], scores[1, 6], scores[2, 0] = 3, 2, 1
    return HeadMap.from_scores(scores, n_kv_groups=4, fraction=0.1)


def captured_model(folder: Path, heads: HeadMap) -> CapturedModel:
    """Saved into the folder; its tuned slices are the base's times 1.5."""
    tiny_llama().save_pretrained(folder)
    tiny_word_level(WORDS).save_pretrained(folder)
    captured = CapturedModel(folder)
    tuned = TunedSlices.from_model(captured.model, slices_of(captured.layers, heads.task_heads))
    for block in tuned.blocks.values():
        block.values.mul_(1.5)
    captured.tuned = tuned
    return captured


def joined(shard: list[Sample], measured: pa.Table) -> pa.Table:
    """A measurement with what scorers see of the samples beside it."""
    for name in ("prompt", "response", "source"):
        measured = measured.append_column(name, pa.array([getattr(s, name) for s in shard]))
    return measured


def affinities(name: str, model, heads, shards: list[list[Sample]], **options) -> np.ndarray:
    """What a scorer says of a corpus."""
    scorer = scorers.make(name, NEEDED.get(name, {}) | options)
    state = scorer.prepare(model, heads, TARGET if scorer.measures_target else NO_TARGET)
    tables = [joined(shard, measure_shard(scorer, model, state, shard)) for shard in shards]
    compared = scorer.affinity(scorer.prepare(model, heads, TARGET), tables)
    return np.concatenate([np.asarray(part) for part in compared])
