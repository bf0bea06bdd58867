"""The .env file: made once, random, its owner's alone, in no image."""

from __future__ import annotations

import os
import re
import stat
import subprocess

import pytest

from tests.docker.compose import COMPOSE, read_compose, read_env, variables
from tests.docker.env import PASSWORDS, make_env
from tests.docker.image import ROOT, taken


def test_the_env_script_makes_every_variable_of_compose_and_no_other(env):
    assert set(env) == variables(COMPOSE)


def test_passwords_are_random_and_each_its_own(env, tmp_path):
    make_env(tmp_path, "--file", tmp_path / "other")
    other = read_env(tmp_path / "other")
    drawn = [values[name] for values in (env, other) for name in PASSWORDS]
    assert len(set(drawn)) == 2 * len(PASSWORDS)
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in drawn)


def test_only_its_owner_can_read_it_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        make_env(tmp_path, "--file", tmp_path / ".env")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_one_that_is_there_is_never_overwritten(env_file, tmp_path):
    before = env_file.read_text()
    done = make_env(tmp_path, "--file", env_file)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert "docs/operations.md" in done.stderr
    assert env_file.read_text() == before


@pytest.mark.parametrize(("name", "told"), [("missing", "is no folder"), ("it's", "a quote")])
def test_a_data_folder_that_will_not_do_is_refused(tmp_path, name, told):
    (tmp_path / "it's").mkdir()
    done = make_env(tmp_path / name, "--file", tmp_path / ".env")
    assert done.returncode == 1
    assert told in done.stderr
    assert not (tmp_path / ".env").exists()


def test_git_and_the_image_never_take_it():
    ignored = subprocess.run(["git", "check-ignore", "-q", "docker/.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
    assert not taken("docker/.env")


def test_the_limits_of_the_worker_fit_this_machine(env):
    assert int(env["WORKER_CPUS"]) == os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert 0.5 * memory < int(env["WORKER_MEMORY"].removesuffix("m")) < memory


def test_without_it_compose_says_what_to_do():
    with pytest.raises(KeyError):
        read_compose(COMPOSE, {})
    asked = re.findall(r"\$\{\w+([^}]*)\}", COMPOSE.read_text())
    has_default = {":-", ":-stack"}
    told = {":?run docker/make_env.py first", "?run docker/make_env.py first"}
    assert set(asked) == told | has_default


def test_a_token_of_the_hub_and_further_parts_reach_the_worker(env):
    """Downloads lie in the store's volume, or each new container would make them again."""
    plain = read_compose(COMPOSE, env)["services"]["worker"]
    assert (plain["environment"]["HF_TOKEN"], plain["build"]["args"]["EXTRAS"]) == ("", "stack")
    asked = env | {"HF_TOKEN": "secret", "EXTRAS": "stack,eval"}
    worker = read_compose(COMPOSE, asked)["services"]["worker"]
    assert worker["environment"]["HF_TOKEN"] == "secret"
    assert worker["build"]["args"]["EXTRAS"] == "stack,eval"
    assert worker["environment"]["HF_HOME"].startswith(worker["environment"]["P2D_STORE"] + "/.")
