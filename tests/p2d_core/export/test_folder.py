"""An export's folder is there whole, or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from p2d_core.errors import InputError, StorageError
from p2d_core.export.folder import appearing

KILLED = """
import os, signal, sys
from pathlib import Path
from p2d_core.export.folder import appearing
with appearing(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def writer(place, what):
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(place), what],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_it_gets_its_name_when_all_is_written(tmp_path):
    with appearing(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert [file.name for file in (tmp_path / "a" / "out").iterdir()] == ["file"]
    assert os.listdir(tmp_path / "a") == ["out"]


def test_an_empty_folder_gives_way(tmp_path):
    (tmp_path / "out").mkdir()
    with appearing(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists()


def test_nothing_stays_of_one_that_failed(tmp_path):
    def fail():
        with appearing(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_kill_leaves_nothing_under_the_name_and_the_next_one_clears_up(tmp_path):
    killed = writer(tmp_path / "out", "die")
    assert killed.wait(30) == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.exporting"]
    with appearing(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["file"]


def test_two_at_once_do_not_mix(tmp_path):
    first = writer(tmp_path / "out", "wait")
    assert first.stdout.readline() == "writing\n"
    with pytest.raises(InputError, match="another process is writing"), appearing(tmp_path / "out"):
        pass
    first.communicate("", timeout=30)
    assert first.returncode == 0
    assert os.listdir(tmp_path / "out") == ["half"]


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"out is not empty.*--to"), appearing(tmp_path / "out"):
        pass
    with (
        pytest.raises(InputError, match="is no folder"),
        appearing(tmp_path / "out" / "mine"),
    ):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_what_came_meanwhile_is_not_written_over(tmp_path):
    def write():
        with appearing(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(InputError, match="not empty"):
        write()
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StorageError, match=r"cannot be made.*--to"),
        appearing(tmp_path / "file" / "out"),
    ):
        pass
