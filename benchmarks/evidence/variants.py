"""Ways to train that are held against each other, one thing changed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.settings_base import Rate

SUBSET, EVERYTHING = "subset", "full on everything"
BY_CHANCE, PROXY = "random subset", "proxy set"


@dataclass(frozen=True)
class Variant:
    """One way to train: what of the run's settings is different."""

    name: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section -> settings."""
    rates: tuple[Rate, ...] = (4e-3,)
    """Learning rates to choose from on a validation split; none: the best there is, searched."""
    data: str = SUBSET
    """What to train on: `SUBSET`, `EVERYTHING`, as much `BY_CHANCE`, the `PROXY` set alone (as the
    run's head_proxy), or the name of a draw in `draws.DRAWS`."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """How to choose the subset, where not as the run does."""


RATES = (2e-3, 4e-3, 8e-3)
"""Of the task heads, and of LoRA."""
FULL_RATES = (1e-3, 2e-3, 4e-3)
SEARCHED: tuple[Rate, ...] = ()


def heads(name: str, epochs: int = 10, **changes: Any) -> Variant:
    """Head-masked training with other heads."""
    return Variant(name, {"heads": changes, "training": {"epochs": epochs}}, RATES)


def slices(roles: str) -> Variant:
    """Head-masked training of some of the heads' slices alone."""
    name = f"10% by frobenius, {' and '.join(roles)} alone"
    return Variant(name, {"training": {"options": {"slices": [*roles]}}}, RATES)


def others(adaptation: str, rates: tuple[float, ...], **options: Any) -> Variant:
    """Other parameters than the task heads'."""
    training = {"adaptation": adaptation, "options": options}
    return Variant(f"{adaptation} on the subset", {"training": training}, rates)


FULL = Variant(EVERYTHING, {"training": {"adaptation": "full"}}, FULL_RATES, data=EVERYTHING)
TUNING = (
    heads("10% by frobenius"),
    heads("3% by frobenius", fraction=0.03),
    heads("25% by frobenius", fraction=0.25),
    heads("10% by ablation", ranker="ablation"),
    heads("10% by spad", ranker="spad"),
    heads("10% at random", ranker="random"),
    heads("10% by frobenius, 3 epochs", epochs=3),
    heads("10% by frobenius, 30 epochs", epochs=30),
    slices("qo"),
    others("attention", FULL_RATES),
    others("lora", RATES, rank=4),
    others("full", FULL_RATES),
    FULL,
)
WITHOUT_A_GRID = (
    heads("10% by frobenius"),
    heads("25% by frobenius", fraction=0.25),
    *(slices(roles) for roles in ("qk", "qo", "vo")),
    others("attention", FULL_RATES),
    others("lora", RATES, rank=4),
    FULL,
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
