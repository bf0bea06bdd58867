"""The settings of a run: one YAML file, read into models that forbid unknown keys."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from flows.plain_yaml import NotPlain, plain_yaml, shortened
from flows.presets import Preset, with_preset
from flows.settings_base import (
    AtLeastOne,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Rate,
    Section,
    Seed,
    Share,
    ShareOrZero,
)
from flows.settings_compare import CompareSettings
from flows.settings_errors import explain
from flows.settings_ray import RaySettings
from p2d_core.attention.layout import ROLES, Roles
from p2d_core.errors import SettingsError

MOST_BYTES = 2**20
"""Of a settings file."""
LONGEST_PATH = 1000
"""Characters."""

Arm = Literal["base", "p2d", "proxy", "random", "full"]


def _pattern(text: str | None) -> str | None:
    try:
        re.compile(text or "")
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from error
    return text


class SourceSettings(Section):
    """Where samples come from: JSON, JSONL, CSV or Parquet files, or a hub dataset."""

    path: Annotated[str, Field(min_length=1)]
    """File, folder or glob, relative to this settings file; or hf://datasets/OWNER/NAME."""
    name: str = ""
    """Of the source in reports; if empty that of the file, its folder (`*.jsonl`) or dataset."""
    prompt: str | None = None
    """Column of the prompt, or a template such as "{instruction}\\n\\n{input}"; found if empty."""
    response: str | None = None
    """Column of the response, or a template; found if empty."""
    messages: str | None = None
    """Column with lists of messages, in place of prompt and response; found if empty."""
    limit: Count | None = None
    """Read at most this many rows; all if empty."""
    skip: CountOrZero = 0
    """Rows left out at the front."""
    format: Literal["csv", "json", "jsonl", "parquet", "tsv"] | None = None
    """What the files are; by their extension if empty."""
    config: str | None = None
    """Configuration of a hub dataset, such as main."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit, branch or tag of a hub dataset; the newest if empty."""


class CorpusSettings(Section):
    """The candidate pool that samples are chosen from."""

    sources: tuple[SourceSettings, ...] = ()
    """Files of candidates, each with a name."""
    include_target: bool = True
    """Also take the target's samples that the proxy set and the evaluation leave over."""


class FormatSettings(Section):
    """How a sample becomes tokens: prompt, separator, response, end of text; or a chat."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: by the tokenizer's chat template; plain: as text; auto: chat if there are messages."""
    separator: str = "\n"
    """Text between prompt and response; not used in a chat."""
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    """Tokens of a sample; longer prompts are cut from the left, chats by whole questions first."""


class HarnessSettings(Section):
    """Tasks of EleutherAI's lm-eval on the base and the adapted model; needs p2d[eval]."""

    tasks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Names of tasks, groups or tags."""
    include_path: str | None = None
    """Folder of further task files, relative to this settings file; they can run code: trust it."""
    limit: Count | None = None
    """First samples of each task; all if empty."""
    num_fewshot: CountOrZero | None = None
    """Examples before each question; as the task says if empty."""
    batch_size: Count = 8
    """Requests in a batch; cannot change a result beyond rounding."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ("base", "p2d")
    """Which models: base, p2d, proxy, random, full; those that a run has not are left out."""


class EvaluationSettings(Section):
    """What the adapted model has to be able to do."""

    source: SourceSettings | None = None
    """Evaluation samples; drawn from the target (and kept out of the corpus) if empty."""
    samples: Count = 200
    """How many samples are drawn from the target when there is no source of their own."""
    retention: SourceSettings | None = None
    """Samples of what the base can do already, to see what is forgotten."""
    metric: str = "loss"
    """What arms are judged by: loss, perplexity, exact_match, rouge_l, or accuracy over choices."""
    also: tuple[str, ...] = ()
    """Further metrics of that list, to be seen beside it."""
    answer_pattern: Annotated[str | None, AfterValidator(_pattern)] = None
    """Regular expression whose last match is compared by exact_match, such as "#### (.*)"."""
    max_new_tokens: Count | None = None
    """Longest generated answer; the longest reference answer plus a quarter if empty."""
    choices: str | None = None
    """Column of each row's choices, a list of texts such as endings or options; for accuracy."""
    answer: str | None = None
    """Column of the right choice's text, letter or position from 0; the response if empty."""
    normalise: Literal["none", "tokens", "bytes"] = "none"
    """What a choice's log-likelihood is divided by, its length in tokens or bytes."""
    harness: HarnessSettings | None = None
    """Tasks of lm-eval, such as {tasks: [arc_easy], limit: 200}; needs p2d[eval]."""


class ProxySettings(Section):
    """The short fine-tuning of all attention projections on a few target samples."""

    samples: Annotated[int, Field(ge=2)] = 100
    """Target samples that the proxy run sees."""
    held_out: Annotated[int, Field(ge=2)] = 50
    """Further target samples on which it is watched, and on which consistency is gauged."""
    epochs: Positive = 3
    """Passes over the proxy samples."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW; the run says what it does to the loss on held-out samples."""
    batch_size: Count = 8
    """Samples in a step."""


class HeadsSettings(Section):
    """Which query heads count as task heads."""

    ranker: str = "frobenius"
    """frobenius, spad, ablation, gradient, taylor; random, bottom or layer (controls)."""
    options: dict[str, Any] = {}
    """Settings of that ranker, for instance {support: values} of spad."""
    fraction: Share = 0.1
    """Share of all query heads that become task heads."""
    max_per_layer: Count | None = None
    """Most task heads in a layer, the next best elsewhere take their place; no limit if empty."""
    one_per_kv_group: bool = False
    """Of heads that share their K and V only the best becomes a task head."""
    average_over: Count = 1
    """Rank on so many draws of the proxy set and take the mean; each has its own proxy run."""
    slices: Roles = ROLES
    """Which of a task head's slices are tuned: q and o are its own, k and v its KV group's."""
    proxy_epochs: Positive = 10
    """Passes over the proxy samples when the task heads alone are tuned (head_proxy)."""
    proxy_learning_rate: Rate = "auto"
    """Peak learning rate of that tuning; auto: found as that of training."""


class ScoringSettings(Section):
    """How every sample of the corpus gets its affinity."""

    scorer: str = "head-filter"
    """head-filter, or another of those that `p2d config --list scorers` explains."""
    options: dict[str, Any] = {}
    """Settings of that scorer, for instance {neighbours: 5} of head-activation."""
    depth: Literal["heads"] | Share = "heads"
    """heads, or the share of the layers beyond which task heads are left out, if any is within."""
    enough: AtLeastOne | None = None
    """Times the wanted samples: when so many passed, gates after the first stop; null: never."""
    tokens_per_batch: Count = 8192
    """Tokens in a forward pass; cannot change a result."""


class SelectionSettings(Section):
    """From affinities to the subset."""

    fraction: Share = 0.1
    """Share of the corpus that training sees."""
    pool: AtLeastOne = 1.0
    """Draw by id hash from the best pool x budget samples (scorers with gates: from all passed)."""
    match_lengths: bool = True
    """Draw so that response lengths are spread as those of the proxy samples."""
    quotas: dict[str, Share] = {}
    """Share of what is chosen by affinity that a source gets, by its name; others get the rest."""
    replay: ShareOrZero = 0.2
    """Share of the subset drawn at random from the corpus' other sources, against forgetting."""
    where: str | None = None
    """SQL condition on the scores that a sample has to meet, such as "n_tokens < 200"."""


class TrainingSettings(Section):
    """Fine-tuning on the subset."""

    adaptation: str = "heads"
    """heads, attention, full, or lora."""
    options: dict[str, Any] = {}
    """Settings of that adaptation, for instance {rank: 8} of lora."""
    with_proxy: bool = True
    """Train on the proxy samples too, in every arm: few, and surely of the target."""
    epochs: Positive = 3
    """Passes over the subset."""
    learning_rate: Rate = "auto"
    """Peak of AdamW's; auto: of 1e-3, 3e-3, ... the best on held-out samples, off the edge."""
    batch_size: Count = 8
    """Samples in a step."""
    group_by_length: bool = False
    """Steps of samples of like length: less padding, so faster; also in full fine-tuning."""
    warmup: ShareOrZero = 0.05
    """Share of the steps in which the learning rate rises; it falls as a cosine after that."""
    checkpoint_seconds: PositiveOrZero = 60
    """Seconds between checkpoints, more where saving is slow; 0: one a step. Changes no result."""
    gradient_checkpointing: bool = False
    """Run layers twice in place of keeping what they compute: less memory, the same result."""
    micro_batch_tokens: Count | None = None
    """Tokens in a pass; a larger step takes several (gradient accumulation); if empty what fits."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """What each of several processes has of the model: all of it, or its share; by the launcher."""


class ArmsSettings(Section):
    """What P2D is held against."""

    random: bool = True
    """Also train on a random subset of the same size, with the same heads."""
    full: Literal["measured", "calibrated"] = "calibrated"
    """Full fine-tuning on the whole corpus: run it, or time some of its steps."""
    full_learning_rate: Rate = "auto"
    """Peak learning rate of full fine-tuning; auto: found as that of training, where it is run."""
    calibration_steps: Annotated[int, Field(ge=4)] = 12
    """Steps that are timed when full is calibrated, after 3 that are not."""


TagName = Annotated[str, Field(max_length=250, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_ .:/-]*$")]
"""As MLflow takes one."""


class TrackingSettings(Section):
    """Where runs are recorded."""

    experiment: Annotated[str, Field(min_length=1)] = "p2d"
    """MLflow experiment."""
    uri: str | None = None
    """MLflow server; if empty MLFLOW_TRACKING_URI, or else SQLite and a folder in the store."""
    tags: dict[TagName, str] = {}
    """Further tags of the run."""


class RegistrySettings(Section):
    """The adapter as a version of a registered model in MLflow, and when it becomes champion."""

    enabled: bool = True
    """Register it; a run that made the same adapter again takes the version that there is."""
    name: Annotated[str, Field(max_length=200, pattern=r"^[\w-][\w .-]*$|^$")] = ""
    """Of the registered model; the run's name if empty."""
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """The champion has to be better than the base by this, in the metric's unit."""


class RunSettings(Section):
    """One adaptation: from base, target and corpus to an adapted model and its AER."""

    name: str = "adapt"
    """What the run is called."""
    preset: Preset = "default"
    """What is left out is what was best on the demo's world (default), the papers', or cheap."""
    base: Annotated[str, Field(min_length=1)]
    """Folder of a model with safetensors, relative to this settings file; or hf://OWNER/NAME@COMMIT."""
    target: SourceSettings
    """The domain to adapt to: a few hundred samples or more."""
    corpus: CorpusSettings = CorpusSettings()
    format: FormatSettings = FormatSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    proxy: ProxySettings = ProxySettings()
    heads: HeadsSettings = HeadsSettings()
    scoring: ScoringSettings = ScoringSettings()
    selection: SelectionSettings = SelectionSettings()
    training: TrainingSettings = TrainingSettings()
    arms: ArmsSettings = ArmsSettings()
    tracking: TrackingSettings = TrackingSettings()
    registry: RegistrySettings = RegistrySettings()
    compare: CompareSettings = CompareSettings()
    seed: Seed = 0
    """Of every draw and of training."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and activations."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; cannot change a result."""
    threads: CountOrZero = 0
    """CPU threads of torch; 0 takes what torch finds."""
    engine: Literal["local", "ray"] = "local"
    """Where models run: in this process, or on the workers of a Ray cluster."""
    ray: RaySettings = RaySettings()
    skip_bad_rows: CountOrZero = 0
    """Rows of all data files that may be no samples; they are left out, with the reason kept."""

    @property
    def n_proxy_trained_on(self) -> int:
        """Proxy samples that every arm sees in training beside its own."""
        return self.proxy.samples if self.training.with_proxy else 0

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        return with_preset(values)


def load_settings(file: Path) -> RunSettings:
    """Settings from a YAML file; paths in it are taken relative to its folder.

    Raises:
        SettingsError: names the file, the key, what was given and what would do.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError(
            f"{file}: there is no such file. `p2d config > {file.name}` writes one to start from."
        ) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file}: cannot be read ({error}). Save it as UTF-8 text.") from error
    if len(text) > MOST_BYTES:
        raise SettingsError(
            f"{file}: has more than {MOST_BYTES:,} bytes, so it is no settings file. "
            "`p2d config` writes one to start from."
        )
    try:
        return parse_settings(plain_yaml(text.decode("utf-8-sig")), file)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: cannot be read ({error}). Save it as UTF-8 text.") from error
    except (yaml.YAMLError, NotPlain) as error:
        raise SettingsError(
            f"{file}: is not YAML of plain values: {' '.join(str(error).split())}. Mend it; "
            "`p2d config` writes one to start from."
        ) from error


def parse_settings(values: Any, file: Path) -> RunSettings:
    """Settings from plain values; ``file`` is named in errors and anchors relative paths."""
    if not isinstance(values, dict):
        raise SettingsError(
            f"{file}: needs keys such as `base:` and `target:`, found {shortened(values)}. "
            "`p2d config` writes a file to start from."
        )
    try:
        settings = RunSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(explain(error, file, RunSettings)) from error
    return anchored(settings, file.parent, where=str(file))


def anchored(settings: RunSettings, folder: Path, *, where: str = "settings") -> RunSettings:
    """The same with every relative path taken from ``folder``; absolute ones stay.

    Raises:
        SettingsError: names ``where`` a path cannot be one, or two sources have one name.
    """
    try:
        settings = _anchored(settings, folder)
    except ValueError as error:
        raise SettingsError(f"{where}: a path in it cannot be one: {error}. Mend it.") from error
    names = [source.name for source in settings.corpus.sources]
    if settings.corpus.include_target:
        names.append(settings.target.name)
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(
                f"{where}: two sources of the corpus are called {name!r}. Give each a `name:`."
            )
    return settings


def named_after(path: str, folder: Path = Path()) -> str:
    """What a source is called that was given no name: its file, folder or name on the hub.

    Args:
        folder: that the path is relative to.
    """
    if "://" in path:
        return path.rstrip("/").rpartition("/")[2].partition("@")[0]
    # without `..`, and links as they are called
    file = Path(os.path.abspath(folder / Path(path).expanduser()))
    return (file.parent.name if set(file.name) & set("*?[") else file.stem) or "files"


def _anchored(settings: RunSettings, folder: Path) -> RunSettings:
    def path(given: str) -> str:
        if len(given) > LONGEST_PATH:
            raise ValueError(f"{given[:60]!r}... has {len(given)} characters")
        try:
            return given if "://" in given else str((folder / Path(given).expanduser()).resolve())
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{given!r}: {str(error).rstrip('.')}") from error

    def source(given: SourceSettings) -> SourceSettings:
        found = path(given.path)
        name = given.name or named_after(given.path, folder)
        return given.model_copy(update={"path": found, "name": name})

    def harness(given: HarnessSettings) -> HarnessSettings:
        folder = given.include_path
        return given.model_copy(update={"include_path": path(folder) if folder else None})

    evaluation = settings.evaluation
    return settings.model_copy(
        update={
            "base": path(settings.base),
            "target": source(settings.target),
            "corpus": settings.corpus.model_copy(
                update={"sources": tuple(source(s) for s in settings.corpus.sources)}
            ),
            "evaluation": evaluation.model_copy(
                update={
                    "source": source(evaluation.source) if evaluation.source else None,
                    "retention": source(evaluation.retention) if evaluation.retention else None,
                    "harness": harness(evaluation.harness) if evaluation.harness else None,
                }
            ),
        }
    )
