"""Workers on a Ray cluster, looked at before they get work; one that dies is replaced."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from p2d_core.errors import P2DError, ServiceError, SettingsError
from p2d_core.store import Making
from p2d_core.store.manifest import library_versions
from tasks.elsewhere import Build
from tasks.parcels import Made, files_of, place_of, travelling
from tasks.progress import progress_of
from tasks.ray_worker import Examined, StageWorker, code_hash
from tasks.stage import BaseModel, ShardRef

START_SECONDS = 180.0
"""In which all workers have to be there: each imports torch, and may hash the base model."""
POLL_SECONDS = 0.2
MOST_LOST = 3
"""Workers that one stage may lose: what kills every worker must not go on for ever."""
KEPT = 16
"""Artifacts that stay in Ray's store for the next stage that reads them."""
ENVIRONMENT = (
    "DO_NOT_TRACK",
    "HF_HUB_DISABLE_TELEMETRY",
    "MLFLOW_DISABLE_TELEMETRY",
    "OMP_WAIT_POLICY",
    "PREFECT_LOGGING_LEVEL",
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_VERBOSITY",
)
"""Variables that workers on other machines get of ours."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolSpec:
    """Which workers are wanted."""

    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    address: str | None
    """Of the cluster, as the settings name it; None: one of our own on this machine."""
    folder: str | None
    """For the workers' temporary files; each machine's own if None."""

    @property
    def same_disk(self) -> bool:
        """Whether the workers see our files, and so the same base model and scratch folders."""
        return self.address is None


class RayPool:
    """`tasks.elsewhere.Workers` on a cluster that Ray is connected to. Safe in threads."""

    def __init__(self, spec: PoolSpec, base: BaseModel) -> None:
        """Starts the workers and waits until all are there and fit to work.

        Raises:
            SettingsError: the cluster has no room for them, a worker sees another base model or
                none, or has another P2D or other libraries than this process.
        """
        self.spec, self.base = spec, base
        self.size, self.threads = spec.workers, spec.cpus_per_worker
        self._changed = threading.Condition()
        self._free: list[tuple[Any, Any]] = []
        """Workers without work, each with Ray's reference to what it says of itself."""
        self._busy: list[tuple[Any, Any]] = []
        self._stopped = False
        self._sent: OrderedDict[str, Any] = OrderedDict()
        self._worker = ray.remote(
            num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker, max_concurrency=2
        )(StageWorker)
        self._environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        for _ in range(spec.workers):
            self._start()
        self.machine = self._wait_for_all()

    def build(self, function: Build, making: Making, inputs: Mapping[str, Any]) -> None:
        """Calls ``function`` in the next free worker; in another one if that dies.

        Raises:
            P2DError: as ``function`` raised it; or the stage has lost `MOST_LOST` workers.
            ServiceError: no worker is left, and none comes.
        """
        contents = {place_of(ref): self._content(ref) for ref in travelling(inputs)}
        scratch = str(making.scratch) if self.spec.same_disk else None
        for lost in range(1, MOST_LOST + 1):
            taken = self._take()
            try:
                made = self._waited(
                    taken[0],
                    taken[0].build.remote(
                        function.__module__, function.__qualname__, inputs, contents, scratch
                    ),
                )
            except RayTaskError as error:
                self._give_back(taken)
                raise error.cause from error
            except RayError as error:
                self._end(taken)
                if self._stopped:
                    raise ServiceError("the Ray workers were stopped with the run.") from error
                self._start()
                why = f"{type(error).__name__}: {_line(error)}"
                name = function.__name__
                log.warning("%s lost a Ray worker (%d of %d): %s", name, lost, MOST_LOST, why)
                continue
            except BaseException:
                self._end(taken)
                raise
            self._give_back(taken)
            for name, level, text in made.said:
                logging.getLogger(name).log(level, text)
            made.put_into(making)
            return
        raise P2DError(
            f"{function.__name__} lost {MOST_LOST} Ray workers one after the other ({why}). Most "
            "often memory is short: lower scoring.tokens_per_batch, training.micro_batch_tokens or "
            "ray.workers, or give the machines more. What was finished is kept."
        )

    def stop(self) -> None:
        """Ends all workers; who waits for one gets a `ServiceError`."""
        with self._changed:
            self._stopped = True
            workers = [*self._free, *self._busy]
            self._changed.notify_all()
        for worker, _ in workers:
            with suppress(RayError):
                ray.kill(worker)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _content(self, ref: Any) -> Any:
        """Ray's reference to the files; an artifact's, which many stages read, stays a while."""
        if isinstance(ref, ShardRef):
            return ray.put(files_of(ref))
        with self._changed:
            if ref.location not in self._sent:
                self._sent[ref.location] = ray.put(files_of(ref))
            self._sent.move_to_end(ref.location)
            while len(self._sent) > KEPT:
                self._sent.popitem(last=False)
            return self._sent[ref.location]

    def _waited(self, worker: Any, made: Any) -> Made:
        """What the worker hands back; until then its progress is told."""
        known = -1
        with ExitStack() as shown:
            told, tell, name = worker.told.remote(known), None, ""
            while True:
                ready, _ = ray.wait([made, told], num_returns=1)
                if made in ready:
                    return ray.get(made)
                with suppress(RayError):
                    number, stage, done, total = ray.get(told)
                    if number != known and known != -1:
                        if stage != name:
                            name, tell = stage, shown.enter_context(progress_of(stage))
                        tell(done, total)
                    known = number
                told = worker.told.remote(known)

    def _start(self) -> None:
        worker = self._worker.remote(self._environment, self.spec.folder)
        base = None if self.spec.same_disk else self.base.folder
        with self._changed:
            self._free.append((worker, worker.examine.remote(base)))
            self._changed.notify()

    def _wait_for_all(self) -> str:
        """Until every worker is there and fit; gives their machine."""
        with progress_of("Ray workers") as progress:
            waiting = [examined for _, examined in self._free]
            end = time.monotonic() + START_SECONDS
            while waiting and time.monotonic() < end:
                _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1)
                progress(self.size - len(waiting), self.size)
        if waiting:
            there = {kind: ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU")}
            raise SettingsError(
                f"{len(waiting)} of ray.workers: {self.size} found no place within "
                f"{START_SECONDS:.0f} s. Each holds ray.cpus_per_worker: "
                f"{self.spec.cpus_per_worker} and ray.gpus_per_worker: "
                f"{self.spec.gpus_per_worker}; the cluster has {there} in all, other jobs may hold "
                "some. Ask for less, or free the cluster."
            )
        machines = sorted({self._checked(examined).machine for _, examined in self._free})
        if len(machines) > 1:
            log.warning(
                "the Ray workers are not alike (%s): seconds, and so the AER, depend on which of "
                "them did what",
                "; ".join(machines),
            )
        return " or ".join(machines)

    def _checked(self, examined: Any) -> Examined:
        """What a worker says of itself, if it is fit to make our artifacts.

        Raises:
            SettingsError: it is not.
        """
        try:
            found: Examined = ray.get(examined)
        except RayError as error:
            raise SettingsError(
                f"a Ray worker of ray.address {self.spec.address!r} could not start: "
                f"{_line(error)}. Install the same P2D there, with its libraries "
                "(pip install -c constraints.txt)."
            ) from error
        where = f"the Ray worker on {found.host}"
        if found.refused or found.base not in (None, self.base.sha256):
            raise SettingsError(
                f"{where} does not see the base model {self.base.folder} as it is here: "
                f"{found.refused or 'it has another content there'}. Put the same folder at the "
                "same path on every machine of the cluster."
            )
        ours = {"P2D's own code": code_hash()} | library_versions()
        theirs = {"P2D's own code": found.code} | found.libraries
        differ = [
            f"{name} ({theirs.get(name, 'none')[:12]}, here {ours.get(name, 'none')[:12]})"
            for name in sorted(ours | theirs)
            if _public(theirs.get(name)) != _public(ours.get(name))
        ]
        if differ:
            raise SettingsError(
                f"{where} has other versions than this process: {', '.join(differ)}. Results would "
                "not be what their keys say: install the same on every machine of the cluster "
                "(pip install -c constraints.txt)."
            )
        return found

    def _take(self) -> tuple[Any, Any]:
        """The next free worker that is fit."""
        since = time.monotonic()
        with self._changed:
            while not self._stopped:
                starting = [examined for _, examined in self._free]
                ready = ray.wait(starting, timeout=0)[0] if starting else []
                if ready:
                    place = starting.index(ready[0])
                    worker, examined = self._free.pop(place)
                    try:
                        self._checked(examined)
                    except SettingsError as error:
                        log.warning("a Ray worker less: %s", error)
                        continue
                    self._busy.append((worker, examined))
                    return worker, examined
                if self._busy:
                    since = time.monotonic()
                elif not starting or time.monotonic() - since > START_SECONDS:
                    raise ServiceError(
                        "no Ray worker is left, and none could be started. Look at the cluster "
                        "(`ray status`). What was finished is kept: the same command goes on."
                    )
                self._changed.wait(POLL_SECONDS)
            raise ServiceError("the Ray workers were stopped with the run.")

    def _give_back(self, taken: tuple[Any, Any]) -> None:
        with self._changed:
            self._busy.remove(taken)
            self._free.append(taken)
            self._changed.notify()

    def _end(self, taken: tuple[Any, Any]) -> None:
        """For a worker that is dead, or whose work nobody waits for any more."""
        with self._changed:
            self._busy.remove(taken)
            self._changed.notify()
        with suppress(RayError):
            ray.kill(taken[0])


def _public(version: str | None) -> str | None:
    """Without what was built for which device: 2.13.0 of 2.13.0+cpu."""
    return version.split("+")[0] if version else None


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".")[:300] if lines else type(error).__name__
