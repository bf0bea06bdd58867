"""The README's commands run as they are written, installs apart."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from p2d_core.synthetic.world import BASE_FOLDER
from tests.demo_run import demo

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix(".venv/bin/")
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the files stand that the README's my.yaml names."""
    folder = tmp_path_factory.mktemp("readme")
    world = demo().folder / "artifacts/demo/seed-0"
    for source, dest, rows in [
        ("target.jsonl", "data/target.jsonl", 200),
        ("evaluation.jsonl", "data/test.jsonl", 20),
        ("corpus/ledgers.jsonl", "data/pool/one.jsonl", 100),
        ("corpus/drills.jsonl", "data/pool/two.jsonl", 100),
    ]:
        (folder / dest).parent.mkdir(parents=True, exist_ok=True)
        lines = (world / source).read_text().splitlines(keepends=True)
        (folder / dest).write_text("".join(lines[:rows]))
    shutil.copytree(BASE_FOLDER, folder / "models/my-model")
    (written,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (folder / "my.yaml").write_text(written)
    return folder


def test_every_command_of_the_readme_is_known_here():
    assert {line.split()[0] for line in COMMANDS} <= {"make", "p2d", "prefect", "export"}
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make"):
            assert f"\n{line.split()[1]}:" in makefile


def test_no_printout_or_table_is_left_empty():
    for block in re.findall(r"```\w+\n(.*?)```", README, re.DOTALL):
        assert block.strip()
    assert re.search(r"p2d demo --seed 0, 1, 2 -->\n\n\|", README)


@pytest.mark.timeout(600)
def test_the_commands_run_as_they_stand(place, command, monkeypatch):
    """In one process: twelve would spend most of their time on imports and servers."""
    monkeypatch.chdir(place)
    for line in COMMANDS:
        words = shlex.split(line)
        # an install; servers, which have tests of their own (tests/stack has a team's)
        if words[0] != "p2d" or words[1] in ("ui", "worker"):
            continue
        if "<key>" in line:
            (key,) = (folder.name for folder in (place / "artifacts/heads").iterdir())
            words = [word.replace("<key>", key) for word in words]
        if "<run_id>" in line:
            run_id = max(file.stem for file in (place / "artifacts/runs").glob("*.json"))
            words = [word.replace("<run_id>", run_id) for word in words]
        code, shown, errors = command(*words[1:])
        assert code == 0, f"{line}\n{shown}\n{errors}"
        assert "Traceback" not in errors, line


def test_the_settings_that_config_writes_load_again(command):
    _, shown, _ = command("config")
    assert set(yaml.safe_load(shown)) >= {"base", "target", "corpus", "selection"}


def test_every_folder_of_the_table_is_there_after_a_demo():
    table = README.split("## What lies in `artifacts/`")[1].split("##")[0]
    named = set(re.findall(r"`(\w+)/`", table))
    assert {"samples", "heads", "model", "runs", "mlflow"} <= named
    made = {folder.name for folder in (demo().folder / "artifacts").iterdir()}
    assert named - {"reference", "harness", "rate"} <= made
