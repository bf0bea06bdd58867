"""A folder that appears whole or not at all, where there was none."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2d_core.errors import InputError, StorageError


def refuse_what_is_there(folder: Path) -> None:
    """That nothing would be written over.

    Raises:
        InputError: there is a file of that name, or a folder that is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{folder} is not empty, and nothing is written over. Name another folder with --to, "
            "or remove it first."
        )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is no folder. Name another with --to.")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written.

    It stands beside as ``.<name>.exporting``. What a killed process left there is removed by the
    next one; one that is still at work holds a lock.

    Raises:
        InputError: as for `refuse_what_is_there`, or another process is writing it right now.
        StorageError: the folder's place cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    refuse_what_is_there(folder)
    staging = folder.with_name(f".{folder.name}.exporting")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be made ({error.strerror}). Name another folder with --to."
        ) from error
    try:
        _lock(lock, staging, folder)
        try:
            _clear(staging)
            yield staging
            refuse_what_is_there(folder)
            # an empty folder of that name gives way; one that is not is an error, not a loss
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(lock: int, staging: Path, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(lock, staging):
            return
    except BlockingIOError:
        pass
    raise InputError(
        f"another process is writing {folder}. Wait for it, or name another folder with --to."
    )


def _is(opened: int, folder: Path) -> bool:
    """Whether what was opened still stands there."""
    return folder.is_dir() and os.path.samestat(os.fstat(opened), folder.stat())


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
