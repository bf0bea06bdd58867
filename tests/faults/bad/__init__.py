"""Generated bad inputs: each breaks one thing of a job that would run, and says what is named."""

from tests.faults.bad.comparisons import comparisons
from tests.faults.bad.conversations import conversations
from tests.faults.bad.data import files, json_arrays, json_lines, parquet, tables
from tests.faults.bad.head_maps import head_maps
from tests.faults.bad.job import Bad, Job
from tests.faults.bad.models import models
from tests.faults.bad.settings import conditions, paths, settings, yaml_texts


def every_bad_input() -> list[Bad]:
    """All of them; their names are different."""
    return [
        *json_lines(), *json_arrays(), *tables(), *parquet(), *files(), *conversations(),
        *settings(), *yaml_texts(), *paths(), *conditions(), *models(), *head_maps(),
        *comparisons(),
    ]  # fmt: skip


__all__ = ["Bad", "Job", "every_bad_input"]
