"""`p2d demo` run once for all tests that look at what it makes, as a newcomer runs it."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

P2D = Path(sys.executable).with_name("p2d")


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    shown: str
    errors: str
    seconds: float


@dataclass(frozen=True)
class Demo:
    """The first run of a demo, in a folder of its own."""

    folder: Path
    run: Finished
    summary: dict


def command(folder: Path, *words: str, timeout: float = 600) -> Finished:
    """Runs `p2d` in a folder, with a store that is the default: ./artifacts."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    start = time.perf_counter()
    done = subprocess.run(
        [str(P2D), *words], cwd=folder, capture_output=True, text=True, timeout=timeout, env=kept,
        check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr, time.perf_counter() - start)


@functools.cache
def demo(seed: int = 0) -> Demo:
    """Runs it the first time it is asked for; the folder is removed when the tests end."""
    folder = Path(_home().name) / f"seed-{seed}"
    folder.mkdir()
    run = command(folder, "demo", "--seed", str(seed), "--summary", "summary.json")
    assert run.code == 0, run.errors
    return Demo(folder, run, json.loads((folder / "summary.json").read_text()))


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="p2d-demo-")
