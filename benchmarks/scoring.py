"""What scoring a corpus costs, against a bare forward pass over it."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.counted import forward_operations, scoring_operations
from benchmarks.figures import RUNS, Figure, alternate, figure, matrix_product_rate
from benchmarks.generated import captured, random_model, samples
from benchmarks.sizes import Shape, Size
from p2d_core.adaptation.adaptations import Attention, attention_slices
from p2d_core.adaptation.slices import TunedSlices
from p2d_core.affinity import Chain, Scorer, ScorerState, Target, steps_of
from p2d_core.affinity.head_activation import HeadActivation
from p2d_core.affinity.head_filter import HeadFilter
from p2d_core.affinity.measuring import MEASURED, MeasuredCorpus, measure_shard
from p2d_core.affinity.scoring import SCORES, passing_ids, score_corpus
from p2d_core.attention.layout import slices_of
from p2d_core.heads.head_map import HeadMap
from p2d_core.heads.ranking import RankingEvidence
from p2d_core.heads.spad import Spad
from p2d_core.models import CapturedModel
from p2d_core.parquet import parquet_options
from p2d_core.samples.schema import Sample
from p2d_core.samples.shards import read_shard, write_shards
from p2d_core.samples.tokens import batches_by_tokens, collate

DEPTH = 0.5
IN_DOMAIN = 0.25
CHAIN_PROXIES = 100
"""As many as a run has by default: fewer make the gate of the domain too narrow."""
WIDER = 256
GROWTH_SHAPE = Shape("demo-base", 128, 4, 8, 4, 16, 256, 8_004)
"""The smallest that anything here is adapted from: of a larger one the passes alone would count."""
PROXY_STEPS, PROXY_ROWS = 3, 8
SHORTER = 12.0
"""Growth is of reading, tokenising, comparing and writing: its samples have 15 tokens."""
LEAST_IN_A_FIFTH = 4_000
"""Samples of a small corpus, scored again and again, beside a fifth of the largest one's."""


def measure(size: Size) -> Iterator[Figure]:
    """`scoring_vs_forward`, its worst case, and `chain_vs_forward`."""
    for shape in size.shapes:
        bench = _Bench(size, shape)
        yield from bench.scoring()
        yield bench.chain()
        del bench


class _Bench:
    """One model with its head map."""

    def __init__(self, size: Size, shape: Shape) -> None:
        self.size, self.shape = size, shape
        network = random_model(shape, size)
        self.model = captured(network, size)
        self.proxies = samples(PROXY_ROWS * PROXY_STEPS, seed=1)
        self.held_out = samples(8, seed=2)
        self.heads, self.tuned = ranked(self.model, self.proxies)
        self.rate = matrix_product_rate(size.device, size.dtype)

    def forward_of(self, corpus: Sequence[Sample]) -> Any:
        """``model(**batch)`` on the batches that scoring makes of these samples."""
        encoded = self.model.encode(corpus)
        batches = [
            collate([encoded[i] for i in positions], self.model.pad_id)
            for positions in batches_by_tokens(encoded, self.size.tokens_per_batch)
        ]
        given = [
            {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            for batch in batches
        ]

        def run() -> None:
            with torch.inference_mode():
                for batch in given:
                    self.model.model(**batch)

        return run

    def scoring(self) -> Iterator[Figure]:
        corpus = samples(self.size.scored)
        encoded = self.model.encode(corpus)
        tokens = sum(len(each) for each in encoded)
        mean = sum(len(each) ** 2 for each in encoded) / tokens
        forward = self.forward_of(corpus)
        last = in_the_last_layer(self.heads)
        kinds = (
            ("scoring_vs_forward", self.heads, {"depth": DEPTH}, 0.6, f"depth {DEPTH}"),
            ("scoring_vs_forward_all_heads", self.heads, {}, 1.05, "depth heads"),
            ("scoring_vs_forward_last_layer", last, {}, 1.05, "depth heads, worst head map"),
        )
        runs, depths, kept = [], [], []
        for _, heads, options, _, _ in kinds:
            scorer = HeadActivation(**options)
            state = scorer.prepare(self.model, heads, Target(self.proxies, self.held_out))
            depths.append(int(state["heads"][:, 0].max()))
            kept.append(f"{len(state['heads'])} of {len(heads.task_heads)} task heads")
            runs.append(lambda s=scorer, t=state: scored(s, self.model, t, corpus))
        seconds = alternate(forward, *runs)
        for place, (name, _, _, goal, what) in enumerate(kinds):
            counted = tokens * scoring_operations(self.shape, mean, depths[place])
            floor = counted / (tokens * forward_operations(self.shape, mean))
            reached = counted / median(seconds[place + 1]) / self.rate
            yield figure(
                name,
                f"head-activation from text to affinity ({what})",
                "model(**batch), the same batches, tokenised before",
                (seconds[place + 1], seconds[0]),
                goal=goal,
                model=self.shape.name,
                floor=floor,
                floor_of="operations up to the deepest head that is looked at",
                note=(
                    f"{kept[place]}, deepest in layer {depths[place]} of 0..{self.shape.layers - 1}"
                    f" (sPAD after {PROXY_STEPS} proxy steps); {counted / 1e12:.2f} Tflop at "
                    f"{reached:.0%} of {self.rate / 1e9:.0f} Gflop/s; padding "
                    f"{padding_share(self.size.tokens_per_batch):.1%} on 4,096 samples"
                ),
            )

    def chain(self) -> Figure:
        corpus = samples(self.size.chain_scored, seed=3, in_domain=IN_DOMAIN)
        forward = self.forward_of(corpus)
        chain = HeadFilter(depth=DEPTH)
        target = Target(samples(CHAIN_PROXIES, seed=1), samples(CHAIN_PROXIES // 2, seed=2))
        model = self.model.with_tuned(self.tuned)
        with tempfile.TemporaryDirectory() as folder:
            run = ChainRun(chain, model, self.heads, target)
            run.let_pass(IN_DOMAIN, corpus, samples(WIDER, seed=5, in_domain=IN_DOMAIN))
            seconds = alternate(lambda: run(corpus, Path(folder)), forward)
        shares = [passed / len(corpus) for passed in run.passed[:2]]
        encoded = self.model.encode(corpus)
        tokens = sum(len(each) for each in encoded)
        mean = sum(len(each) ** 2 for each in encoded) / tokens
        deepest = int(run.states[0]["heads"][:, 0].max())
        whole = forward_operations(self.shape, mean)
        return figure(
            "chain_vs_forward",
            f"head-filter (depth {DEPTH}), text to scores",
            "model(**batch), the same batches, tokenised before",
            (seconds[0], seconds[1]),
            goal=1.0,
            model=self.shape.name,
            floor=scoring_operations(self.shape, mean, deepest) / whole + sum(shares),
            floor_of="operations of step 1 for all and of whole passes for what passes each gate",
            note=(
                f"a gate that lets {IN_DOMAIN:.0%} pass: {shares[0]:.0%} went to the second step, "
                f"{shares[1]:.0%} to the third"
            ),
        )


class ChainRun:
    """A chain over one shard, with its files, as the flow runs it; preparing is not counted."""

    def __init__(self, chain: Chain, model: CapturedModel, heads: HeadMap, target: Target) -> None:
        self.steps, self.model = steps_of(chain), model
        self.states = [step.scorer.prepare(model, heads, target) for step in self.steps]
        self.passed: list[int] = []

    def let_pass(self, share: float, corpus: Sequence[Sample], wider: Sequence[Sample]) -> None:
        """Sets the first gate so that it lets through that share of the corpus.

        With random weights it could not tell domains apart. The whitening is of a wider corpus: of
        a few samples each would stand far from all others.
        """
        step, state = self.steps[0], self.states[0]
        assert isinstance(step.scorer, HeadActivation)
        of_wider, of_corpus = (
            measure_shard(step.scorer, self.model, state, each) for each in (wider, corpus)
        )
        state = step.scorer.fit(state, [of_wider])
        (affinity,) = step.scorer.affinity(state, [of_corpus])
        cut_off = np.quantile(affinity.to_numpy(), 1 - share)
        own = step.scorer.own_affinity(state, [of_corpus]).numpy()
        gate = float((own < cut_off).mean())
        self.steps = (replace(step, gate=gate), *self.steps[1:])
        self.states[0] = state

    def __call__(self, corpus: Sequence[Sample], folder: Path) -> None:
        (shard,) = write_shards(corpus, folder, target_rows=len(corpus) * 4)
        self.passed = []
        waiting, previous, before = list(corpus), None, None
        for number, (step, state) in enumerate(zip(self.steps, self.states, strict=True)):
            measured = folder / f"{number}-{MEASURED}"
            before = measure_shard(step.scorer, self.model, state, waiting, before)
            pq.write_table(before, measured)
            scores = folder / f"{number}-{SCORES}"
            pairs = MeasuredCorpus([(folder / shard.file, measured)])
            outcome = score_corpus(step, state, pairs, scores, previous=previous)
            self.passed.append(outcome.passed)
            passing = passing_ids(scores, 0)
            waiting = [sample for sample in corpus if sample.sample_id in passing]
            previous = scores


def ranked(model: CapturedModel, proxies: Sequence[Sample]) -> tuple[HeadMap, TunedSlices]:
    """A head map by sPAD after a few steps of a proxy run, and the task heads' slices after it."""
    network, layers = model.model, model.layers
    before = attention_slices(network, layers)
    Attention().attach(network, layers, None, "")
    moving = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-4, weight_decay=0.0)
    encoded = model.encode(proxies)
    for step in range(PROXY_STEPS):
        rows = encoded[step * PROXY_ROWS : (step + 1) * PROXY_ROWS]
        batch = {k: v.to(model.device) for k, v in collate(rows, model.pad_id).items()}
        network(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del optimizer, moving
    network.requires_grad_(False)
    tuned = attention_slices(network, layers)
    before.apply_(network)
    scores = Spad().rank(RankingEvidence(network, layers, tuned, encoded))
    heads = HeadMap.from_scores(scores, layers[0].n_kv_groups, 0.1)
    tuned.apply_(network)
    of_heads = TunedSlices.from_model(network, slices_of(layers, heads.task_heads))
    before.apply_(network)
    return heads, of_heads


def in_the_last_layer(heads: HeadMap) -> HeadMap:
    """The same map, but its first task head stands in the last layer."""
    scores = heads.scores.clone()
    scores[-1, 0] = scores.max() + 1
    return HeadMap.from_scores(scores, heads.n_kv_groups, 0.1)


def scored(
    scorer: Scorer, model: CapturedModel, state: ScorerState, corpus: Sequence[Sample]
) -> None:
    """From text to affinity, nothing written."""
    measured = measure_shard(scorer, model, state, corpus)
    for _ in scorer.affinity(state, [measured]):
        pass


def padding_share(token_budget: int) -> float:
    """Of all tokens in the batches of 4,096 samples of GSM8K-like lengths."""
    from benchmarks.generated import tokenizer
    from p2d_core.samples.tokens import Encoder, TextFormat

    encoded = list(Encoder(tokenizer(), TextFormat(separator=" ")).encode_all(samples(4096)))
    padded = sum(
        len(batch) * max(len(encoded[i]) for i in batch)
        for batch in batches_by_tokens(encoded, token_budget)
    )
    return 1 - sum(len(each) for each in encoded) / padded


# -- growth ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Corpus:
    """Shards on disk."""

    folder: Path
    n: int

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.parquet"))


def growth(size: Size) -> Iterator[Figure]:
    """`scoring_growth`: seconds a sample and peak memory, at each number of samples."""
    with tempfile.TemporaryDirectory() as folder:
        corpora = []
        for n in size.growth:
            corpora.append(_Corpus(Path(folder) / str(n), n))
            write_shards(_generated(n), corpora[-1].folder)
        a_sample = side_by_side(corpora)
        with ThreadPoolExecutor(2) as pool:
            memory = list(pool.map(_peak_megabytes, corpora))
    middle = [median(times) for times in a_sample]
    slowest, fastest = middle.index(max(middle)), middle.index(min(middle))
    yield figure(
        "scoring_growth",
        f"seconds a sample, {corpora[slowest].n:,} samples",
        f"seconds a sample, {corpora[fastest].n:,} samples",
        (a_sample[slowest], a_sample[fastest]),
        goal=1.05,
        model=GROWTH_SHAPE.name,
        floor=1.0,
        floor_of="the same work for every sample",
        note="; ".join(
            f"{c.n:,}: {1e6 * each:.0f} us a sample, peak {megabytes:.0f} MB"
            for c, each, megabytes in zip(corpora, middle, memory, strict=True)
        )
        + "; shards of 1,024, read, measured, written, scored",
    )
    low, high = memory[-2:]
    yield figure(
        "scoring_growth_memory",
        f"peak memory, {corpora[-1].n:,} samples",
        f"peak memory, {corpora[-2].n:,} samples",
        (a_sample[-1], a_sample[-2]),
        ratios=[high / low],
        goal=1 + 50 / low,
        model=GROWTH_SHAPE.name,
        floor=1.0,
        floor_of="the corpus is never whole in memory",
        note=f"{high - low:+.0f} MB between them; the goal is 50 MB; a process each, one run",
    )


def side_by_side(corpora: Sequence[_Corpus]) -> list[list[float]]:
    """Seconds a sample of each corpus, in each fifth of the largest one's run.

    Whichever is behind goes on by a shard, so that a machine that is slower for a while is so for
    all of them alike; a small corpus is scored again and again meanwhile. What comes after the
    last shard counts to all samples of its corpus. One thread: how long several wait for each
    other varies by more than what is looked for.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = GrowthRun()
    for corpus in corpora[:-1]:
        list(run.steps(corpus))
    gc.collect()
    gc.freeze()  # to look through all that is imported takes as long as a thousand samples
    fifth = corpora[-1].n // RUNS
    goals = [min(fifth, max(corpus.n, LEAST_IN_A_FIFTH)) for corpus in corpora]
    works = [run.again_and_again(corpus) for corpus in corpora]
    done, scored = [0] * len(corpora), [0] * len(corpora)
    measuring = [[0.0] * RUNS for _ in corpora]
    measured = [[0] * RUNS for _ in corpora]
    scoring = [0.0] * len(corpora)

    def go_on(place: int, part: int) -> None:
        start = time.perf_counter()
        rows = next(works[place])
        seconds = time.perf_counter() - start
        done[place] += rows
        if rows:
            measuring[place][part] += seconds
            measured[place][part] += rows
        else:
            scoring[place] += seconds
            scored[place] += corpora[place].n

    for part in range(RUNS):
        while min(shares := [n / goal for n, goal in zip(done, goals, strict=True)]) < part + 1:
            go_on(shares.index(min(shares)), part)
    for place, corpus in enumerate(corpora):
        if done[place] == scored[place] + corpus.n:
            go_on(place, RUNS - 1)
    gc.unfreeze()
    torch.set_num_threads(threads)
    return [
        [
            seconds / rows + scoring[place] / scored[place]
            for seconds, rows in zip(measuring[place], measured[place], strict=True)
        ]
        for place in range(len(corpora))
    ]


def _generated(n: int) -> Iterator[Sample]:
    for start in range(0, n, 1000):
        yield from samples(min(1000, n - start), seed=100 + start, in_domain=0.5, shorter=SHORTER)


class GrowthRun:
    """Measures and scores a corpus on disk with a model that costs little."""

    def __init__(self, layers: int = GROWTH_SHAPE.layers) -> None:
        from benchmarks.sizes import SIZES

        network = random_model(replace(GROWTH_SHAPE, layers=layers), SIZES["cpu"])
        self.model = captured(network, SIZES["cpu"])
        shape = (layers, GROWTH_SHAPE.query_heads)
        # the last heads of the last layer
        scores = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
        heads = HeadMap.from_scores(scores, GROWTH_SHAPE.kv_groups, 0.1)
        self.step = steps_of(HeadFilter())[0]
        self.state = self.step.scorer.prepare(
            self.model, heads, Target(samples(64, seed=1, shorter=SHORTER), ())
        )

    def steps(self, corpus: _Corpus) -> Iterator[int]:
        """Measures shard after shard, then scores all; yields a shard's samples each, and 0."""
        parts = []
        for number, shard in enumerate(corpus.shards):
            measured = measure_shard(self.step.scorer, self.model, self.state, read_shard(shard))
            parts.append((shard, corpus.folder / f"measured-{number:06d}.parquet"))
            pq.write_table(measured, parts[-1][1], **parquet_options(measured.schema))
            yield len(measured)
        score_corpus(self.step, self.state, MeasuredCorpus(parts), corpus.folder / SCORES)
        yield 0

    def again_and_again(self, corpus: _Corpus) -> Iterator[int]:
        """Its steps without end."""
        while True:
            yield from self.steps(corpus)


def _peak_megabytes(corpus: _Corpus) -> float:
    program = (
        "import sys; from pathlib import Path; import torch; "
        "torch.set_num_threads(1); from benchmarks import scoring; "
        # one layer: what is held does not depend on how many there are
        "corpus = scoring._Corpus(Path(sys.argv[1]), int(sys.argv[2])); "
        "list(scoring.GrowthRun(layers=1).steps(corpus)); "
        # not ru_maxrss: a child begins with what its parent had
        "from p2d_core.memory import resident_bytes; print(resident_bytes('VmHWM') / 2**20)"
    )
    words = [sys.executable, "-c", program, str(corpus.folder), str(corpus.n)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])
