"""Stages that all processes of a run work on together: the first asks, the others help."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from p2d_core.errors import P2DError, ProcessError
from p2d_core.processes import Processes, ask, asked, here, is_of_a_peer
from p2d_core.store import Making

SECONDS_TO_TELL = 5.0
"""For a process that failed, to say why: the others notice first that it is gone."""
SECONDS_TO_END = 10.0
"""For the first process to end by itself once another has failed."""
SECONDS_BETWEEN_LOOKS = 0.2

Build = Callable[..., None]

log = logging.getLogger(__name__)
_builds: dict[str, Build] = {}
_one_at_a_time = threading.RLock()
_at_work: Processes | None = None


def shared(name: str, build: Build) -> None:
    """From now on every process can help to ``build`` the stage of that name."""
    _builds[name] = build


def together(parallel: str | None = None) -> Processes:
    """The processes that build the stage that is being built; those of a run without others too.

    Args:
        parallel: ``ddp`` or ``fsdp``; None: as the launcher said.
    """
    return (_at_work or here()).sharding(parallel)


@contextmanager
def helped(stage: str, making: Making, inputs: Mapping[str, Any]) -> Iterator[None]:
    """While the first process builds a stage in its block, all others build it with it.

    Raises:
        ProcessError: another process failed; the message says how.
    """
    if here().size == 1:
        yield
        return
    with _one_at_a_time:
        work = ask(
            {"help": stage, "inputs": _plain(_builds[stage], inputs), "at": str(making.scratch)}
        )
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(work, over), daemon=True)
        watching.start()
        making.processes = work.size
        try:
            with _in_group(work):
                yield
        except Exception as error:
            over.set()
            if not is_of_a_peer(error):
                raise
            told = work.heard("failed", SECONDS_TO_TELL)
            raise ProcessError(told or f"another process is gone: {error}") from error
        finally:
            over.set()
            # one that is in the store's code when Python ends would abort the process
            watching.join()


def spread_out(
    name: str, common: Mapping[str, Any], each: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[int]]:
    """Lets the other processes make their shares of artifacts; the places of its own, of the rest.

    When the first process is done with its own it goes on with the rest: what it finds made it
    takes, for what is being made it waits, what nobody has begun or could make it makes itself.
    The store lets each be made once.
    """
    size = here().size
    if size > 1:
        with _one_at_a_time:
            build = _builds[name]
            ask(
                {
                    "make": name,
                    "common": _plain(build, common),
                    "each": [_plain(build, inputs) for inputs in each],
                }
            )
    places = range(len(each))
    return [p for p in places if p % size == 0], [p for p in places if p % size]


def serve() -> None:
    """What all processes but the first do: whatever it asks for, until it dismisses them."""
    # where the stages are that can be asked for
    import tasks.measurements
    import tasks.model
    import tasks.proxy
    import tasks.rate  # noqa: F401

    for work, job in asked():
        try:
            if "help" in job:
                _help(work, job)
            else:
                _make(work, job)
        except Exception as error:
            if not is_of_a_peer(error):
                work.tell("failed", f"process {work.rank} of {work.size}: {_said(error)}")


def _help(work: Processes, job: Mapping[str, Any]) -> None:
    build = _builds[job["help"]]
    with tempfile.TemporaryDirectory(prefix="p2d-") as nothing, _in_group(work):
        build(Making(Path(nothing), Path(job["at"])), **_typed(build, job["inputs"]))


def _make(work: Processes, job: Mapping[str, Any]) -> None:
    build = _builds[job["make"]]
    common = _typed(build, job["common"])
    for inputs in work.share(job["each"]):
        try:
            build(**common, **_typed(build, inputs))
        except Exception:
            log.debug("left to the first process", exc_info=True)


@contextmanager
def _in_group(work: Processes) -> Iterator[None]:
    global _at_work
    with work.group():
        _at_work = work
        try:
            yield
        finally:
            _at_work = None


def _watch(work: Processes, over: threading.Event) -> None:
    """Ends this process if another fails while this one waits for it in what cannot be left."""
    # a connection of its own: the main thread holds the other while it waits
    aside = replace(work, store=work.store.clone())
    while (told := aside.heard("failed", 0)) is None:
        if over.wait(SECONDS_BETWEEN_LOOKS):
            return
    if over.wait(SECONDS_TO_END):
        return
    print(f"error: {told}", file=sys.stderr, flush=True)
    os._exit(1)


def _said(error: BaseException) -> str:
    if isinstance(error, P2DError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()


def _plain(build: Build, inputs: Mapping[str, Any]) -> dict[str, Any]:
    types = get_type_hints(inspect.unwrap(build))
    return {
        name: TypeAdapter(types[name]).dump_python(value, mode="json")
        for name, value in inputs.items()
    }


def _typed(build: Build, inputs: Mapping[str, Any]) -> dict[str, Any]:
    types = get_type_hints(inspect.unwrap(build))
    return {name: TypeAdapter(types[name]).validate_python(value) for name, value in inputs.items()}
