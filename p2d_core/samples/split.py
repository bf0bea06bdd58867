"""Who gets which sample: proxy, held-out and evaluation sets, and the corpus."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from p2d_core.errors import DataError
from p2d_core.samples.schema import Sample


@dataclass(frozen=True, slots=True)
class TargetSplit:
    """Disjoint parts of the target's samples; ``rest`` in file order, the others as drawn."""

    proxy: list[Sample]
    held_out: list[Sample]
    """Proxy samples that no training sees: thresholds and losses are judged on them."""
    evaluation: list[Sample]
    rest: list[Sample]


def draw_target(
    samples: Sequence[Sample], *, n_proxy: int, n_held_out: int, n_evaluation: int, seed: int
) -> TargetSplit:
    """Draws by the order of hash(seed, sample id), so that a draw depends on ids and seed alone.

    Exact duplicates are dropped first. Evaluation is drawn before held-out and that before proxy:
    asking for more proxy samples leaves the other two alone, and the larger proxy set contains the
    smaller one.

    Raises:
        DataError: fewer different samples than asked for.
    """
    unique: dict[str, Sample] = {}
    for sample in samples:
        unique.setdefault(sample.sample_id, sample)
    asked = n_proxy + n_held_out + n_evaluation
    if len(unique) < asked:
        found = f"the target has {len(samples)} samples"
        if len(unique) < len(samples):
            found += f", {len(unique)} of them different"
        raise DataError(
            f"{found}; asked for are {asked}: proxy.samples {n_proxy}, "
            f"proxy.held_out {n_held_out}, evaluation.samples {n_evaluation}. "
            "Lower one of these settings, or give a target with more samples."
        )
    order = sorted(unique, key=lambda sample_id: _draw_key(seed, sample_id))
    evaluation = order[:n_evaluation]
    held_out = order[n_evaluation : n_evaluation + n_held_out]
    proxy = order[n_evaluation + n_held_out : asked]
    drawn = set(order[:asked])
    return TargetSplit(
        proxy=[unique[sample_id] for sample_id in proxy],
        held_out=[unique[sample_id] for sample_id in held_out],
        evaluation=[unique[sample_id] for sample_id in evaluation],
        rest=[sample for sample_id, sample in unique.items() if sample_id not in drawn],
    )


def redraw_proxy(split: TargetSplit, draw: int) -> TargetSplit:
    """The same target with another proxy set of the same size, drawn from proxy and rest.

    Raises:
        DataError: there is no rest, so that every draw would be the same.
    """
    if not split.rest:
        raise DataError(
            f"the target has no samples beside its {len(split.proxy)} proxy samples and those that "
            "are held out, so that no other proxy set can be drawn. Lower proxy.samples or "
            "evaluation.samples, or give a target with more samples."
        )
    pool = {sample.sample_id: sample for sample in [*split.proxy, *split.rest]}
    order = sorted(pool, key=lambda sample_id: _draw_key(draw, f"draw:{sample_id}"))
    drawn = set(order[: len(split.proxy)])
    return TargetSplit(
        proxy=[pool[sample_id] for sample_id in order[: len(split.proxy)]],
        held_out=split.held_out,
        evaluation=split.evaluation,
        rest=[sample for sample in pool.values() if sample.sample_id not in drawn],
    )


def _draw_key(seed: int, sample_id: str) -> str:
    return hashlib.sha256(f"{seed}:{sample_id}".encode()).hexdigest()


def refuse_overlap(
    target: Iterable[Sample], evaluation: Iterable[Sample], what: str = "evaluation"
) -> None:
    """Checks that no sample is both in the target and in the evaluation set, or another one.

    Raises:
        DataError: says how many are, and where the first one stands; rows count from 1.
    """
    in_target: dict[str, Sample] = {}
    for sample in target:
        in_target.setdefault(sample.sample_id, sample)
    shared: dict[str, Sample] = {}
    for sample in evaluation:
        if sample.sample_id in in_target:
            shared.setdefault(sample.sample_id, sample)
    if not shared:
        return
    theirs = next(iter(shared.values()))
    ours = in_target[theirs.sample_id]
    raise DataError(
        f"target and {what} share {len(shared)} sample{'s' if len(shared) > 1 else ''}; the "
        f"first: row {ours.row + 1} of {ours.source!r} is row {theirs.row + 1} of "
        f"{theirs.source!r} (rows count from 1). Remove them from one of the two files, or set "
        "`skip:` and `limit:` so that they do not meet."
    )


@dataclass(slots=True)
class CorpusCounts:
    """What `assemble_corpus` did so far, in samples. Counts add with ``+``."""

    kept: Counter[str] = field(default_factory=Counter)
    """By source."""
    duplicates: int = 0
    """Dropped, because the same prompt and response came before."""
    excluded: int = 0
    """Dropped, because they belong to the proxy, held-out or evaluation set."""

    @property
    def total(self) -> int:
        """Samples kept."""
        return self.kept.total()

    def __add__(self, other: "CorpusCounts") -> "CorpusCounts":
        return CorpusCounts(
            self.kept + other.kept,
            self.duplicates + other.duplicates,
            self.excluded + other.excluded,
        )


def assemble_corpus(
    sources: Iterable[Iterable[Sample]], exclude_ids: AbstractSet[str], counts: CorpusCounts
) -> Iterator[Sample]:
    """The candidate corpus: all sources in order, each sample once, none of the excluded ones.

    Args:
        counts: is brought up to date as the samples pass.
    """
    seen: set[bytes] = set()
    for samples in sources:
        for sample in samples:
            if sample.sample_id in exclude_ids:
                counts.excluded += 1
                continue
            # 16 bytes in place of 64 characters: a corpus may have millions of samples
            short = bytes.fromhex(sample.sample_id[:32])
            if short in seen:
                counts.duplicates += 1
                continue
            seen.add(short)
            counts.kept[sample.source] += 1
            yield sample
