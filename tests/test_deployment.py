"""`deployment.yaml`: what is deployed, with which parameters, and where it can run."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from flows.deploying import TAG
from flows.settings import RunSettings, load_settings
from p2d_core.synthetic.world import BASE_FOLDER

FILE = Path(__file__).parents[1] / "deployment.yaml"
WANTED = {
    "adapt-nightly": "adapt",
    "rerun-from-head-map": "rerun-from-head-map",
    "refresh-head-map": "refresh-head-map",
    "compare": "compare",
}


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def deployed(plan) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in plan["deployments"]}


def schema_of(deployment: dict[str, Any]) -> dict[str, Any]:
    schema = parameter_schema(load_flow_from_entrypoint(deployment["entrypoint"]))
    return schema.model_dump()


def test_each_deployment_is_of_its_flow(deployed):
    found = {
        name: load_flow_from_entrypoint(each["entrypoint"]).name for name, each in deployed.items()
    }
    assert found == WANTED


def test_one_run_at_a_time_a_store_and_a_kill_is_noticed(plan, deployed):
    (step,) = plan["build"]
    made = step["flows.deploying.prepare"]
    for each in deployed.values():
        assert each["work_pool"] == {"name": made["pool"], "work_queue_name": made["queue"]}
        assert TAG in each["tags"]
        assert len(each["tags"]) == 2


def test_nothing_runs_by_itself_before_somebody_says_so(deployed):
    crons = {
        name: schedule["cron"]
        for name, each in deployed.items()
        for schedule in each.get("schedules", [])
        if schedule["active"] is False
    }
    assert crons == {"adapt-nightly": "0 3 * * *", "refresh-head-map": "0 2 * * 0"}
    schedules = [s for each in deployed.values() for s in each.get("schedules", [])]
    assert len(schedules) == len(crons)


def test_no_folder_of_the_machine_that_deploys_is_named(plan, deployed):
    (step,) = plan["pull"]
    assert step["prefect.deployments.steps.set_working_directory"] == {
        "directory": "{{ $P2D_HOME }}"
    }
    for each in deployed.values():
        assert "pull" not in each
        # a module, not a file
        assert ":" not in each["entrypoint"]
    assert str(Path.home()) not in FILE.read_text()


def test_the_settings_in_it_are_settings(plan, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(plan["definitions"]["settings"]))
    settings = load_settings(tmp_path / "my.yaml")
    assert settings.base == str(tmp_path / "base")
    assert settings.target.path == str(tmp_path / "target.jsonl")


@pytest.mark.parametrize("name", WANTED)
def test_every_parameter_of_the_form_has_a_title_and_help(deployed, name):
    schema = schema_of(deployed[name])
    assert set(deployed[name]["parameters"]) <= set(schema["properties"])
    # the settings themselves are required and are given
    asked_for = set(schema["required"]) - set(deployed[name]["parameters"])
    assert asked_for == ({"head_map"} if name == "rerun-from-head-map" else set())
    for key, field in schema["properties"].items():
        assert field.get("title"), key
        assert field.get("description"), key
    for model, definition in schema["definitions"].items():
        for key, field in definition["properties"].items():
            assert field.get("title"), (model, key)
        assert definition["additionalProperties"] is False, model
        places = [field["position"] for field in definition["properties"].values()]
        assert places == sorted(set(places)), model


def test_the_form_shows_bounds_and_choices(deployed):
    schema = schema_of(deployed["rerun-from-head-map"])
    (fraction, _) = schema["properties"]["fraction"]["anyOf"]
    assert fraction == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    settings = schema["definitions"]["RunSettings"]["properties"]
    assert settings["precision"]["enum"] == ["float32", "bfloat16"]
    assert schema["definitions"]["SelectionSettings"]["properties"]["fraction"]["maximum"] == 1
    refresh = schema_of(deployed["refresh-head-map"])["properties"]
    assert (refresh["draws"]["minimum"], refresh["draws"]["maximum"]) == (2, 10)


def test_a_setting_without_help_would_be_seen():
    for model in (RunSettings, *(f.annotation for f in RunSettings.model_fields.values())):
        for key, field in getattr(model, "model_fields", {}).items():
            is_section = hasattr(field.annotation, "model_fields")
            assert field.description or is_section, f"{model.__name__}.{key}"


def test_another_budget_and_another_corpus_take_the_place_of_the_settings_own():
    from flows.rerun import with_other_budget
    from flows.settings import SourceSettings

    settings = RunSettings(base=str(BASE_FOLDER), target=SourceSettings(path="t.jsonl"))
    other = (SourceSettings(path="c.jsonl"),)
    changed = with_other_budget(settings, 0.25, other)
    assert changed.selection.fraction == 0.25
    assert changed.corpus.sources == other
    assert with_other_budget(settings, None, ()) == settings
