"""What a failure does to workers that others use too; they are stood in for here."""

import pytest
from prefect import task

from flows.engine import on_all_workers
from p2d_core.errors import NumericalError
from tasks import elsewhere


class Workers:
    """Two that do nothing and say whether they were stopped."""

    size, threads, machine = 2, 1, "none"
    stopped = False

    def build(self, function, making, inputs):
        raise AssertionError("nothing is sent to them")

    def stop(self):
        self.stopped = True


@task
def number(of: int) -> int:
    return of


def measure_and_fail(workers: Workers, error: type[BaseException]) -> None:
    with elsewhere.working_for_us(workers), on_all_workers(number):
        raise error("of this arm")


@pytest.mark.parametrize(("error", "stops"), [(NumericalError, False), (KeyboardInterrupt, True)])
def test_an_arm_that_fails_leaves_the_workers_to_the_others(error, stops):
    workers = Workers()
    with pytest.raises(error, match="of this arm"):
        measure_and_fail(workers, error)
    assert workers.stopped == stops
