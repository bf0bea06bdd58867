"""`p2d adapt` in two processes of torchrun and of accelerate launch: what one process makes.

The first run ends by a kill in the middle of training; the second, with the other launcher and the
model in shares, goes on from there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from p2d_core.adaptation.training import SEAL
from p2d_core.affinity.scoring import STATE
from p2d_core.store import ArtifactRef, Store
from tests.job import Job

SCRIPT = str(Path(__file__).with_name("counting.py"))
BIN = Path(sys.executable).parent
TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", SCRIPT)
ACCELERATE = (
    str(BIN / "accelerate"), "launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2",
    "--main_process_port", "0", SCRIPT,
)  # fmt: skip
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
ROWS = {
    "target.jsonl": 60, "evaluation.jsonl": 6, "corpus/ledgers.jsonl": 300,
    "corpus/drills.jsonl": 900,
}  # fmt: skip


class Launched:
    """The runs of two processes over one store, and that of one process over another."""

    def __init__(self, folder: Path) -> None:
        training = {"epochs": 2, "checkpoint_seconds": 0.1}
        # few steps come of the rate that is found: at a high one many make rounding grow
        self.job = Job(folder, ROWS, training=training, heads={"proxy_learning_rate": "auto"})
        self.folder, self.store = folder, folder / "two"
        (folder / "run.yaml").write_text(yaml.safe_dump(self.job.values))

    def start(self, *launcher: str) -> subprocess.Popen[str]:
        command = ("adapt", "run.yaml", "--store", "two", "--verbose")
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        return subprocess.Popen(
            [*launcher, *command],
            cwd=self.folder,
            env=kept
            | {"PYTHONPATH": os.getcwd(), "COUNTED": str(self.folder / "counted")}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def killed_in_training(self) -> None:
        run = self.start(*TORCHRUN)
        (helper,) = wait_for(lambda: [p for p in children(run) if p.environ().get("RANK") == "1"])
        wait_for(lambda: [*self.store.glob(f".scratch/model-*/checkpoint-*/{SEAL}")])
        helper.kill()
        self.of_kill = run.communicate(timeout=120)
        self.code_of_kill = run.returncode

    def counted(self) -> dict[str, Counter[str]]:
        """By scorer, how often each sample was measured."""
        found: dict[str, Counter[str]] = {}
        for file in self.folder.glob("counted-*"):
            for line in map(json.loads, file.read_text().splitlines()):
                found.setdefault(line["scorer"], Counter()).update(line["ids"])
        return found


def children(run: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(run.pid).children() if SCRIPT in p.cmdline()]


def wait_for(found: Any) -> Any:
    end = time.monotonic() + 200
    while not (there := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return there


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Launched:
    runs = Launched(tmp_path_factory.mktemp("processes"))
    runs.killed_in_training()
    resumed = runs.start(*ACCELERATE)
    runs.of_end = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, runs.of_end[1][-5000:]
    runs.job.run()
    return runs


def test_a_helper_that_is_killed_ends_the_run_and_the_next_goes_on(launched):
    assert launched.code_of_kill != 0
    assert re.search(r"training goes on from checkpoint-\d+ of model-", launched.of_end[1])


def test_artifacts_are_those_of_one_process(launched):
    """The same keys; contents to rounding."""
    one, two = artifacts(launched.job.store), artifacts(launched.store)
    assert one.keys() == two.keys()
    for name, ref in one.items():
        for file in ref.manifest.files:
            assert_close(ref.path / file, two[name].path / file)


def test_each_sample_is_measured_once_by_one_of_them(launched):
    scores = next(Store(launched.store).refs("scores"))
    counted = launched.counted()
    corpus = pq.read_table(scores.path / "scores.parquet")["sample_id"].to_pylist()
    assert len(corpus) == 1200
    assert counted["HeadActivation"] == Counter(corpus)
    assert counted.keys() == {"HeadActivation", "HeadProxyLoss", "LossShift"}
    for later in ("HeadProxyLoss", "LossShift"):
        assert set(counted[later].values()) == {1}
        assert counted[later].keys() < set(corpus)
    assert [(launched.folder / f"counted-{rank}").exists() for rank in (0, 1)] == [True, True]


def test_only_the_first_process_speaks(launched):
    shown, errors = launched.of_end
    assert shown.count("Alignment Efficiency Ratio") == 1
    goes_on = re.findall("training goes on from", errors)
    assert len(goes_on) == 1


def artifacts(store: Path) -> dict[str, ArtifactRef]:
    """By stage and key; but what depends on the clock."""
    refs = Store(store).refs()
    return {f"{ref.stage}/{ref.key}": ref for ref in refs if ref.stage != "reference"}


def assert_close(one: Path, two: Path) -> None:
    if one.suffix == ".safetensors":
        a, b = load_file(one), load_file(two)
        for name in a:
            np.testing.assert_allclose(a[name].float(), b[name].float(), atol=2e-5, rtol=1e-5)
    elif one.suffix == ".parquet":
        state = one.with_name(STATE)
        own = load_file(state).get("held_out") if state.exists() else None
        # an affinity is a margin, in spreads of what the gate's own samples have
        spread = float(own.std(correction=0)) if own is not None else 1.0
        assert_same_table(pq.read_table(one), pq.read_table(two), {"affinity": 2e-5 / spread})


def assert_same_table(one: pa.Table, two: pa.Table, within: Mapping[str, float]) -> None:
    assert one.schema.names == two.schema.names
    for name in one.column_names:
        a, b = one[name].combine_chunks(), two[name].combine_chunks()
        if pa.types.is_fixed_size_list(a.type):
            a, b = a.flatten(), b.flatten()
        if pa.types.is_floating(a.type):
            a, b = (x.to_numpy(zero_copy_only=False).astype(float) for x in (a, b))
            atol = within.get(name, 2e-5)
            np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5, err_msg=name)
        else:
            assert a == b, name
