"""Prefect's server when it does not answer: what a person is told, and how the command ends."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

from p2d_core.errors import P2DError, ServiceError
from p2d_core.processes import dismiss

GO_ON = "What was finished is kept: the same command goes on from there."
NOT_REACHED = ("reach api", "connect to ephemeral", "ephemeral server", "cannot connect")
"""What Prefect's own errors say that have no type of their own."""

_gone = False


def service_error(error: BaseException) -> ServiceError | None:
    """The error that a person should see if Prefect's server did not answer; None for any other."""
    global _gone
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    here: BaseException | None = error
    while here is not None and not isinstance(here, P2DError):
        untyped = isinstance(here, RuntimeError) and any(
            words in str(here).lower() for words in NOT_REACHED
        )
        refused = isinstance(here, PrefectHTTPStatusError) and here.response.status_code >= 500
        if untyped or refused or isinstance(here, httpx.TransportError):
            _gone = True
            server = os.environ.get("PREFECT_API_URL") or "that this command started"
            return ServiceError(
                f"Prefect's server {server} does not answer ({_line(here)}). Look whether it runs "
                "and whether its disk is full; without PREFECT_API_URL this command starts one of "
                f"its own. {GO_ON}"
            )
        here = here.__cause__ or here.__context__
    return None


def leave(code: int) -> NoReturn:
    """Ends the process; at once where Prefect would try for minutes to tell a server that is gone
    of every step."""
    dismiss()
    if _gone:
        _end_own_server()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _end_own_server() -> None:
    """Prefect's temporary server that this process started, should it have come up after all.

    It would outlive the process, and whoever reads our output would wait for it.
    """
    import psutil

    from flows.killed import SERVER

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if SERVER in child.cmdline():
                child.kill()


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".")[:200] if text else type(error).__name__
