"""A small `p2d adapt`, as a command of its own process, whose surroundings a test can spoil."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.adapt import run_adapt
from flows.settings import parse_settings
from p2d_core.store import Store
from tasks.summary import Summary
from tests.job import ROWS, SETTINGS, changed, write_files

P2D = Path(sys.executable).with_name("p2d")


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    text: str
    """What it wrote to standard error and output."""

    def check_told(self) -> str:
        """Failed as promised: exit code 1, one error that names a next step, no traceback."""
        assert self.code == 1, (self.code, self.text[-3000:])
        assert "Traceback" not in self.text, self.text[-6000:]
        (told,) = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert "the same command" in told, told
        return told


class SmallJob:
    """Files and settings of one run, in a folder; the store beside them or elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_files(folder, ROWS | {"corpus/ledgers.jsonl": 200, "corpus/drills.jsonl": 200})
        self.file = folder / "run.yaml"
        self.file.write_text(yaml.safe_dump(SETTINGS))

    def here(self, store: Path, **changes: Any) -> Summary:
        """The same in this process, with the server that all tests share."""
        return run_adapt(parse_settings(changed(SETTINGS, changes), self.file), store=store)

    def start(
        self,
        store: Path,
        *,
        wrapped_in: Sequence[str] = (),
        before: Callable[[], None] | None = None,
        **environment: str,
    ) -> subprocess.Popen[str]:
        """`p2d adapt` in a process; ``before`` runs in it first."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        return subprocess.Popen(
            [*wrapped_in, str(P2D), "adapt", str(self.file), "--store", str(store)],
            cwd=self.folder, env=kept | environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, preexec_fn=before,
        )  # fmt: skip

    def run(self, store: Path, timeout: float = 280, **how: Any) -> Ended:
        """The same, to its end."""
        process = self.start(store, **how)
        try:
            text, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Ended(process.returncode, text)


def content_of(store: Path) -> dict[str, dict[str, str]]:
    """What a run's artifacts hold: file -> hash, by artifact. Pictures and costs may differ."""
    return {
        f"{ref.stage}/{ref.key}": {
            name: entry["sha256"]
            for name, entry in ref.manifest.files.items()
            if name.endswith((".parquet", ".safetensors"))
        }
        for ref in Store(store).refs()
        if ref.stage != "reference"
    }
