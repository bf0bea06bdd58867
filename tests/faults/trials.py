"""Many trials of one fault, a few of them quick."""

from collections.abc import Iterable
from typing import Any

import pytest


def trials(cases: Iterable[Any], quick: int) -> list[Any]:
    """For ``pytest.mark.parametrize``: ``quick`` of them in `make test`, spread evenly."""
    listed = list(cases)
    step = max(1, len(listed) // max(1, quick))
    return [
        pytest.param(case, marks=() if i % step == 0 and i // step < quick else pytest.mark.faults)
        for i, case in enumerate(listed)
    ]
