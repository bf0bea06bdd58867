"""Keeps lm-eval from changing what is not its own: random states, the screen, the hub's code."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

SEEDS = (0, 1234)
"""Of `random`, and of NumPy, torch and few-shot examples: what lm-eval takes by itself."""


@contextmanager
def contained() -> Iterator[None]:
    """While lm-eval loads and runs tasks.

    Metrics that it does not have it would load from the hub as code, through `evaluate`: that is
    not there to be imported. Its standard errors come of this process, not of a pool of forks.
    """
    import lm_eval.api.metrics
    from tqdm.std import tqdm

    shown = tqdm.__init__

    def hidden(bar: Any, *args: Any, **settings: Any) -> None:
        shown(bar, *args, **settings | {"disable": True})

    log = logging.getLogger("lm_eval")
    level, python, numpy = log.level, random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with ExitStack() as back, torch.random.fork_rng(devices):
        back.callback(random.setstate, python)
        back.callback(np.random.set_state, numpy)
        back.callback(log.setLevel, level)
        log.setLevel(logging.CRITICAL)
        back.enter_context(_replaced(sys.modules, "evaluate", None))
        back.enter_context(_replaced(os.environ, "DISABLE_MULTIPROC", "1"))
        back.enter_context(_replaced(vars(lm_eval.api.metrics), "print", lambda *said: None))
        back.callback(setattr, tqdm, "__init__", shown)
        setattr(tqdm, "__init__", hidden)  # noqa: B010
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        torch.manual_seed(SEEDS[1])
        yield


@contextmanager
def _replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = where.get(name, missing)
    where[name] = value
    try:
        yield
    finally:
        if before is missing:
            del where[name]
        else:
            where[name] = before
