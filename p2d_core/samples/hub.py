"""Rows of a dataset on the Hugging Face hub, streamed by the `datasets` library."""

from collections.abc import Iterator
from typing import Any

from p2d_core.errors import DataError, TransientError
from p2d_core.hub import HubName, in_one_line, is_offline, refusal
from p2d_core.samples.rows import Row
from p2d_core.samples.source import HUB_PREFIX, SourceSpec


def hub_rows(source: SourceSpec) -> Iterator[Row]:
    """The rows of a hub dataset in order; no code of the dataset is run.

    Offline they are those of the copy in huggingface_hub's cache.

    Raises:
        DataError: it cannot be opened (no network, no such dataset, configuration or split).
        TransientError: reading stopped on the way.
    """
    name = _name(source)
    try:
        rows = iter(_opened(name, source))
        first = next(rows, None)
    except Exception as error:
        raise DataError(f"source {source.name!r}: {refusal(name, _cause(name, error))}") from None
    if first is None:
        raise DataError(f"{source.path}: the split {source.split!r} is empty.")
    number = 1
    yield Row(f"{source.path}, row {number}", first)
    while True:
        try:
            columns = next(rows, None)
        except Exception as error:
            raise TransientError(
                f"{source.path}: reading stopped after row {number}: {in_one_line(error)} "
                "Run it again, or download the dataset and give its folder as the path."
            ) from None
        if columns is None:
            return
        number += 1
        yield Row(f"{source.path}, row {number}", columns)


def hub_commit(source: SourceSpec) -> str:
    """The commit that a hub dataset's revision stands for; asks the hub unless it is one.

    Offline it is the one that huggingface_hub's cache knows.

    Raises:
        DataError: the hub has no such dataset, does not let this user in, or cannot be asked.
    """
    name = _name(source)
    try:
        return str(name.at_commit().revision)
    except Exception as error:
        # without its cause: that may hold the token
        raise DataError(f"source {source.name!r}: {refusal(name, error)}") from None


def _name(source: SourceSpec) -> HubName:
    repo, at, revision = source.path.removeprefix(HUB_PREFIX).partition("@")
    if at:
        raise DataError(
            f"source {source.name!r}: {source.path} names a revision. Give {HUB_PREFIX}{repo} as "
            f"`path:`, and it as `revision: {revision}`."
        )
    return HubName("dataset", repo, source.revision)


def _cause(name: HubName, error: Exception) -> Exception:
    """The hub's own no, of which `datasets` keeps only that there was one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        if not is_offline():
            HfApi().auth_check(name.repo, repo_type="dataset")
    except RepositoryNotFoundError as no:  # gated ones, too
        return no
    except Exception:
        return error
    return error


def _opened(name: HubName, source: SourceSpec) -> Any:
    import datasets  # slow to import, and only needed here

    if not is_offline():
        return datasets.load_dataset(
            name.repo,
            source.config,
            split=source.split,
            revision=name.revision,
            streaming=True,
        )
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    # `datasets` streams from the hub alone, and keeps nothing of it but the card. That the copy is
    # whole is known by the list of its files, which `hf download` leaves
    get_cached_repo_tree(name.repo, repo_type="dataset", revision=name.revision)
    folder = snapshot_download(
        name.repo, repo_type="dataset", revision=name.revision, local_files_only=True
    )
    return datasets.load_dataset(folder, source.config, split=source.split, streaming=True)
