"""The figures of the last `make faults` in docs/guarantees.md: python -m tests.faults.page."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "guarantees.md"
RESULTS = HERE / "results.json"
LOAD = HERE / "load.json"
FIGURES = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with the tables that the files of figures give."""
    tables = {"results": _results, "load": _load}
    return FIGURES.sub(lambda m: f"{m[1]}\n{tables[m[2]]()}\n{m[3]}", page)


def _results() -> str:
    if not RESULTS.is_file():
        return "None yet: `make faults` makes them.\n"
    counts = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [f"| `{name}` | {n['tried']:,} | {n['held']:,} |" for name, n in counts.items()]
    tried, held = (sum(n[key] for n in counts.values()) for key in ("tried", "held"))
    rows.append(f"| together | {tried:,} | {held:,} |")
    return "\n".join(["| family | tried | held |", "|---|---|---|", *rows]) + "\n"


def _load() -> str:
    if not LOAD.is_file():
        return "None yet: `make faults` makes them.\n"
    head = "| scorer | samples | seconds | MB of the command | MB of Prefect's server |"
    figures = json.loads(LOAD.read_text(encoding="utf-8")).values()
    rows = [
        f"| `{one['scorer']}` | {one['samples']:,} | {one['seconds']:,} | "
        f"{one['peak_megabytes']:,} | {one['server_megabytes']:,} |"
        for one in sorted(figures, key=lambda one: (one["samples"], one["scorer"]))
    ]
    return "\n".join([head, "|---|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
