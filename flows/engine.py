"""Where a run's models run: in this process, or on Ray, which is there before the run starts."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil
from prefect import Task
from prefect.futures import PrefectFutureList
from prefect.task_runners import ThreadPoolTaskRunner

from flows.settings import RunSettings
from flows.settings_ray import RaySettings
from p2d_core.errors import SettingsError
from p2d_core.processes import here
from tasks import elsewhere
from tasks.stage import BaseModel

T = TypeVar("T")
CLIENT = "ray://"
PROBE_SECONDS = 5.0
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a cluster of our own; what has no room there goes through files."""
FOLDER = "p2d-ray-"
"""What the folder of a cluster of our own is called; our process id stands behind it."""
LONGEST_FOLDER = 40
"""Characters: a socket's path has at most 107, of which Ray takes some sixty."""
ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # a port where something else listens is tried once, for 40 s, not 20 times
    "RAY_NUM_REDIS_GET_RETRIES": "1",
}
OWN = {
    # Ray's switch for machines that are no cluster: everything listens on 127.0.0.1 alone
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "RAY_AUTH_MODE": "token",
}


@contextmanager
def engine_of(settings: RunSettings, base: BaseModel) -> Iterator[None]:
    """While its block runs, stages that run a model are done by what ``settings.engine`` names.

    Raises:
        SettingsError: before anything was started: Ray is not installed, its head node is not
            reached, or its workers cannot do this work.
    """
    if settings.engine == "local":
        yield
        return
    if find_spec("ray") is None:
        raise SettingsError(
            "engine is ray, but Ray is not installed. pip install 'p2d[ray]' installs it; "
            "engine: local does without."
        )
    if (processes := here()).size > 1:
        raise SettingsError(
            f"engine is ray, but {processes.size} processes were started for this run, and Ray "
            "starts its own. Start p2d by itself, or set engine: local."
        )
    os.environ.update(ALWAYS)
    address = settings.ray.address
    if address is not None:
        check_answers(address)
    with connected(settings.ray) as folder:
        from tasks.ray_pool import PoolSpec, RayPool

        wanted = PoolSpec(
            settings.ray.workers,
            settings.ray.cpus_per_worker,
            settings.ray.gpus_per_worker,
            address,
            folder,
        )
        with RayPool(wanted, base) as pool, elsewhere.working_for_us(pool):
            yield


@contextmanager
def on_all_workers(task: Task[..., T]) -> Iterator[Callable[..., PrefectFutureList[T]]]:
    """The task's own `map`, or one that keeps all workers busy where there are any elsewhere."""
    if (workers := elsewhere.workers()) is None:
        yield task.map
        return
    # an arm of a comparison that fails leaves the workers to the others
    others_go_on = stopped_on_error(workers, but=(Exception,))
    with ThreadPoolTaskRunner(max_workers=workers.size) as threads, others_go_on:
        yield lambda **inputs: threads.map(task, inputs)


def all_at_once(works: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What each gives, in order; as many at once as there are workers elsewhere, else one."""
    if (workers := elsewhere.workers()) is None:
        yield from (work() for work in works)
        return
    with ThreadPoolExecutor(workers.size) as threads, stopped_on_error(workers):
        # each in a copy of the context: Prefect finds the flow run there
        futures = [threads.submit(copy_context().run, work) for work in works]
        try:
            for future in futures:
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


@contextmanager
def stopped_on_error(
    workers: elsewhere.Workers, but: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """What ends the block early ends the work in other threads, too: they would be waited for.

    Args:
        but: errors that do not.
    """
    try:
        yield
    except but:
        raise
    except BaseException:
        workers.stop()
        raise


def check_answers(address: str) -> None:
    """That something listens where the head node is said to be.

    Raises:
        SettingsError: nothing does; or Ray's client is not installed, and the address needs it.
    """
    if address.startswith(CLIENT) and find_spec("grpc") is None:
        raise SettingsError(
            f"ray.address is {address}, for which Ray's client is needed: pip install "
            "'ray[client]'. On a machine of the cluster, ray.address: auto does without."
        )
    if address == "auto":
        return
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise _not_reached(address, str(error) or type(error).__name__) from error


@contextmanager
def connected(settings: RaySettings) -> Iterator[str | None]:
    """Connected to the cluster, or to one that lives as long as the block, on this machine alone.

    Yields:
        the folder for temporary files of one's own cluster.
    """
    if settings.address is None:
        with _own_cluster(settings) as folder:
            yield folder
        return
    with _ray(settings.address):
        yield None


@contextmanager
def _own_cluster(settings: RaySettings) -> Iterator[str]:
    usual = tempfile.gettempdir()
    short = usual if len(usual) < LONGEST_FOLDER else "/tmp"
    for left in Path(short).glob(f"{FOLDER}*-*"):
        owner = left.name.removeprefix(FOLDER).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):  # it was killed
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=short)
    os.environ.update(OWN)
    # one for the process: Ray reads it once
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        with _ray(
            "local",
            include_dashboard=False,
            num_cpus=settings.workers * settings.cpus_per_worker,
            num_gpus=None if settings.gpus_per_worker else 0,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        ):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ray(address: str, **how: Any) -> Iterator[None]:
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level="error", **how)
    except Exception as error:
        ray.shutdown()
        raise _not_reached(address, f"Ray says: {' '.join(str(error).split())[:500]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _not_reached(address: str, why: str) -> SettingsError:
    if address == "local":
        return SettingsError(
            f"engine is ray, but no cluster could be started on this machine: {why.rstrip('.')}. "
            "Look at its memory and at /tmp, or use engine: local. Nothing was started."
        )
    return SettingsError(
        f"ray.address is {address!r}, but no cluster can be used there: {why.rstrip('.')}. Start "
        "its head node (`ray start --head`), mend the address, or leave ray.address out: a cluster "
        "is then started on this machine for the run. Nothing was started."
    )
