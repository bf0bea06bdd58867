"""The studies: which worlds, arms and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.demo import demo_settings
from flows.settings import RunSettings
from p2d_core.synthetic import IN_CONTEXT_BASE_FOLDER
from p2d_core.synthetic.hard_worlds import WORLDS, Kind, write_hard_world

N_PROXY_STEPS = 15 * 100
"""Samples that a proxy run sees in all, with few proxy samples too: passes x samples."""
MOST_EPOCHS = 100
RANDOM_HEADS: tuple[dict[str, Any], ...] = tuple(
    {"name": "random", "options": {"seed": seed}, "label": f"random-{seed}"} for seed in range(3)
)
"""Three draws: one may happen to have the right heads."""

Prepare = Callable[[Path, int], RunSettings]
"""Writes a world's files into a folder for a seed, and gives the settings of a run on them."""


@dataclass(frozen=True)
class Study:
    """Worlds in each of which every ranker and scorer is tried: by whom it chooses, or, trained, by
    what training on its choice gives."""

    about: str
    worlds: Mapping[str, Prepare]
    compare: Mapping[str, Any]
    """Of the section `compare` of the settings; seeds apart."""
    trained: bool = False


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


RANKERS = ("frobenius", "ablation", "spad", *RANDOM_HEADS)
SCORERS = (
    "head-filter",
    "head-activation",
    "head-proxy-loss",
    "loss-shift",
    "tfidf",
    "rds-plus",
    "random",
)

STUDIES: dict[str, Study] = {
    "hard": Study(
        "Which scorer finds the target when words do not tell it, when there are few proxy "
        "samples, and when the target is rare?",
        {
            "plain": hard("plain"),
            "renamed": hard("renamed"),
            "hidden": hard("hidden"),
            "equal-length": hard("equal-length"),
            "30 proxies": hard("plain", n_proxy=30),
            "10 proxies": hard("plain", n_proxy=10),
            "3 proxies": hard("plain", n_proxy=3),
            "rare-1%": hard("rare-1%"),
            "rare-0.1%": hard("rare-0.1%"),
        },
        {"rankers": RANKERS, "scorers": SCORERS, "adaptations": ("full",)},
    ),
    "in-context": Study(
        "With a base that learns from demonstrations: does the attention that they get choose?",
        {
            "renamed": hard("renamed", invented=True),
            "hidden": hard("hidden", invented=True),
        },
        {
            "rankers": ("frobenius", "ablation", *RANDOM_HEADS),
            "scorers": (
                {"name": "icl-attention", "options": {"draws": 4}},
                {
                    "name": "icl-attention",
                    "options": {"draws": 4, "weigh_by_gain": True},
                    "label": "icl-attention, by gain",
                },
                {"name": "data-whisperer", "options": {"draws": 4}},
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
            "rankers": ("frobenius", "ablation", "spad", "random"),
            "scorers": ("head-filter", "head-activation", "loss-shift", "tfidf", "rds-plus",
                        "random"),
            "adaptations": ("heads", "full"),
            "everything": True,
        },
        trained=True,
    ),
}  # fmt: skip
