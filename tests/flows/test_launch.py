"""How a run that is started here stands to Prefect."""

import pytest
from prefect.settings import get_current_settings

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
