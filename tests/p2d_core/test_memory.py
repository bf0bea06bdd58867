"""Peak memory is that of a block, not of all that the process did before."""

import sys
import threading

import numpy as np
import pytest

from p2d_core.memory import peak_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="only there can the mark be reset")


def hold(n_bytes: int) -> None:
    np.ones(n_bytes // 8)


@linux
def test_what_was_held_before_does_not_count():
    with peak_memory() as peak_bytes:
        hold(400 * 10**6)
        first = peak_bytes()
    with peak_memory() as peak_bytes:
        hold(10 * 10**6)
        second = peak_bytes()
    assert 300 * 10**6 < first - second < 500 * 10**6


@linux
def test_a_block_beside_another_does_not_make_its_peak_smaller():
    began, end = threading.Event(), threading.Event()

    def beside() -> None:
        with peak_memory():
            began.set()
            end.wait(10)

    with peak_memory() as peak_bytes:
        hold(400 * 10**6)
        before = peak_bytes()
        other = threading.Thread(target=beside)
        other.start()
        assert began.wait(10)
        assert peak_bytes() >= before
        end.set()
        other.join()
