"""A whole `p2d adapt` over a large generated corpus, with the time and memory that it took."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
import yaml

from p2d_core.synthetic.skills import SKILLS, draw_ledger
from p2d_core.synthetic.world import BASE_FOLDER

P2D = Path(sys.executable).with_name("p2d")
FIGURES = Path(__file__).parent / "load.json"
"""What the load test measured last."""
MOST_MEGABYTES = 2048
"""Resident at once, of the command and of the server that it starts."""
TARGET_SHARE = 0.1
SECONDS_BETWEEN_LOOKS = 0.2


def write_corpus(file: Path, n_samples: int, seed: int = 0) -> None:
    """Different samples, one in ten of the target, the others of the old skills."""
    rng = Random(seed)
    skills = list(SKILLS.values())
    seen: set[int] = set()
    with file.open("w", encoding="utf-8") as stream:
        while len(seen) < n_samples:
            target = rng.random() < TARGET_SHARE
            made = draw_ledger(rng) if target else rng.choice(skills)(rng)
            number = hash((made.prompt, made.response))
            if number not in seen:
                seen.add(number)
                row = {"prompt": made.prompt, "response": made.response}
                stream.write(json.dumps(row) + "\n")


def write_job(folder: Path, n_samples: int, scorer: str) -> Path:
    """Target, evaluation set, corpus (once for all scorers) and the settings of one run."""
    rng = Random(1)
    for name, rows in {"target": 200, "evaluation": 50}.items():
        ledgers = [draw_ledger(rng) for _ in range(rows)]
        lines = [json.dumps({"prompt": x.prompt, "response": x.response}) for x in ledgers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl", n_samples)
    settings: dict[str, Any] = {
        "name": f"load-{scorer}",
        "base": str(BASE_FOLDER),
        "target": {"path": "target.jsonl"},
        "corpus": {"sources": [{"path": "corpus.jsonl"}], "include_target": False},
        "evaluation": {"source": {"path": "evaluation.jsonl"}},
        "proxy": {"samples": 100, "held_out": 50, "epochs": 1},
        "heads": {"ranker": "frobenius"},
        "scoring": {"scorer": scorer},
        "selection": {"fraction": 0.1},
        # a tenth of the corpus is chosen and read, but trained on for some steps only
        "training": {"epochs": 0.001},
        "arms": {"random": False, "full": "calibrated", "calibration_steps": 4},
        "threads": 2,
    }
    file = folder / f"{scorer}.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


@dataclass
class Loaded:
    """What one run over a large corpus took."""

    seconds: float
    peak_megabytes: float
    """Resident, of the `p2d` process."""
    server_megabytes: float
    """Resident, of the processes that it started (Prefect's server)."""
    summary: dict[str, Any]
    stages: dict[str, float]
    """Seconds of this run."""
    database: Path
    """Prefect's."""

    def tasks(self, name: str) -> int:
        """How many task runs of that name Prefect has in its pages."""
        with sqlite3.connect(self.database) as connection:
            query = "SELECT count(*) FROM task_run WHERE name LIKE ? || '-%'"
            return int(connection.execute(query, [name]).fetchone()[0])


def adapt(folder: Path, settings: Path, timeout: float) -> Loaded:
    """Runs the command as a person would, and looks at its memory while it runs."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    kept |= {"OMP_NUM_THREADS": "2"}
    report = folder / f"{settings.stem}.json"
    start = time.perf_counter()
    with (folder / f"{settings.stem}.log").open("w") as log:
        process = subprocess.Popen(
            [str(P2D), "adapt", settings.name, "--summary", report.name, "--store", "store"],
            cwd=folder, env=kept, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        peaks: dict[int, float] = {}
        thread = threading.Thread(target=_watch, args=(process, peaks), daemon=True)
        thread.start()
        try:
            code = process.wait(timeout=timeout)
        finally:
            process.kill()
        thread.join()
    shown = (folder / f"{settings.stem}.log").read_text()
    assert code == 0, shown[-3000:]
    summary = json.loads(report.read_text())
    return Loaded(
        seconds=time.perf_counter() - start,
        peak_megabytes=peaks.pop(process.pid),
        server_megabytes=sum(peaks.values()),
        summary=summary,
        stages={line["name"]: line["seconds"] for line in summary["stages"]},
        database=folder / "store/prefect/prefect.db",
    )


def _watch(process: subprocess.Popen[bytes], peaks: dict[int, float]) -> None:
    """Most MB resident of the process and of each of its children."""
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            for each in (parent, *parent.children(recursive=True)):
                resident = each.memory_info().rss / 2**20
                peaks[each.pid] = max(peaks.get(each.pid, 0.0), resident)
        except psutil.Error:
            pass
        time.sleep(SECONDS_BETWEEN_LOOKS)
