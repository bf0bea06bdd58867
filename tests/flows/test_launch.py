"""How a run that is started here stands to Prefect."""

import pytest
from prefect.settings import get_current_settings

from flows.launch import launch
from flows.settings import parse_settings


@pytest.mark.parametrize(("server", "beats"), [(None, False), ("http://127.0.0.1:4200/api", True)])
def test_a_run_has_heartbeats_only_where_a_server_stays_to_listen(
    server, beats, monkeypatch, tmp_path
):
    if server:
        monkeypatch.setenv("PREFECT_API_URL", server)
    settings = parse_settings({"base": "b", "target": {"path": "t"}}, tmp_path / "r.yaml")

    def flow() -> int | None:
        return get_current_settings().flows.heartbeat_frequency

    seconds = launch(settings, None, None, tmp_path, flow)
    assert (seconds is not None) == beats
    assert get_current_settings().flows.heartbeat_frequency is not None
