"""How `p2d` behaves towards a person: help, exit codes, errors, settings, a look at the machine."""

import os
import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import yaml

from flows.cli import doctor
from flows.cli.config import commented_yaml
from flows.presets import Preset
from flows.settings import RunSettings, load_settings
from p2d_core.adaptation.adaptations import adaptations
from p2d_core.affinity import scorers
from p2d_core.errors import DataError, TrainingError
from p2d_core.evaluation import metrics
from p2d_core.heads.ranking import rankers

HEAVY = ("torch", "prefect", "mlflow", "pandas", "duckdb", "pyarrow", "numpy", "pydantic", "yaml")


@pytest.fixture
def p2d(monkeypatch, command, tmp_path):
    """Runs a command in an empty folder; gives its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("P2D_STORE", raising=False)
    return command


def test_help_needs_nothing_heavy():
    command = f"import flows.cli.main, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_command_teaches_with_an_example(p2d):
    names = ["demo", "adapt", "config", "ui", "sql", "doctor", "export"]
    names += ["heads stability"]
    names += [f"artifacts {name}" for name in ("ls", "show", "verify", "gc")]
    for name in names:
        code, out, _ = p2d(*name.split(), "--help")
        assert code == 0
        assert f"Example: p2d {name}" in out, name
        assert name == "config" or "P2D_STORE" in out, name


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("line 3: no response"), 2), (TrainingError("loss is nan"), 1)]
)
def test_errors_are_one_message_with_their_exit_code(p2d, monkeypatch, error, code):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("flows.settings.load_settings", fail)
    assert p2d("adapt", "my.yaml") == (code, "", f"error: {error}\n")


def test_ctrl_c_says_how_to_go_on(p2d, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.settings.load_settings", interrupt)
    code, _, err = p2d("adapt", "my.yaml")
    assert code == 130
    assert "the same command goes on from there" in err


def test_ctrl_c_that_takes_the_server_along_says_so_too(p2d, monkeypatch):
    def interrupt(*args: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ConnectionError("connection refused")  # noqa: B904

    monkeypatch.setattr("flows.settings.load_settings", interrupt)
    code, _, err = p2d("adapt", "my.yaml")
    assert (code, "connection refused" in err) == (130, False)
    assert "the same command goes on from there" in err


def test_an_error_that_is_not_ours_keeps_its_traceback(p2d, monkeypatch):
    def fail(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("flows.settings.load_settings", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        p2d("adapt", "my.yaml")


def test_wrong_usage_is_exit_code_2(p2d):
    assert p2d("adapt")[0] == 2
    assert p2d("nonsense")[0] == 2


def test_a_missing_settings_file_says_how_to_get_one(p2d):
    code, _, err = p2d("adapt", "my.yaml")
    assert (code, err) == (
        2,
        "error: my.yaml: there is no such file. `p2d config > my.yaml` writes one to start from.\n",
    )


def test_a_summary_that_cannot_be_written_is_said_before_anything_starts(p2d, tmp_path):
    code, _, err = p2d("demo", "--summary", "no/where.json")
    assert code == 2
    assert "--summary no/where.json: there is no folder no. Make it first." in err
    code, _, err = p2d("demo", "--summary", str(tmp_path))
    assert code == 2
    assert "is a folder" in err


def test_a_head_map_that_is_not_there_is_wrong_input(p2d, tmp_path):
    (tmp_path / "my.yaml").write_text("base: b\ntarget: {path: t.jsonl}\n")
    (tmp_path / "artifacts").mkdir()
    code, _, err = p2d("adapt", "my.yaml", "--head-map", "artifacts/heads/abc")
    assert code == 2
    assert "there is no heads artifact 'artifacts/heads/abc'" in err


@pytest.mark.parametrize(
    ("kind", "registry"),
    [
        ("scorers", scorers), ("rankers", rankers), ("adaptations", adaptations),
        ("metrics", metrics),
    ],
)  # fmt: skip
def test_every_plug_in_is_listed_with_what_it_is_and_its_options(p2d, kind, registry):
    code, shown, _ = p2d("config", "--list", kind)
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 100
    listed = yaml.safe_load(shown)
    assert list(listed) == list(registry)
    for block in shown.split("\n\n")[1:] if kind in ("scorers", "rankers") else ():
        told = " ".join(block.replace("# ", "").split())
        assert "Costs " in told or "Runs no model" in told, block
        assert "Source: " in told, block
    for name, said in listed.items():
        options = (said or {}).get("options", {})
        known = [f.name for f in fields(registry.get(name)) if f.init] if kind != "metrics" else []
        assert list(options) == known, name
        if kind != "metrics" and name != "sum":
            assert registry.make(name, options) == registry.make(name, {}), "the defaults"


def test_the_written_settings_load_again_as_the_defaults(p2d, tmp_path):
    code, out, _ = p2d("config")
    assert code == 0
    (tmp_path / "my.yaml").write_text(out)
    loaded = load_settings(tmp_path / "my.yaml").model_dump()
    meant = RunSettings(base="b", target={"path": "t"}).model_dump()
    for required in ("base", "target"):
        del loaded[required], meant[required]
    assert loaded == meant


@pytest.mark.parametrize("preset", get_args(Preset))
def test_the_written_settings_of_a_preset_load_again_as_that(p2d, tmp_path, preset):
    code, out, _ = p2d("config", "--preset", preset)
    assert code == 0
    (tmp_path / "my.yaml").write_text(out)
    loaded = load_settings(tmp_path / "my.yaml")
    left_out = {"base": loaded.base, "target": loaded.target, "preset": preset}
    assert loaded == RunSettings.model_validate(left_out)


def test_an_unknown_preset_is_refused(p2d):
    code, _, err = p2d("config", "--preset", "best")
    assert (code, "'best' is not one of 'default'" in err) == (2, True)


def test_the_written_settings_explain_every_key_and_fit_the_screen():
    lines = commented_yaml("my.yaml").splitlines()
    assert max(map(len, lines)) <= 100
    for number, line in enumerate(lines):
        is_key = not line.lstrip().startswith("#") and ":" in line
        assert not is_key or "#" in line or lines[number - 1].lstrip().startswith("#"), line


def test_the_examples_in_the_written_settings_work_when_taken_in(tmp_path):
    text = commented_yaml("my.yaml")
    text = text.replace("  sources: []  ", "  # ").replace("  # sources:", "  sources:")
    text = text.replace("  # - path", "  - path").replace("  #   name", "    name")
    text = text.replace("  #   path", "    path")
    (tmp_path / "my.yaml").write_text(text)
    settings = load_settings(tmp_path / "my.yaml")
    assert settings.corpus.sources[0].name == "candidates"
    assert settings.evaluation.source is not None
    assert settings.evaluation.retention is not None


def test_settings_are_never_written_over(p2d, tmp_path):
    assert p2d("config", "-o", "my.yaml")[0] == 0
    before = (tmp_path / "my.yaml").read_text()
    code, _, err = p2d("config", "-o", "my.yaml")
    assert (code, "stays as it is" in err) == (2, True)
    assert (tmp_path / "my.yaml").read_text() == before
    assert p2d("config", "-o", "no/my.yaml")[0] == 2


@pytest.mark.parametrize(
    ("versions", "cure"),
    [
        ({"fastapi": "0.151.0", "sqlalchemy": "2.0.58"}, "pip install 'fastapi<0.151'"),
        ({"fastapi": "0.150.0", "sqlalchemy": "2.1.0b1"}, "pip install 'sqlalchemy<2.1'"),
        ({"fastapi": "1.0", "sqlalchemy": "2.0.58"}, "pip install 'fastapi<0.151'"),
        ({"fastapi": None, "sqlalchemy": "2.0.58"}, "pip install 'fastapi<0.151'"),
    ],
)
def test_versions_known_not_to_work_together_are_found(versions, cure):
    fatal = [finding for finding in doctor.known_conflicts(versions.get) if finding.fatal]
    assert [finding.cure for finding in fatal] == [cure]


def test_versions_that_work_are_not_complained_of():
    versions = {"fastapi": "0.150.9", "sqlalchemy": "2.0.99"}
    assert not any(finding.cure for finding in doctor.known_conflicts(versions.get))


def test_doctor_finds_this_installation_sound(p2d):
    code, out, err = p2d("doctor")
    assert code == 0, out + err
    assert "prefect" in out
    assert f"{version('ray')} (for engine: ray)" in out
    assert "artifacts (not there yet; will be made)" in " ".join(out.split())


def test_doctor_fails_where_the_store_cannot_be(p2d, tmp_path):
    (tmp_path / "file").write_text("x")
    code, out, _ = p2d("doctor", "--store", "file/store")
    assert code == 1
    assert "FAILS" in out
    assert "Name a folder with --store" in out


def test_the_ui_is_not_started_over_nothing(p2d, tmp_path):
    code, _, err = p2d("ui", "--no-open")
    assert (code, "there is no store at" in err) == (2, True)
    (tmp_path / "artifacts").mkdir()
    code, _, err = p2d("ui", "--no-open")
    assert (code, "no run has been recorded" in err) == (2, True)


@pytest.mark.slow
def test_the_ui_answers_on_loopback_and_takes_its_children_along(tmp_path: Path):
    from urllib.request import urlopen

    import psutil

    from tasks.tracking.database import prepare_tracking

    prepare_tracking(tmp_path)
    command = [sys.executable, "-c", "from flows.cli.main import run; run()", "ui", "--no-open"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "P2D_STORE": str(tmp_path)}
    ui = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert ui.stdout is not None
    said = ui.stdout.readline()
    address = said.split()[1]
    assert address.startswith("http://127.0.0.1:")
    with urlopen(address, timeout=20) as answer:
        assert answer.status == 200
    children = psutil.Process(ui.pid).children(recursive=True)
    assert children
    ui.send_signal(2)
    assert ui.wait(20) == 0
    time.sleep(0.2)
    assert [child for child in children if child.is_running()] == []
