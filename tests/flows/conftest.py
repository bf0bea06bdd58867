"""What the tests of commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from flows.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch, capfd) -> Command:
    """Runs a `p2d` command in this process; gives its exit code and what it said."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["p2d", *words])
        try:
            main.run()
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
        said = capfd.readouterr()
        return code, said.out, said.err

    return call
