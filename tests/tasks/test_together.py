"""What processes work on together: a failure in one ends the work in all, and no more than it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from p2d_core.processes import own_gpu
from tests.p2d_core.adaptation.test_together import LAUNCH


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[dict[str, str], int, str]:
    """What the first process said of each piece of work; exit code and errors of all."""
    folder: Path = tmp_path_factory.mktemp("together")
    (folder / "hangs").touch()
    done = subprocess.run(
        [*LAUNCH, "-m", "tests.tasks.together", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return json.loads((folder / "said.json").read_text()), done.returncode, done.stderr


def test_all_processes_build_with_what_the_first_was_given(launched):
    # twice the sum over two processes of rank and 0.5
    assert launched[0][""] == launched[0]["never"] == "4.0 by 2"


def test_the_first_process_says_what_another_failed_of(launched):
    said = launched[0]
    assert said["1 before"] == "ProcessError: process 1 of 2: no model. Look for it."
    assert said["1 after"].startswith("ProcessError: process 1 of 2: Traceback")
    assert said["1 after"].endswith("OSError: no disk")


def test_the_first_process_own_failure_stays_its_own(launched):
    """So that it is tried again where it may pass, and told as it is where not."""
    said = launched[0]
    assert said["0 before"] == "ModelError: no model. Look for it."
    assert said["0 after"] == "OSError: no disk"


def test_a_first_process_that_cannot_hear_is_ended_with_the_message(launched):
    _, code, errors = launched
    assert code == 1
    assert errors.count("error: process 1 of 2: no model. Look for it.") == 1


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, ["0", "1"]), ("4,6", ["4", "6"]), ("", ["", ""]), ("4", ["4", ""])],
)
def test_each_process_sees_a_gpu_of_its_own(visible, seen):
    assert [own_gpu(visible, local_rank) for local_rank in (0, 1)] == seen
