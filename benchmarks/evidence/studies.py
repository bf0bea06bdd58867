"""The studies: which worlds, arms and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.evidence.mistaken import write_mistaken
from flows.demo import demo_settings
from flows.presets import PRESETS
from flows.settings import RunSettings, parse_settings
from flows.settings_base import Rate
from p2d_core.synthetic import IN_CONTEXT_BASE_FOLDER
from p2d_core.synthetic.hard_worlds import WORLDS, Kind, write_hard_world

EXAMPLES = Path(__file__).parents[2] / "examples"
GSM8K = EXAMPLES / "gsm8k.yaml"
N_PROXY_STEPS = 15 * 100
"""Samples that a proxy run sees in all, with few proxy samples too: passes x samples."""
MOST_EPOCHS = 100
RANDOM_HEADS: tuple[dict[str, Any], ...] = tuple(
    {"name": "random", "options": {"seed": seed}, "label": f"random-{seed}"} for seed in range(3)
)
"""Three draws: one may happen to have the right heads."""

Prepare = Callable[[Path, int], RunSettings]
"""Writes a world's files into a folder for a seed, and gives the settings of a run on them."""


SUBSET, EVERYTHING = "subset", "full on everything"
BY_CHANCE, PROXY = "random subset", "proxy set"


@dataclass(frozen=True)
class Variant:
    """One way to train: what of the run's settings is different."""

    name: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section -> settings."""
    rates: tuple[Rate, ...] = (4e-3,)
    """Learning rates to choose from on a validation split."""
    data: str = SUBSET
    """What to train on: `SUBSET`, `EVERYTHING`, as much `BY_CHANCE`, the `PROXY` set alone (as the
    run's head_proxy), or the name of a draw in `draws.DRAWS`."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """How to choose the subset, where not as the run does."""


@dataclass(frozen=True)
class Study:
    """Worlds in each of which every ranker and scorer is tried: by whom it chooses, or, trained, by
    what training on its choice gives; or every variant of training."""

    about: str
    worlds: Mapping[str, Prepare]
    compare: Mapping[str, Any] = field(default_factory=dict)
    """Of the section `compare` of the settings; seeds apart."""
    trained: bool = False
    with_proxy: bool = False
    """Training sees the proxy samples too, as it does by default; else what a choice is worth shows
    better."""
    variants: tuple[Variant, ...] = ()


def trained_as(study: Study, settings: RunSettings) -> RunSettings:
    """The same with the proxy samples in training or without, as the study wants it."""
    training = settings.training.model_copy(update={"with_proxy": study.with_proxy})
    return settings.model_copy(update={"training": training})


def plain(folder: Path, seed: int) -> RunSettings:
    """The demo."""
    return demo_settings(folder, seed)


def hard(kind: Kind, *, n_proxy: int = 100, invented: bool = False) -> Prepare:
    """A hard world; its base is the one that learns in context where surfaces are invented."""

    def prepare(folder: Path, seed: int) -> RunSettings:
        held_out = max(2, n_proxy)
        files = write_hard_world(folder, kind, seed, invented=invented, n_target=n_proxy + held_out)
        settings = demo_settings(folder / "demo", seed)
        values = settings.model_dump(mode="json")
        counts = WORLDS[kind].counts
        values |= {
            "name": kind,
            "target": {"path": str(files.target), "name": "ledger"},
            "corpus": {"sources": [{"path": str(files.corpus)}], "include_target": False},
            "evaluation": {"source": {"path": str(files.evaluation)}, "metric": "exact_match"},
        }
        if invented:
            values["base"] = str(IN_CONTEXT_BASE_FOLDER)
        epochs = min(MOST_EPOCHS, N_PROXY_STEPS / n_proxy)
        values["proxy"] |= {"samples": n_proxy, "held_out": held_out, "epochs": epochs}
        values["heads"]["proxy_epochs"] = min(MOST_EPOCHS, 20 * 100 / n_proxy)
        # a tenth of the corpus, or as many as there are of the target: more would cap precision
        n_corpus = 3000
        values["selection"] |= {"replay": 0.0, "fraction": min(0.1, counts[0] / n_corpus)}
        return RunSettings.model_validate(values)

    return prepare


class NotThere(Exception):
    """What a study reads is not on this machine; says what, and what to do."""


@dataclass(frozen=True)
class Base:
    """A base that `examples/<script>.py` makes, and the learning rates that go with it.

    Lower than those of small bases, and but for SmolLM2's heads not searched for.
    """

    script: str
    proxy: float
    head_proxy: float
    heads: float
    full: float

    @property
    def folder(self) -> Path:
        """Where the script puts it."""
        return EXAMPLES / self.script.replace("_", "-")


LARGER_BASE = Base("larger_base", proxy=3e-4, head_proxy=2e-3, heads=2e-3, full=5e-4)
"""42 M parameters that know text and the world."""
# of the heads the best of 3e-4, 1e-3 and 3e-3 in a run with seed 100
SMOLLM2 = Base("smollm2", proxy=1e-4, head_proxy=1e-3, heads=3e-3, full=1e-4)
"""135 M parameters, trained on 2e12 tokens."""


def based_on(base: Base, prepare: Prepare) -> Prepare:
    """The same with another base, in bfloat16."""

    def prepared(folder: Path, seed: int) -> RunSettings:
        if not base.folder.exists():
            name = f"examples/{base.folder.name}"
            raise NotThere(f"there is no {name}; examples/{base.script}.py makes it")
        values = prepare(folder, seed).model_dump(mode="json")
        values |= {"base": str(base.folder), "precision": "bfloat16"}
        values["proxy"] |= {"learning_rate": base.proxy}
        values["heads"] |= {"proxy_learning_rate": base.head_proxy}
        values["training"] |= {"learning_rate": base.heads}
        values["arms"] |= {"full_learning_rate": base.full}
        return RunSettings.model_validate(values)

    return prepared


def gsm8k(*, n_target: int, n_code: int, base: str | None = None) -> Prepare:
    """The example on real text, smaller; without the other source it is the paper's setting, in
    which the corpus is the rest of the target's own training set."""

    def prepare(folder: Path, seed: int) -> RunSettings:
        values = yaml.safe_load(GSM8K.read_text(encoding="utf-8"))
        values["base"] = base or values["base"]
        sources = values["corpus"]["sources"]
        files = (values["base"], *(s["path"] for s in (values["target"], *sources)))
        for file in files:
            if not (GSM8K.parent / file).exists():
                raise NotThere(f"there is no {file}; {GSM8K.name} says how to get it")
        values["target"]["limit"] = n_target
        sources[0]["limit"] = n_code
        values["corpus"]["sources"] = sources if n_code else []
        return parse_settings(values | {"seed": seed, "threads": 1}, GSM8K)

    return prepare


def with_mistakes(prepare: Prepare, *, counts: tuple[int, int, int]) -> Prepare:
    """The same where the corpus has so many samples of GSM8K, of GSM8K with the answers of other
    questions, and of code."""

    def prepared(folder: Path, seed: int) -> RunSettings:
        settings = prepare(folder, seed)
        values = settings.model_dump(mode="json")
        target, corpus = write_mistaken(
            folder,
            Path(settings.target.path),
            Path(settings.corpus.sources[0].path),
            seed,
            n_target=settings.proxy.samples + settings.proxy.held_out,
            counts=counts,
        )
        values["target"] = {"path": str(target), "name": "gsm8k"}
        values["corpus"] = {"sources": [{"path": str(corpus)}], "include_target": False}
        return RunSettings.model_validate(values)

    return prepared


def within_hours(prepare: Prepare) -> Prepare:
    """The same at a size that a base of 135 M parameters takes an hour a seed for, on one core."""

    def prepared(folder: Path, seed: int) -> RunSettings:
        values = prepare(folder, seed).model_dump(mode="json")
        values["proxy"] |= {"samples": 60, "held_out": 30, "epochs": 2, "batch_size": 4}
        values["heads"] |= {"proxy_epochs": 2}
        values["training"] |= {"epochs": 2, "batch_size": 4}
        values["evaluation"]["source"]["limit"] = 100
        return RunSettings.model_validate(values)

    return prepared


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

RATES = (2e-3, 4e-3, 8e-3)
"""Of the task heads, and of LoRA."""
FULL_RATES = (1e-3, 2e-3, 4e-3)


def heads(name: str, epochs: int = 10, **changes: Any) -> Variant:
    """Head-masked training with other heads."""
    return Variant(name, {"heads": changes, "training": {"epochs": epochs}}, RATES)


def others(adaptation: str, rates: tuple[float, ...], **options: Any) -> Variant:
    """Other parameters than the task heads'."""
    training = {"adaptation": adaptation, "options": options}
    return Variant(f"{adaptation} on the subset", {"training": training}, rates)


TUNING = (
    heads("10% by frobenius"),
    heads("3% by frobenius", fraction=0.03),
    heads("25% by frobenius", fraction=0.25),
    heads("10% by ablation", ranker="ablation"),
    heads("10% by spad", ranker="spad"),
    heads("10% at random", ranker="random"),
    heads("10% by frobenius, 3 epochs", epochs=3),
    heads("10% by frobenius, 30 epochs", epochs=30),
    Variant(
        "10% by frobenius, q and o alone", {"training": {"options": {"include_kv": False}}}, RATES
    ),
    others("attention", FULL_RATES),
    others("lora", RATES, rank=4),
    others("full", FULL_RATES),
    Variant(EVERYTHING, {"training": {"adaptation": "full"}}, FULL_RATES, data=EVERYTHING),
)
TWICE = {"training": {"epochs": 20}}
DRAWN = (
    Variant("by response length, as the proxies", TWICE),
    *(
        Variant(name, TWICE, data=draw)
        for name, draw in (
            ("uniformly", "uniform"),
            ("the highest affinity", "top"),
            ("by cluster of head vectors", "clusters"),
            ("by facility location on head vectors", "facility-location"),
        )
    ),
    *(
        Variant(f"by response length, replay {share}", TWICE, selection={"replay": share})
        for share in (0.0, 0.2, 0.6)
    ),
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


TOO = {"training": {"with_proxy": True}}
WITH_PROXY = (
    Variant("the chosen"),
    Variant("the chosen and the proxy set", TOO),
    Variant("as many at random", data=BY_CHANCE),
    Variant("as many at random and the proxy set", TOO, data=BY_CHANCE),
    Variant("the proxy set", data=PROXY),
    Variant(EVERYTHING, {"training": {"adaptation": "full"}}, data=EVERYTHING),
    Variant(
        f"{EVERYTHING} and the proxy set",
        {"training": {"adaptation": "full", "with_proxy": True}},
        data=EVERYTHING,
    ),
)
FOUND = (
    Variant("found on the proxy set (auto)", TOO, ("auto",)),
    Variant("found in 3 passes over it", {**TOO, "heads": {"proxy_epochs": 3}}, ("auto",)),
    *(Variant(f"{rate:g}", TOO, (rate,)) for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
)


SMOLLM2_WRONG = with_mistakes(
    based_on(SMOLLM2, within_hours(gsm8k(n_target=90, n_code=1, base=SMOLLM2.folder.name))),
    counts=(300, 100, 200),
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
    "tuning": Study(
        "What has to move, on the same tenth of the demo's corpus, to be as good as all parameters "
        "on all of it?",
        {"plain": by_two_gates},
        variants=TUNING,
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
