"""The `p2d` command, for torchrun to start: notes in ``$COUNTED`` which samples each process
measures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import tasks.measurements
from flows.cli.main import run

RANK = os.environ["RANK"]
measure_shard = tasks.measurements.measure_shard


def counted(scorer: Any, model: Any, state: Any, shard: Sequence[Any], before: Any = None) -> Any:
    line = {"scorer": type(scorer).__name__, "ids": [sample.sample_id for sample in shard]}
    with open(f"{os.environ['COUNTED']}-{RANK}", "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    return measure_shard(scorer, model, state, shard, before)


tasks.measurements.measure_shard = counted
run()
