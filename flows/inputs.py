"""Everything a run needs, checked before anything is started."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flows.hub import base_folder
from flows.settings import RunSettings, SourceSettings
from flows.settings_base import Rate
from p2d_core.adaptation.adaptations import adaptations
from p2d_core.adaptation.rates import START
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.affinity import scorers, steps_of
from p2d_core.errors import DataError, SettingsError
from p2d_core.evaluation import EvaluationSpec
from p2d_core.evaluation.evaluate import check_sample
from p2d_core.evaluation.harness import HarnessSpec, checked_tasks
from p2d_core.heads.head_map import HeadPick
from p2d_core.heads.ranking import rankers
from p2d_core.models import (
    check_gradient_checkpointing,
    check_loads,
    check_model_folder,
    layers_of,
    load_tokenizer,
    most_tokens,
    pick_device,
)
from p2d_core.samples.conversation import is_conversation, turns_of
from p2d_core.samples.read import read_samples
from p2d_core.samples.rejected import RejectedRows
from p2d_core.samples.schema import Sample
from p2d_core.samples.source import SourceSpec, files_of
from p2d_core.samples.split import draw_target, redraw_proxy, refuse_overlap
from p2d_core.samples.tokens import Encoder, TextFormat
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.where import checked_condition
from tasks.progress import progress_of
from tasks.stage import BaseModel, Plugin, Runtime, SourceInput

LEAST_STEPS_TRIED = 30
"""With a learning rate: in a few steps one looks good with which many steps run away."""
READ_WHOLE_BYTES = 256 * 2**20
ROWS_READ_OF_MORE = 10_000


@dataclass(frozen=True)
class Inputs:
    """Settings as the stages take them; a learning rate that is yet to be found is `START`."""

    base: BaseModel
    target: SourceInput
    corpus: list[SourceInput]
    evaluation: SourceInput | None
    retention: SourceInput | None
    ranker: Plugin
    pick: HeadPick
    scorer: Plugin
    adaptation: Plugin
    adaptation_needs_heads: bool
    proxy_training: TrainingSpec
    head_proxy_training: TrainingSpec
    rate_training: TrainingSpec
    """Of each learning rate that is tried on the proxy set."""
    training: TrainingSpec
    full_training: TrainingSpec
    selection: SelectionSpec
    evaluating: EvaluationSpec
    harness: HarnessSpec | None

    @property
    def needs_heads(self) -> bool:
        """Whether scorer or adaptation looks at task heads: if none does, none are ranked."""
        return self.adaptation_needs_heads or scores_by_heads(self.scorer.name, self.scorer.options)


def scores_by_heads(scorer: str, options: dict[str, Any]) -> bool:
    """Whether a step of a scorer looks at task heads, or through them as tuned."""
    steps = steps_of(scorers.make(scorer, options))
    return any(step.scorer.needs_heads or step.scorer.needs_head_proxy for step in steps)


def check_inputs(
    settings: RunSettings, ranked_bases: Container[str] = (), like: Inputs | None = None
) -> Inputs:
    """Reads what can be wrong and refuses it; writes nothing.

    Data files of more than 256 MB are read to their first 10,000 rows here; the `samples` stage
    meets the rest before anything dear is run.

    Args:
        ranked_bases: hashes of base models that were loaded before: looking again takes seconds.
        like: what was checked of the same base and data: they are not read once more.

    Raises:
        InputError: says what is wrong, where, and what would do.
    """
    folder, hub = (Path(like.base.folder), like.base.hub) if like else base_folder(settings.base)
    check_model_folder(folder)
    pick_device(settings.device)
    if settings.training.gradient_checkpointing:
        check_gradient_checkpointing(folder)
    # seeds of a comparison are draws of all that is drawn
    seed = settings.seed
    ranker = rankers.make(settings.heads.ranker, settings.heads.options, seed=seed)
    scorer = scorers.make(settings.scoring.scorer, _scorer_options(settings), seed=seed)
    options = dict(settings.training.options)
    if settings.training.adaptation == "heads":
        options.setdefault("slices", settings.heads.slices)
    adaptation = adaptations.make(settings.training.adaptation, options, seed=seed)
    where = _condition(settings.selection.where, scorer)
    _check_quotas(settings)
    evaluating = _evaluating(settings)
    text = like.base.text if like else _check_data(settings, evaluating, folder)
    evaluation = settings.evaluation
    training = settings.training

    def source(given: SourceSettings) -> SourceInput:
        return SourceInput.of(_spec(given))

    def trained(
        epochs: float, learning_rate: Rate, batch_size: int, group_by_length: bool = False
    ) -> TrainingSpec:
        rate = START if learning_rate == "auto" else learning_rate
        return TrainingSpec(
            epochs, rate, batch_size, training.warmup, settings.seed, group_by_length
        )

    base = like.base if like else BaseModel.of(folder, settings.precision, text, hub)
    if like is None and base.sha256 not in ranked_bases:
        with progress_of("checking the base model (tensors)") as progress:
            check_loads(folder, progress)
    heads, proxy = settings.heads, settings.proxy
    steps_a_pass = math.ceil(proxy.samples / proxy.batch_size)
    pick = HeadPick(heads.fraction, heads.max_per_layer, heads.one_per_kv_group)
    if heads.max_per_layer or heads.one_per_kv_group:
        layers = layers_of(folder)
        pick.count(len(layers), layers[0].n_query_heads, layers[0].n_kv_groups)
    return Inputs(
        base=base,
        target=like.target if like else source(settings.target),
        corpus=like.corpus if like else [source(each) for each in settings.corpus.sources],
        evaluation=source(evaluation.source) if evaluation.source else None,
        retention=source(evaluation.retention) if evaluation.retention else None,
        ranker=Plugin.of(settings.heads.ranker, ranker),
        pick=pick,
        scorer=Plugin.of(settings.scoring.scorer, scorer),
        adaptation=Plugin.of(training.adaptation, adaptation),
        adaptation_needs_heads=adaptation.needs_heads,
        proxy_training=trained(proxy.epochs, proxy.learning_rate, proxy.batch_size),
        head_proxy_training=trained(
            heads.proxy_epochs, heads.proxy_learning_rate, proxy.batch_size
        ),
        rate_training=trained(
            max(heads.proxy_epochs, LEAST_STEPS_TRIED / steps_a_pass), "auto", proxy.batch_size
        ),
        training=trained(
            training.epochs, training.learning_rate, training.batch_size, training.group_by_length
        ),
        full_training=trained(
            training.epochs,
            settings.arms.full_learning_rate,
            training.batch_size,
            training.group_by_length,
        ),
        selection=SelectionSpec(
            fraction=settings.selection.fraction,
            pool=settings.selection.pool,
            match_lengths=settings.selection.match_lengths,
            replay=settings.selection.replay,
            quotas=tuple(sorted(settings.selection.quotas.items())),
            where=where,
            seed=settings.seed,
        ),
        evaluating=evaluating,
        harness=like.harness if like else _harness(settings),
    )


def _evaluating(settings: RunSettings) -> EvaluationSpec:
    evaluation = settings.evaluation
    spec = EvaluationSpec(
        metric=evaluation.metric,
        answer_pattern=evaluation.answer_pattern,
        max_new_tokens=evaluation.max_new_tokens,
        also=evaluation.also,
        choices=evaluation.choices,
        answer=evaluation.answer,
        normalise=evaluation.normalise,
    )
    spec.check_read()
    return spec


def _harness(settings: RunSettings) -> HarnessSpec | None:
    asked = settings.evaluation.harness
    if asked is None:
        return None
    return checked_tasks(asked.tasks, asked.include_path, asked.limit, asked.num_fewshot)


def _condition(where: str | None, scorer: Any) -> str | None:
    """The user's condition, checked against the columns that this scorer's scores will have."""
    if where is None:
        return None
    steps = enumerate(steps_of(scorer))
    return checked_condition(where, tuple(s.name for i, s in steps if i or s.gate is not None))


def _check_quotas(settings: RunSettings) -> None:
    names = {source.name for source in settings.corpus.sources}
    if settings.corpus.include_target:
        names.add(settings.target.name)
    unknown = sorted(set(settings.selection.quotas) - names)
    if unknown:
        raise SettingsError(
            f"selection.quotas: the corpus has no source {unknown[0]!r}. "
            f"It has {', '.join(sorted(names))}."
        )


def make_runtime(settings: RunSettings, store: Path, run_id: str) -> Runtime:
    """What of the settings cannot change a result."""
    return Runtime(
        store=str(store.resolve()),
        run_id=run_id,
        device=settings.device,
        threads=settings.threads,
        tokens_per_batch=settings.scoring.tokens_per_batch,
        checkpoint_seconds=settings.training.checkpoint_seconds,
        gradient_checkpointing=settings.training.gradient_checkpointing,
        micro_batch_tokens=settings.training.micro_batch_tokens,
        parallel=settings.training.parallel,
        skip_bad_rows=settings.skip_bad_rows,
    )


def takes_depth(scorer: str) -> bool:
    """Whether scoring.depth says anything to it."""
    return "depth" in {field.name for field in fields(scorers.get(scorer))}


def _scorer_options(settings: RunSettings) -> dict[str, Any]:
    scoring = settings.scoring
    if scoring.depth == "heads":
        return scoring.options
    if not takes_depth(scoring.scorer):
        raise SettingsError(
            f"scoring.depth is {scoring.depth}, but the scorer {scoring.scorer!r} does not run the "
            "model to its task heads. Leave scoring.depth out, or choose head-filter or "
            "head-activation."
        )
    return {"depth": scoring.depth} | scoring.options


def _check_data(settings: RunSettings, evaluating: EvaluationSpec, base: Path) -> TextFormat:
    """How samples become tokens; that depends on whether there are conversations among them."""
    evaluation = settings.evaluation
    rejected = RejectedRows(settings.skip_bad_rows)
    chats = _Chats(settings, base)

    def checked(source: SourceSpec) -> Iterator[Sample]:
        for sample in _checked(source, rejected):
            chats.look_at(sample)
            yield sample

    target = list(checked(_spec(settings.target)))
    split = draw_target(
        target,
        n_proxy=settings.proxy.samples,
        n_held_out=settings.proxy.held_out,
        n_evaluation=0 if evaluation.source else evaluation.samples,
        seed=settings.seed,
    )
    if settings.heads.average_over > 1:
        redraw_proxy(split, 1)
    asked: Iterable[Sample] = split.evaluation
    if evaluation.source is not None:
        asked = list(checked(_spec(evaluation.source)))
        refuse_overlap(target, asked)
    for sample in asked:
        check_sample(sample, evaluating)
    if not settings.corpus.sources and not (settings.corpus.include_target and split.rest):
        raise DataError(
            "the corpus has no samples: corpus.sources is empty, and none of the target's "
            f"{len(target)} samples is left over for it. Add files to corpus.sources."
        )
    others = [*settings.corpus.sources]
    if evaluation.retention is not None:
        others.append(evaluation.retention)
    for other in others:
        spec = _spec(other)
        if spec.is_on_hub:
            continue
        size = sum(file.path.stat().st_size for file in files_of(spec))
        samples = checked(spec)
        if other is evaluation.retention:
            samples = list(samples)
            # every arm trains on the proxy samples
            refuse_overlap(target, samples, "retention")
        for row, sample in enumerate(samples):
            if other is evaluation.retention:
                check_sample(sample, evaluating)
            if size > READ_WHOLE_BYTES and row >= ROWS_READ_OF_MORE:
                break
    return chats.text_format(target[0])


class _Chats:
    """Whether there are conversations, and whether the base's chat template takes them."""

    def __init__(self, settings: RunSettings, base: Path) -> None:
        self.asked, self.base = settings.format.template, base
        most = min(settings.format.max_tokens, most_tokens(self.base))
        self.plain = TextFormat(settings.format.separator, most)
        self.met: set[tuple[str, ...]] = set()
        """Roles of conversations; what a template refuses nearly always is an order of roles."""

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(load_tokenizer(self.base), replace(self.plain, template="chat"))

    def look_at(self, sample: Sample) -> None:
        """Raises InputError: it is a conversation that cannot be written."""
        if self.asked == "plain" or not is_conversation(sample):
            return
        roles = tuple(turn.role for turn in turns_of(sample))
        if roles not in self.met:
            self.met.add(roles)
            self.encoder.encode(sample)

    def text_format(self, sample: Sample) -> TextFormat:
        """One for all samples: of a mixture of chats and texts all become chats."""
        if self.asked == "plain" or not (self.asked == "chat" or self.met):
            return self.plain
        self.encoder.encode(sample)
        return self.encoder.format


def _checked(source: SourceSpec, rejected: RejectedRows) -> Iterator[Sample]:
    with progress_of(f"checking {source.name} (rows)") as progress:
        yield from read_samples(source, on_bad_row=rejected, progress=progress)


def _spec(given: SourceSettings) -> SourceSpec:
    return SourceSpec(
        name=given.name,
        path=given.path,
        prompt=given.prompt,
        response=given.response,
        limit=given.limit,
        skip=given.skip,
        format=given.format,
        config=given.config,
        split=given.split,
        revision=given.revision,
        messages=given.messages,
    )
