"""How a run that is started here stands to Prefect."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import prefect
import pytest
from prefect.settings import get_current_settings

from flows.environment import start_server, wait_for_server
from flows.launch import launch


@pytest.mark.parametrize(("server", "beats"), [(None, False), ("http://127.0.0.1:4200/api", True)])
def test_a_run_has_heartbeats_only_where_a_server_stays_to_listen(
    server, beats, monkeypatch, tmp_path
):
    if server:
        monkeypatch.setenv("PREFECT_API_URL", server)
    seconds = launch(tmp_path, lambda run_id: get_current_settings().flows.heartbeat_frequency, [])
    assert (seconds is not None) == beats
    assert get_current_settings().flows.heartbeat_frequency is not None


def test_no_garbage_is_looked_for_while_two_threads_import(monkeypatch):
    """Before Python 3.11.8 one that parses its source could end in a SystemError (gh-106905)."""
    seen = []
    client = SimpleNamespace(api_healthcheck=lambda: seen.append(gc.isenabled()))
    monkeypatch.setattr(prefect, "get_client", lambda **_: nullcontext(client))
    start_server()
    wait_for_server()
    assert (seen, gc.isenabled()) == ([False], True)
