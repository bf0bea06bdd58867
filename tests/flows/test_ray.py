"""`engine: ray`: the same artifacts from workers that may die; what is wrong is said first."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from flows.adapt import run_adapt
from flows.compare import run_compare
from flows.engine import FOLDER, OWN, connected
from flows.inputs import check_inputs
from flows.settings import RunSettings
from flows.settings_ray import RaySettings
from p2d_core.affinity.scoring import SCORES
from p2d_core.comparison.arms import read
from p2d_core.errors import P2DError, SettingsError
from p2d_core.processes import Processes
from p2d_core.progress import Progress, no_progress
from p2d_core.store import Store
from tasks.progress import listen
from tests.demo_run import P2D
from tests.job import Job, quick_job

ROWS = {
    "target.jsonl": 60, "evaluation.jsonl": 12, "corpus/ledgers.jsonl": 300,
    "corpus/drills.jsonl": 1500,
}  # fmt: skip
GRID = {
    "rankers": ["frobenius"],
    "scorers": ["head-activation"],
    "adaptations": ["heads", {"name": "full", "label": "diverging", "learning_rate": 1e30}],
    "seeds": [0],
    "everything": False,
}
STAGES = {
    "samples", "proxy", "heads", "measurements", "scores", "subset", "model", "reference",
    "evaluation",
}  # fmt: skip


pytestmark = pytest.mark.timeout(600)
# before Ray is imported: what it reads once, and a head node of the tests' own needs too
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
os.environ.update(OWN | TOKEN)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Run once as engine: local has it, scores of the job and arms of a comparison."""
    auto = {"proxy_learning_rate": "auto"}
    job = Job(tmp_path_factory.mktemp("ray"), ROWS, threads=1, compare=GRID, heads=auto)
    job.run()
    job.compared = run_compare(job.settings(), store=job.store)
    return job


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Of a head node with two cores that somebody else has started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = f"/tmp/p2d-head-{port}"  # short: Ray's sockets lie below
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0",
            "--include-dashboard=false", f"--temp-dir={folder}",
            f"--object-store-memory={128 * 2**20}", "--disable-usage-stats",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    children = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    for process in [*children, head]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def on_ray(job: Job, address: str | None) -> RunSettings:
    return job.settings(engine="ray", ray={"workers": 2, "address": address})


def assert_same_artifacts(store: Path, local: Path) -> None:
    """Every key is one of the local run's, with scores to 1e-5; all stages are there."""
    ours, like = Store(store), Store(local)
    assert {ref.stage for ref in ours.refs()} >= STAGES
    for ref in ours.refs():
        if ref.stage == "comparison":  # it has the seconds of every arm
            continue
        here, there = ref.manifest, like.resolve(f"{ref.stage}/{ref.key}").manifest
        assert ours.faults(ref) == []
        assert here.files.keys() == there.files.keys()
        for count in ("samples", "tokens", "machine"):
            assert here.cost[count] == there.cost[count]
        if ref.stage == "scores":
            mine, yours = (pq.read_table(s.path(ref.stage, ref.key) / SCORES) for s in (ours, like))
            assert mine["sample_id"] == yours["sample_id"]
            np.testing.assert_allclose(mine["affinity"], yours["affinity"], atol=1e-5)


def ray_processes() -> set[psutil.Process]:
    """Those of clusters that this process has started."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = [process.name(), *process.cmdline()]
            if any(word.startswith("ray::") or "/ray/core/" in word for word in words):
                found.add(process)
    return found


def kill_a_worker_at_work() -> int:
    """Waits for one that does a stage, and gives its process id."""
    while True:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] == ["ray::StageWorker.build"]:
                    process.kill()
                    return process.pid


@pytest.mark.slow
def test_a_worker_killed_while_it_measures_costs_nothing_but_time(job, address, caplog):
    store = job.folder / "on-ray"
    killed: list[int] = []

    @contextmanager
    def kill_one(stage: str) -> Iterator[Progress]:
        if stage == "measurements (shards)" and not killed:
            threading.Thread(target=lambda: killed.append(kill_a_worker_at_work())).start()
        yield no_progress

    listen(kill_one)
    try:
        with caplog.at_level(logging.WARNING):
            run_adapt(on_ray(job, address), store=store)
    finally:
        listen(None)
    assert len(killed) == 1
    assert caplog.text.count("measure lost a Ray worker (1 of 3)") == 1
    # two shards, each for head activation, for the loss under tuned heads and for the shift
    assert len(list(Store(store).refs("measurements"))) == 6
    assert_same_artifacts(store, job.store)


@pytest.mark.slow
def test_arms_on_ray_are_those_of_engine_local_and_nothing_stays_of_a_cluster_of_our_own(job):
    store = job.folder / "arms"
    before = ray_processes()
    stages: set[str] = set()
    listening: set[str] = set()

    @contextmanager
    def look(stage: str) -> Iterator[Progress]:
        stages.add(stage)
        if stage == "arms":
            for process in ray_processes() - before:
                sockets = process.net_connections()
                listening.update(s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN)
        yield no_progress

    listen(look)
    try:
        on_ray_runs, _, _ = read(run_compare(on_ray(job, None), store=store).path)
    finally:
        listen(None)
    runs, _, _ = read(job.compared.path)
    assert [run.arm for run in on_ray_runs] == [run.arm for run in runs]
    for there, here in zip(on_ray_runs, runs, strict=True):
        assert there.artifacts == here.artifacts
        assert there.values == pytest.approx(here.values, abs=1e-5)
        assert there.error == here.error
    # as the worker raised it
    assert ["Lower the learning rate" in (run.error or "") for run in runs] == [False, False, True]
    assert_same_artifacts(store, job.store)
    # how far the workers are is told here
    assert {"Ray workers", "proxy", "model (p2d)"} <= stages
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert ray_processes() <= before  # those of others may end meanwhile
    assert not list(Path("/tmp").glob(f"{FOLDER}{os.getpid()}-*"))


@pytest.mark.slow
def test_workers_that_cannot_do_this_work_are_refused(job, address, monkeypatch):
    from tasks.ray_pool import PoolSpec, RayPool

    base = check_inputs(job.settings()).base
    spec = PoolSpec(1, cpus_per_worker=1, gpus_per_worker=0, address=address, folder=None)
    with connected(RaySettings(address=address)):
        with pytest.raises(SettingsError, match=r"does not see the base model .* another content"):
            RayPool(spec, replace(base, sha256="0" * 64))
        with pytest.raises(SettingsError, match=r"not see the base model .* there is no such fold"):
            RayPool(spec, replace(base, folder="/nowhere"))
        monkeypatch.setattr("tasks.ray_pool.code_hash", lambda: "of another version")
        with pytest.raises(SettingsError, match=r"other versions .* P2D's own code .*of another"):
            RayPool(spec, base)
        monkeypatch.setattr("tasks.ray_pool.START_SECONDS", 2)
        with pytest.raises(SettingsError, match=r"1 of ray.workers: 1 found no place.*'CPU': 2"):
            RayPool(replace(spec, cpus_per_worker=3), base)


def test_a_head_node_that_is_not_there_is_told_before_anything_starts(tmp_path):
    job = quick_job(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    said = rf"ray.address is '{nobody}', but .*refused.*ray start --head.*Nothing was started"
    with pytest.raises(SettingsError, match=said):
        run_adapt(on_ray(job, nobody), store=job.store)
    assert not job.store.exists()


def test_what_is_not_installed_is_named_with_its_cure(tmp_path, monkeypatch):
    job = quick_job(tmp_path)
    there = {"ray"}
    monkeypatch.setattr("flows.engine.find_spec", lambda name: name in there or None)
    with pytest.raises(SettingsError, match=r"ray.address is ray://.*pip install 'ray\[client\]'"):
        run_adapt(on_ray(job, "ray://127.0.0.1:10001"), store=job.store)
    there.clear()
    with pytest.raises(SettingsError, match=r"Ray is not installed. pip install 'p2d\[ray\]'"):
        run_adapt(on_ray(job, None), store=job.store)
    assert not job.store.exists()


def test_processes_of_torchrun_are_refused(tmp_path, monkeypatch):
    job = quick_job(tmp_path)
    monkeypatch.setattr("flows.engine.here", lambda: Processes(0, 2))
    with pytest.raises(SettingsError, match=r"2 processes were started .* Ray starts its own"):
        run_adapt(on_ray(job, None), store=job.store)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"address": "http://head"}, r"`ray.address` was 'http://head'.*HOST:6379"),
        ({"workers": 0}, r"`ray.workers` was 0"),
        ({"gpus_per_worker": 1.5}, r"`ray.gpus_per_worker` was 1.5.*a whole number"),
    ],
)
def test_a_setting_of_ray_that_cannot_be_is_refused(tmp_path, setting, said):
    with pytest.raises(SettingsError, match=said):
        quick_job(tmp_path).settings(engine="ray", ray=setting)


@pytest.mark.slow
def test_a_stage_that_no_worker_survives_ends_the_run(tmp_path, address):
    job = quick_job(tmp_path)
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            kill_a_worker_at_work()

    threading.Thread(target=kill, daemon=True).start()
    try:
        with pytest.raises(P2DError, match=r"proxy_run lost 3 Ray workers .*memory is short"):
            run_adapt(on_ray(job, address), store=job.store)
    finally:
        over.set()
    assert not list(Store(job.store).refs("proxy"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_stopped_leaves_no_process_of_ray(job, how, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(on_ray(job, None).model_dump(mode="json")))
    store = tmp_path / "artifacts"
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(
            [str(P2D), "adapt", str(file), "--store", str(store)], stdout=said, stderr=said
        )
    end = time.monotonic() + 240
    while not list((store / ".scratch").glob("proxy-*")) and time.monotonic() < end:
        time.sleep(0.1)
    children = psutil.Process(run.pid).children(recursive=True)
    assert any(child.name().startswith("ray::StageWor") for child in children)
    run.send_signal(how)
    code = run.wait(120)
    # Ray's agents look only now and then whether their node is there
    _, alive = psutil.wait_procs(children, timeout=60 if how == signal.SIGINT else 180)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL), (
        tmp_path / "said.txt"
    ).read_text()
    names = [child.name() for child in alive if child.is_running()]
    # a killed command leaves Prefect's server, which the next one ends
    assert [name for name in names if "ray" in name or "gcs" in name] == []
    left = list(Path("/tmp").glob(f"{FOLDER}{run.pid}-*"))
    assert len(left) == (how == signal.SIGKILL)
