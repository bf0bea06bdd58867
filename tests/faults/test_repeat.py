"""The same seed gives the same result; more threads may move no more than ties at the boundary."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from p2d_core.heads.head_map import read_head_map
from p2d_core.store import Store
from tests.faults.job import write_settings
from tests.faults.undisturbed import Undisturbed, contents, files
from tests.faults.warm import Warm

TIE = 1e-4
"""Affinities as close to a boundary as this, relative to it, may fall on its other side."""


def test_a_run_from_nothing_repeats_keys_head_map_subset_and_metrics(
    warm: Warm, undisturbed: Undisturbed, empty: Path
) -> None:
    code, said = warm.run("adapt", "run.yaml", "--summary", "again.json")
    assert code == 0, said
    assert files(empty) == undisturbed.files
    assert contents(empty) == undisturbed.contents
    assert undisturbed.summary_in(warm.folder / "again.json") == undisturbed.results


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.faults) for seed in (1, 2)])
def test_another_seed_repeats_itself_and_is_another_run(
    seed: int, warm: Warm, undisturbed: Undisturbed, empty: Path
) -> None:
    write_settings(warm.folder, "seed.yaml", seed=seed)
    code, said = warm.run("adapt", "seed.yaml")
    assert code == 0, said
    first = contents(empty)
    (empty / "moved").parent.rename(warm.folder / f"seed-{seed}")
    assert warm.run("adapt", "seed.yaml")[0] == 0
    assert contents(empty) == first
    assert first != undisturbed.contents


@pytest.mark.faults
def test_another_number_of_threads_moves_only_ties_at_the_boundary(
    warm: Warm, undisturbed: Undisturbed, empty: Path
) -> None:
    write_settings(warm.folder, "threads.yaml", threads=2)
    code, said = warm.run("adapt", "threads.yaml", "--summary", "threads.json")
    assert code == 0, said
    (heads,) = Store(empty).refs("heads")
    same = read_head_map(undisturbed.store / "heads" / heads.key / "heads.parquet")
    assert read_head_map(heads.path / "heads.parquet").task_heads == same.task_heads
    (subset,) = Store(empty).refs("subset")
    scores = Store(empty).resolve(subset.manifest.inputs["scores"])
    boundaries = {name: gate["threshold"] for name, gate in scores.manifest.facts["gates"].items()}
    assert set(boundaries) == {"domain", "consistency"}
    boundaries["affinity"] = subset.manifest.facts["cut_off"]
    rows: dict[str, dict] = {}
    chosen = []
    for folder in (undisturbed.store / "subset" / subset.key, subset.path):
        table = pq.read_table(folder / "subset.parquet").to_pylist()
        rows |= {row["sample_id"]: row for row in table}
        chosen.append({row["sample_id"] for row in table})
    moved = chosen[0] ^ chosen[1]
    ties = {
        sample
        for sample in moved
        if any(abs(rows[sample][name] - at) <= TIE * abs(at) for name, at in boundaries.items())
    }
    assert len(moved - ties) <= len(ties), "no more than what takes the place of a tie"


def test_the_report_names_the_boundary(warm: Warm, undisturbed: Undisturbed) -> None:
    (file,) = undisturbed.store.glob("subset/*/subset.parquet")
    table = pq.read_table(file).to_pylist()
    lowest = min(row["affinity"] for row in table if row["chosen_by"] == "affinity")
    summary = json.loads((warm.folder / "summary.json").read_text())
    assert summary["selection"]["cut_off"] == lowest
    assert f"down to affinity {lowest:.6g}." in undisturbed.said
