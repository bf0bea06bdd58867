"""Rows of a dataset on the Hugging Face hub, streamed by the `datasets` library."""

import re
from collections.abc import Iterator

from p2d_core.errors import DataError, TransientError
from p2d_core.samples.rows import Row
from p2d_core.samples.source import HUB_PREFIX, SourceSpec


def hub_rows(source: SourceSpec) -> Iterator[Row]:
    """The rows of a hub dataset in order; no code of the dataset is run.

    Raises:
        DataError: it cannot be opened (no network, no such dataset, configuration or split).
        TransientError: reading stopped on the way.
    """
    import datasets  # slow to import, and only needed here

    name = source.path.removeprefix(HUB_PREFIX)
    try:
        dataset = datasets.load_dataset(
            name,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        rows = iter(dataset)
        first = next(rows, None)
    except Exception as error:
        raise _cannot_be_opened(source, error) from error
    if first is None:
        raise DataError(f"{source.path}: the split {source.split!r} is empty.")
    number = 1
    yield Row(f"{source.path}, row {number}", first)
    while True:
        try:
            columns = next(rows, None)
        except Exception as error:
            raise TransientError(
                f"{source.path}: reading stopped after row {number}: {_in_one_line(error)}. "
                "Run it again, or download the dataset and give its folder as the path."
            ) from error
        if columns is None:
            return
        number += 1
        yield Row(f"{source.path}, row {number}", columns)


def hub_commit(source: SourceSpec) -> str:
    """The commit that a hub dataset's revision stands for; asks the hub unless it is one.

    Raises:
        DataError: the hub cannot be asked.
    """
    if source.revision and re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi

    name = source.path.removeprefix(HUB_PREFIX)
    try:
        return str(HfApi().dataset_info(name, revision=source.revision).sha)
    except Exception as error:
        raise _cannot_be_opened(source, error) from error


def _cannot_be_opened(source: SourceSpec, error: Exception) -> DataError:
    return DataError(
        f"{source.path} cannot be opened: {_in_one_line(error)}. Check the network, the name and "
        "`split:`, `config:`, `revision:`; or download it where there is a network "
        f"(hf download --repo-type dataset {source.path.removeprefix(HUB_PREFIX)} "
        "--local-dir FOLDER) and give the folder's files as `path:`."
    )


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
