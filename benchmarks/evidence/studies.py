"""The studies: which worlds and arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.variants import (
    DRAWN,
    FOUND,
    SEARCHED,
    TUNING,
    WITH_PROXY,
    WITHOUT_A_GRID,
    Variant,
)
from benchmarks.evidence.worlds import (
    LARGER_BASE,
    SMOLLM2,
    Prepare,
    based_on,
    files_alone,
    gsm8k,
    hard,
    plain,
    with_heads,
    with_mistakes,
    within_hours,
)
from flows.presets import PRESETS
from flows.settings import RunSettings

RANDOM_HEADS: tuple[dict[str, Any], ...] = tuple(
    {"name": "random", "options": {"seed": seed}, "label": f"random-{seed}"} for seed in range(3)
)
"""Three draws: one may happen to have the right heads."""


@dataclass(frozen=True)
class Study:
    """Worlds in each of which every ranker and scorer is tried: by whom it chooses, or, trained, by
    what training on its choice gives; or every variant of training; or whole jobs by preset."""

    about: str
    worlds: Mapping[str, Prepare]
    compare: Mapping[str, Any] = field(default_factory=dict)
    """Of the section `compare` of the settings; seeds apart."""
    trained: bool = False
    with_proxy: bool = False
    """Training sees the proxy samples too, as it does by default; else what a choice is worth shows
    better."""
    variants: tuple[Variant, ...] = ()
    jobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> what its file gives besides the data; others are held against the first."""


def trained_as(study: Study, settings: RunSettings) -> RunSettings:
    """The same with the proxy samples in training or without, as the study wants it."""
    training = settings.training.model_copy(update={"with_proxy": study.with_proxy})
    return settings.model_copy(update={"training": training})


RANKERS = ("frobenius", "spad", *RANDOM_HEADS)


def shift_gate(quantile: float | None, label: str) -> dict[str, Any]:
    """The default filter with its shift gate elsewhere, or without it."""
    options = {"shift_quantile": quantile}
    return {"name": "head-filter", "options": options, "label": f"head-filter, {label}"}


TWO_GATES = shift_gate(None, "two gates")
SHIFT_GATE = shift_gate(0.1, "shift 0.1")
ON_TEXT = {
    "rankers": ("frobenius", "random"),
    "scorers": (TWO_GATES, "head-activation", "tfidf", "rds-plus", "random"),
    "adaptations": ("heads", "full"),
    "everything": True,
}

MAIN_ROWS = ON_TEXT | {"scorers": ("head-filter", "tfidf", "rds-plus", "random")}

SCORERS: tuple[Any, ...] = (
    "head-filter",
    TWO_GATES,
    SHIFT_GATE,
    "loss-filter",
    "head-activation",
    "head-proxy-loss",
    "loss-shift",
    "tfidf",
    "rds-plus",
    "random",
)

ALL_SCORERS: tuple[Any, ...] = (
    "head-filter",
    "loss-filter",
    "head-activation",
    {
        "name": "head-activation",
        "options": {"compare": "mean"},
        "label": "head-activation, mean of the proxies",
    },
    "head-proxy-loss",
    "loss-shift",
    "retrieval-attention",
    "head-gradient",
    "head-influence",
    "icl-attention",
    "data-whisperer",
    {
        "name": "sum",
        "options": {"parts": {"head-activation": 1.0, "head-proxy-loss": 1.0}},
        "label": "sum of head-activation and head-proxy-loss",
    },
    "less",
    "rds-plus",
    "tfidf",
    "bm25",
    "ifd",
    "loss",
    "mid-perplexity",
    "length",
    "random",
)
ALL_RANKERS = (
    "spad",
    {"name": "spad", "options": {"support": "values"}, "label": "spad, values"},
    "frobenius",
    "gradient",
    "taylor",
    "ablation",
    "bottom",
    *RANDOM_HEADS,
)


def by_two_gates(folder: Path, seed: int) -> RunSettings:
    """The demo with a subset that was chosen without the shift gate, as it was by default once."""
    values = plain(folder, seed).model_dump(mode="json")
    values["scoring"]["options"] = TWO_GATES["options"]
    return RunSettings.model_validate(values)


def half_as_many(folder: Path, seed: int) -> RunSettings:
    """The same with a twentieth of the corpus, so that a draw leaves much out."""
    values = by_two_gates(folder, seed).model_dump(mode="json")
    values["selection"]["fraction"] = 0.05
    return RunSettings.model_validate(values)


def passes(epochs: int, rate: str) -> dict[str, Any]:
    """A proxy run of so many passes with that learning rate."""
    return {"proxy": {"epochs": epochs, "learning_rate": float(rate)}}


SMOLLM2_WRONG = with_mistakes(
    based_on(SMOLLM2, within_hours(gsm8k(n_target=90, n_code=1, base=SMOLLM2.folder.name))),
    counts=(300, 100, 200),
)
LAYERS: tuple[dict[str, Any], ...] = tuple(
    {"name": "layer", "options": {"layer": layer}, "fraction": 0.25, "label": f"layer {layer}"}
    for layer in range(4)
)
ALL_HEADS = {"name": "random", "fraction": 1.0, "label": "all heads"}
AS_THE_PAPER = {"name": "icl-attention", "options": PRESETS["paper"]["scoring"]["options"]}

STUDIES: dict[str, Study] = {
    "hard": Study(
        "Which scorer finds the target when words do not tell it, nor lengths?",
        {
            "plain": hard("plain"),
            "renamed": hard("renamed"),
            "hidden": hard("hidden"),
            "equal-length": hard("equal-length"),
        },
        {"rankers": RANKERS, "scorers": SCORERS, "adaptations": ("full",)},
    ),
    "scorers": Study(
        "Every scorer as it is by default, where words tell the target and where they do not.",
        {"plain": hard("plain"), "renamed": hard("renamed")},
        {"rankers": ("frobenius",), "scorers": ALL_SCORERS, "adaptations": ("full",)},
    ),
    "rankers": Study(
        "Every ranker, where words do not tell the target.",
        {"renamed": hard("renamed")},
        {
            "rankers": ALL_RANKERS,
            "scorers": ("head-filter", "head-activation", "head-proxy-loss", "tfidf", "random"),
            "adaptations": ("full",),
        },
    ),
    "head-maps": Study(
        "The same world: is a mean over proxy sets better, or heads that are spread?",
        {
            "mean of 3 proxy sets": with_heads(hard("renamed", n_spare=200), average_over=3),
            "one head a layer": with_heads(hard("renamed"), max_per_layer=1),
            "one head a KV group": with_heads(hard("renamed"), one_per_kv_group=True),
        },
        {
            "rankers": ("frobenius", "spad", "random"),
            "scorers": ("head-filter", "head-activation", "head-proxy-loss"),
            "adaptations": ("full",),
        },
    ),
    "scarce": Study(
        "Which scorer finds the target with few proxy samples, and when the target is rare?",
        {
            "30 proxies": hard("plain", n_proxy=30),
            "10 proxies": hard("plain", n_proxy=10),
            "3 proxies": hard("plain", n_proxy=3),
            "rare-1%": hard("rare-1%"),
            "rare-0.1%": hard("rare-0.1%"),
        },
        {
            "rankers": ("frobenius", "ablation", RANDOM_HEADS[0]),
            "scorers": tuple(name for name in SCORERS if name != "loss-shift"),
            "adaptations": ("full",),
        },
    ),
    "in-context": Study(
        "With a base that learns from demonstrations: does the attention that they get choose?",
        {
            "renamed": hard("renamed", invented=True),
            "hidden": hard("hidden", invented=True),
        },
        {
            "rankers": ("frobenius", "ablation", *RANDOM_HEADS, ALL_HEADS),
            "scorers": (
                {"name": "icl-attention", "options": {"draws": 4}},
                {
                    "name": "icl-attention",
                    "options": {"draws": 4, "weigh_by_gain": True},
                    "label": "icl-attention, by gain",
                },
                {"name": "data-whisperer", "options": {"draws": 4}},
                {
                    "name": "data-whisperer",
                    "options": {"draws": 4, "judged_by": "likelihood"},
                    "label": "data-whisperer, by likelihood",
                },
                "head-proxy-loss",
                "head-activation",
                "tfidf",
                "rds-plus",
                "random",
            ),
            "adaptations": ("full",),
        },
    ),
    "in-context-layers": Study(
        "The same base: are all heads of one layer better to choose by than the task heads, and is "
        "attention a token, as the papers have it, better than with length and place taken off?",
        {"renamed": hard("renamed", invented=True)},
        {
            "rankers": ("frobenius", *RANDOM_HEADS, ALL_HEADS, *LAYERS),
            "scorers": (
                {"name": "icl-attention", "options": {"draws": 4}},
                {
                    "name": "icl-attention",
                    "options": {"draws": 4, "bias": "per-token"},
                    "label": "icl-attention, per token",
                },
                "tfidf",
                "random",
            ),
            "adaptations": ("full",),
        },
    ),
    "synthetic": Study(
        "The main job with everything that it is held against, on the demo's world.",
        {"plain": plain},
        {
            "rankers": ("frobenius", "random"),
            "scorers": (
                TWO_GATES, SHIFT_GATE, "loss-filter", AS_THE_PAPER, "tfidf", "rds-plus",
                "random",
            ),
            "adaptations": ("heads", "full"),
            "everything": True,
        },
        trained=True,
    ),
    "gates": Study(
        "With 100 proxy samples: which gates choose what is better to train on?",
        {"plain": plain},
        {
            "rankers": ("frobenius",),
            "scorers": (
                "head-filter", TWO_GATES, shift_gate(0.0, "shift 0"),
                shift_gate(0.03, "shift 0.03"), SHIFT_GATE, "loss-filter", "random",
            ),
            "adaptations": ("heads",),
        },
        trained=True,
    ),
    "few-proxies": Study(
        "With 30 proxy samples: is the gate that chooses better there also better to train on?",
        {"30 proxies": hard("plain", n_proxy=30)},
        {
            "rankers": ("frobenius", "random"),
            "scorers": ("head-filter", TWO_GATES, SHIFT_GATE, "loss-filter", "tfidf", "random"),
            "adaptations": ("heads", "full"),
        },
        trained=True,
    ),
    "gsm8k-and-code": Study(
        "Real text and a weak base: GSM8K from a corpus of GSM8K and CodeAlpaca.",
        {"text": gsm8k(n_target=700, n_code=550)},
        ON_TEXT,
        trained=True,
    ),
    "gsm8k-alone": Study(
        "Real text and a weak base: the corpus is what the proxy set leaves of GSM8K itself.",
        {"text": gsm8k(n_target=1250, n_code=0)},
        ON_TEXT,
        trained=True,
    ),
    "smollm2": Study(
        "Real text and a base that knows it: GSM8K from a corpus of GSM8K and CodeAlpaca, with "
        "SmolLM2-135M-Instruct.",
        {
            "text": based_on(
                SMOLLM2, within_hours(gsm8k(n_target=290, n_code=100, base=SMOLLM2.folder.name))
            )
        },
        ON_TEXT
        | {
            "scorers": ("head-filter", "head-activation", "tfidf", "rds-plus", "random"),
            "adaptations": ("heads",),
        },
        trained=True,
    ),
    "smollm2-wrong": Study(
        "The same base where a sixth of the corpus has answers of other questions, and a third is "
        "code: which scorer chooses what is better to train on?",
        {"text": SMOLLM2_WRONG},
        {
            "rankers": ("frobenius",),
            "scorers": (
                "head-filter", TWO_GATES, "loss-filter", "head-activation", "tfidf", "rds-plus",
                "random",
            ),
            "adaptations": ("heads",),
            "everything": False,
        },
        trained=True,
    ),
    "smollm2-with-proxy": Study(
        "The same, and training sees the proxy samples too, as it does by default.",
        {"text": SMOLLM2_WRONG},
        {
            "rankers": ("frobenius",),
            "scorers": ("head-filter", "loss-filter", "tfidf", "random"),
            "adaptations": ("heads",),
            "everything": False,
        },
        trained=True,
        with_proxy=True,
    ),
    "larger-base": Study(
        "The main rows of the synthetic study with a base of 42 M parameters.",
        {"plain": based_on(LARGER_BASE, plain)},
        MAIN_ROWS,
        trained=True,
    ),
    "larger-base-text": Study(
        "The main rows on GSM8K and CodeAlpaca with a base of 42 M parameters.",
        {"text": based_on(LARGER_BASE, gsm8k(n_target=700, n_code=550, base="larger-base"))},
        MAIN_ROWS,
        trained=True,
    ),
    "larger-base-renamed": Study(
        "Which scorer finds the target where words do not tell it, with a base of 42 M parameters?",
        {"renamed": based_on(LARGER_BASE, hard("renamed"))},
        {
            "rankers": ("frobenius", "spad", RANDOM_HEADS[0]),
            "scorers": tuple(name for name in SCORERS if name != "loss-shift"),
            "adaptations": ("full",),
        },
    ),
    "presets": Study(
        "What does a job get that gives its files and a preset, and leaves all else as it is, on "
        "the demo's world?",
        {"plain": files_alone},
        jobs={"default": {}, "cheap": {"preset": "cheap"}, "paper": {"preset": "paper"}},
    ),
    "proxy-run": Study(
        "The same: how long a proxy run, with which learning rate, makes a ranking whose heads are "
        "worth tuning?",
        {"plain": files_alone},
        jobs={
            "3 passes at 1e-4 (default)": {},
            **{
                f"{epochs} passes at {rate}": passes(epochs, rate)
                for epochs, rate in ((10, "3e-4"), (10, "1e-3"), (10, "3e-3"), (20, "1e-3"))
            },
            **{
                f"10 passes at 1e-3, {name}": {**passes(10, "1e-3"), "heads": heads}
                for name, heads in {
                    "spad": {"ranker": "spad"},
                    "ablation": {"ranker": "ablation"},
                    "one head a layer": {"max_per_layer": 1},
                    "one head a KV group": {"one_per_kv_group": True},
                }.items()
            },
            **{
                f"random heads, draw {seed}": {
                    "heads": {"ranker": "random", "options": {"seed": seed}}
                }
                for seed in range(3)
            },
        },
    ),
    "tuning": Study(
        "What has to move, on the same tenth of the demo's corpus, to be as good as all parameters "
        "on all of it?",
        {"plain": by_two_gates},
        variants=TUNING,
    ),
    "searched": Study(
        "The same where training sees the proxy samples too, each with the best of all learning "
        "rates; and which of the heads' slices?",
        {"plain": plain},
        variants=tuple(replace(each, rates=SEARCHED) for each in WITHOUT_A_GRID),
        with_proxy=True,
    ),
    "with-proxy": Study(
        "Should training see the proxy samples too?",
        {"plain": plain},
        variants=WITH_PROXY,
    ),
    "rates": Study(
        "Is the learning rate that is best on the proxy set the best for training?",
        {"plain": plain},
        variants=FOUND,
    ),
    "draws": Study(
        "How to draw from what passes the gates, a twentieth of the demo's corpus, and how much "
        "replay against forgetting?",
        {"plain": half_as_many},
        variants=DRAWN,
    ),
}  # fmt: skip
