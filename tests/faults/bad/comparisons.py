"""Bad grids: what `p2d compare` alone looks at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tests.faults.bad.job import Bad, Job

TWO_CALLED_ALIKE = [
    {"name": "random", "label": "a"}, {"name": "random", "options": {"seed": 1}, "label": "a"},
]  # fmt: skip
GRIDS: tuple[tuple[str, Any, str], ...] = (
    ("rankers", ["spda"], "there is no ranker 'spda'"),
    ("rankers", [{"name": "frobenius", "options": {"tau": 1}}], "ranker 'frobenius' has no se"),
    ("rankers", [{"name": "frobenius", "fraction": 7}], "compare.rankers"),
    ("rankers", [{"name": "frobenius", "fraction": 0}], "compare.rankers"),
    ("rankers", [{"nmae": "frobenius"}], "compare.rankers"),
    ("rankers", [{}], "compare.rankers"),
    ("rankers", [3], "compare.rankers"),
    ("rankers", [["frobenius"]], "compare.rankers"),
    ("rankers", [], "compare.rankers"),
    ("rankers", None, "compare.rankers"),
    ("rankers", TWO_CALLED_ALIKE, "two of them are called 'a'"),
    ("scorers", ["bm42"], "there is no scorer 'bm42'"),
    ("scorers", ["../../evil"], "there is no scorer '../../evil'"),
    ("scorers", [{"name": "sum", "options": {"parts": {}}}], "sum"),
    ("scorers", [{"name": "sum", "options": {"parts": {"nothing": 1}}}], "nothing"),
    ("scorers", [{"name": "head-filter", "options": {"domain_quantile": 2}}], "domain_quantile"),
    ("scorers", [{"name": "random", "options": {"seed": "x"}}], "seed"),
    ("scorers", [], "compare.scorers"),
    ("scorers", {"name": "random"}, "compare.scorers"),
    ("scorers", TWO_CALLED_ALIKE, "two of them are called 'a'"),
    ("adaptations", ["os.system"], "there is no adaptation 'os.system'"),
    ("adaptations", [{"name": "lora", "options": {"rank": 0}}], "rank"),
    ("adaptations", [{"name": "heads", "learning_rate": -1}], "compare.adaptations"),
    ("adaptations", [{"name": "heads", "learning_rate": float("nan")}], "compare.adaptations"),
    ("adaptations", [{"name": "heads", "learning_rate": "fast"}], "compare.adaptations"),
    ("adaptations", [], "compare.adaptations"),
    ("fractions", [], "compare.fractions"),
    ("fractions", [0], "compare.fractions"),
    ("fractions", [1.5], "compare.fractions"),
    ("fractions", [float("nan")], "compare.fractions"),
    ("fractions", ["all"], "compare.fractions"),
    ("seeds", [], "compare.seeds"),
    ("seeds", [-1], "compare.seeds"),
    ("seeds", [0.5], "compare.seeds"),
    ("seeds", ["a"], "compare.seeds"),
    ("everything", "perhaps", "compare.everything"),
)
"""A key of the section, what it is given, and what the message has to name."""


def comparisons() -> Iterator[Bad]:
    for n, (key, value, named) in enumerate(GRIDS):

        def breaks(job: Job, rng: random.Random, key: str = key, value: Any = value) -> None:
            job.command = "compare"
            job.set(f"compare.{key}", value)

        yield Bad(f"compare {n}, {key}: {value}", breaks, named)
