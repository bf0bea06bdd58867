"""Hostile input: exit code 2, a message that names place and cure, nothing started, nothing left."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import flows.adapt
from flows.cli import main
from flows.inputs import check_inputs
from flows.settings import load_settings
from p2d_core.samples.read import read_samples
from p2d_core.samples.source import SourceSpec
from tests.demo_run import P2D
from tests.faults.bad_inputs import Bad, Job, every_bad_input
from tests.faults.trials import trials

CORPUS = every_bad_input()
CURES = re.compile(
    r"\b(give|save|mend|remove|set|use|write|name|known|put|lower|cut|copy|flatten|fill|rename"
    r"|unpack|loosen|check|means|leave|lists|has to|turned into|raise|convert|near|holds|merge"
    r"|download|extra inputs|should be|exist either)\b",
    re.IGNORECASE,
)
MOST_CHARACTERS = 3000


class Started(BaseException):
    """The run would have begun."""


def refused(job: Job, monkeypatch: Any, capfd: Any) -> str:
    """The message of `p2d adapt`, called as the command calls it; asserts its form."""

    def start() -> None:
        raise Started

    monkeypatch.setattr(flows.adapt, "wait_for_server", start)
    file = job.save()
    before = everything_in(job.folder)
    words = ["p2d", "adapt", str(file), "--store", str(job.store), *job.words]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(job.folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ending:
        main.run()
    shown = capfd.readouterr().err
    assert ending.value.code == 2, shown
    assert "Traceback" not in shown
    assert shown.startswith("error: ")
    assert len(shown) < MOST_CHARACTERS
    assert CURES.search(shown), shown
    assert everything_in(job.folder) == before
    return shown


def everything_in(folder: Path) -> set[str]:
    """Every file; one that was set aside as damaged counts as where it was."""
    return {
        re.sub(r"\.damaged-\w+", "", str(file.relative_to(folder)))
        for file in folder.rglob("*")
        if not file.is_dir()
    } - {"run.yaml"}


def test_there_are_a_thousand_of_them():
    assert len({bad.name for bad in CORPUS}) == len(CORPUS)
    assert len(CORPUS) >= 1000


@pytest.mark.parametrize("bad", trials(CORPUS, quick=150), ids=str)
def test_a_bad_input_is_refused(bad: Bad, tmp_path, monkeypatch, capfd):
    job = Job(tmp_path)
    bad.breaks(job, random.Random(bad.name))
    assert bad.named in refused(job, monkeypatch, capfd)
