"""``python -m benchmarks.evidence``: runs studies, keeps their tables, and writes the page."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from flows.environment import prepare_environment, start_server
from p2d_core.aer import machine_name

ROOT = Path(__file__).parents[2]
log = logging.getLogger(__name__)


def main() -> None:
    """Studies that are not run keep their tables; the page has all that there are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "--study", nargs="*", metavar="NAME", default=None,
        help="which, see studies.py; all if left out, without a name the page alone",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--store", type=Path, default=ROOT / "artifacts" / "evidence")
    parser.add_argument("--kept", type=Path, default=ROOT / "docs" / "evidence")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    run_studies(given.study, range(given.seeds), given.store.resolve(), given.kept)


def run_studies(names: Sequence[str] | None, seeds: range, store: Path, kept: Path) -> None:
    """Each study, and the page after each; names that are none are refused before the first."""
    # what is set for Prefect has to stand before it is imported
    prepare_environment(store)
    start_server()
    from benchmarks.evidence import jobs, page, selection, training, tuning
    from benchmarks.evidence.studies import STUDIES
    from benchmarks.evidence.worlds import NotThere

    for name in (chosen := list(STUDIES) if names is None else list(names)):
        if name not in STUDIES:
            raise SystemExit(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
    for name in chosen:
        start, study = time.perf_counter(), STUDIES[name]
        kinds = ((study.variants, tuning), (study.jobs, jobs), (study.trained, training))
        runner = next((runner for has, runner in kinds if has), selection)
        try:
            runner.run(study, seeds, store, kept / name)
        except NotThere as error:
            log.warning("%s: skipped: %s", name, error)
            continue
        (kept / name / page.MACHINE).write_text(json.dumps({"machine": machine_name()}) + "\n")
        log.info("%s: %d seeds in %.0f s", name, len(seeds), time.perf_counter() - start)
        page.write(kept)
    page.write(kept)


if __name__ == "__main__":
    main()
