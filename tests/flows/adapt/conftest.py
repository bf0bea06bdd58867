"""One job, run once; its store is what every test of this folder begins with."""

import pytest

from tests.job import Job


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("job"))
    job.first = job.run()
    return job
