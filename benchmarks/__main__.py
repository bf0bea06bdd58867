"""``python -m benchmarks``: runs what is asked for and writes results.json and results.md."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch

from benchmarks import ranking, report, reuse, scoring, subset, training
from benchmarks.figures import Figure
from benchmarks.sizes import SIZES

PARTS = {
    "scoring": scoring.measure,
    "growth": scoring.growth,
    "ranking": ranking.measure,
    "training": training.measure,
    "subset": subset.measure,
    "reuse": reuse.measure,
}
log = logging.getLogger(__name__)


def main() -> None:
    """Parts that are not run keep the figures of an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument(
        "--out", type=Path, help="where to write; benchmarks/, and benchmarks/gpu/ of a GPU"
    )
    given = parser.parse_args()
    out: Path = given.out or Path(__file__).parent / ("gpu" if given.size == "gpu" else "")
    out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    size = SIZES[given.size]
    if size.device == "cuda" and not torch.cuda.is_available():
        parser.error("--size gpu needs a GPU, and torch sees none. Leave it out for the CPU's.")
    figures: list[Figure] = []
    before = out / report.JSON if set(given.only) != set(PARTS) else None
    for part in given.only:
        start = time.perf_counter()
        for figure in PARTS[part](size):
            figures.append(figure)
            met = "met" if figure.met else "not met"
            log.info("%s: %.3f, goal %.3g %s", figure.name, figure.ratio, figure.goal, met)
            # after each figure: what fails or is stopped later takes nothing away
            report.write(report.merged(before, figures), out)
        log.info("%s took %.0f s", part, time.perf_counter() - start)
    report.show(figures)


if __name__ == "__main__":
    main()
