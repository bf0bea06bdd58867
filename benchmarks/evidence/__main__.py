"""``python -m benchmarks.evidence``: runs studies, keeps their tables, and writes the page."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from benchmarks.evidence import page, selection, training
from benchmarks.evidence.studies import STUDIES
from flows.environment import prepare_environment

ROOT = Path(__file__).parents[2]
log = logging.getLogger(__name__)


def main() -> None:
    """Studies that are not run keep their tables; the page has all that there are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "--study", nargs="*", choices=sorted(STUDIES), default=sorted(STUDIES), metavar="NAME",
        help=f"{', '.join(sorted(STUDIES))}; all if left out, none for the page alone",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--store", type=Path, default=ROOT / "artifacts" / "evidence")
    parser.add_argument("--kept", type=Path, default=ROOT / "docs" / "evidence")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    store = given.store.resolve()
    prepare_environment(store)
    for name in given.study:
        start, study = time.perf_counter(), STUDIES[name]
        run = training.run if study.trained else selection.run
        run(study, range(given.seeds), store, given.kept / name)
        log.info("%s: %d seeds in %.0f s", name, given.seeds, time.perf_counter() - start)
        page.write(given.kept)
    page.write(given.kept)


if __name__ == "__main__":
    main()
