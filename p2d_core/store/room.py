"""Room on the disk: looked at before a stage writes, and named when there is none."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from p2d_core.errors import P2DError, StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_WORDS = (
    "no space left on device",
    "disk quota exceeded",
    "file too large",
    "database or disk is full",
    "file write failed",
    "could not write all bytes",
)
"""What libraries say that write files themselves and keep no error number."""
GO_ON = "What was finished is kept: the same command goes on from there."


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """That ``what`` finds room for about ``needed_bytes`` below ``folder``.

    Raises:
        StorageError: says how much is needed, how much is free, and what would do.
    """
    free = free_bytes(folder)
    if needed_bytes > free:
        raise StorageError(
            f"{what} may write {_size(needed_bytes)}, but {folder} has {_size(free)} free. "
            "It was not started. Make room there (`p2d artifacts gc` removes what no recent run "
            f"needs), or name another folder with --store. {GO_ON}"
        )


def free_bytes(folder: Path) -> int:
    """What this user may still write at the folder, or at the first above it that exists."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(there).free


def storage_error(error: BaseException, folder: Path, what: str) -> StorageError | None:
    """The error that a person should see if the disk was full or refused; None for any other."""
    if isinstance(error, P2DError):
        return None
    for each in _chain(error):
        place = getattr(each, "filename", None) or folder
        number = getattr(each, "errno", None)
        if number in FULL or any(words in str(each).lower() for words in FULL_WORDS):
            return StorageError(
                f"{what}: the disk is full, or a file at its limit, at {folder} "
                f"({_size(free_bytes(folder))} free): {_line(each)}. Make room there "
                "(`p2d artifacts gc` removes what no recent run needs), or name another folder "
                f"with --store. {GO_ON}"
            )
        if number in FORBIDDEN:
            return StorageError(
                f"{what}: no permission at {place} ({_line(each)}). Give this user access "
                f"to it, or name another folder with --store. {GO_ON}"
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    here: BaseException | None = error
    seen: set[int] = set()
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or here.__context__


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".")[:300] if text else type(error).__name__


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
