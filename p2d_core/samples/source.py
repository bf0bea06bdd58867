"""A source: where samples come from, which files that is, and the hash of what is in them."""

import difflib
import errno
import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from p2d_core.errors import DataError, SettingsError
from p2d_core.progress import Progress, no_progress
from p2d_core.samples.rows import listed
from p2d_core.store.recipe import hashes_of

HUB_PREFIX = "hf://datasets/"

FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
FORMATS = tuple(sorted(set(FORMAT_OF_SUFFIX.values())))


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One named source of samples and how to read it.

    Raises:
        SettingsError: ``skip`` or ``limit`` is out of bounds, ``format`` is unknown, both messages
            and texts are named, or what is the hub's is set of files.
    """

    name: str
    path: str
    """A file, a folder of files, a glob, or ``hf://datasets/<owner>/<name>``."""
    prompt: str | None = None
    """Column, or template such as ``"{instruction}\\n\\n{input}"``; None: found by itself."""
    response: str | None = None
    """As ``prompt``."""
    limit: int | None = None
    """Rows that are read, after ``skip``; None: all."""
    skip: int = 0
    """Rows set aside from the front."""
    format: str | None = None
    """One of `FORMATS`; None: by the file's extension."""
    config: str | None = None
    """Hub only: the dataset's configuration."""
    split: str = "train"
    """Hub only."""
    revision: str | None = None
    """Hub only: branch, tag or commit; None: the newest."""
    messages: str | None = None
    """Column with lists of messages; None: found by itself where no prompt and response are."""

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise SettingsError(f"source {self.name!r}: skip is {self.skip}; it has to be >= 0.")
        if self.limit is not None and self.limit < 1:
            raise SettingsError(
                f"source {self.name!r}: limit is {self.limit}; "
                "it has to be >= 1, or left out to read all rows."
            )
        if self.format is not None and self.format not in FORMATS:
            raise SettingsError(
                f"source {self.name!r}: format is {self.format!r}; known: {', '.join(FORMATS)}."
            )
        of_hub = [("config", None), ("split", "train"), ("revision", None)]
        unread = [name for name, plain in of_hub if getattr(self, name) != plain]
        if unread and not self.is_on_hub:
            raise SettingsError(
                f"source {self.name!r}: {' and '.join(unread)} are of datasets on the hub, and "
                f"{self.path} is no {HUB_PREFIX}OWNER/NAME. Name the files instead, such as "
                f"`path: data/test*.parquet`."
            )
        if self.messages is not None and (self.prompt, self.response) != (None, None):
            raise SettingsError(
                f"source {self.name!r}: both messages and prompt or response are named. A row is "
                "read as one or the other: leave one out."
            )

    @property
    def is_on_hub(self) -> bool:
        return self.path.startswith(HUB_PREFIX)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file and the format that it is read as, one of `FORMATS`."""

    path: Path
    format: str


def files_of(source: SourceSpec) -> list[DataFile]:
    """The files of a source that is not on the hub, in name order.

    Of a folder these are the files with a known extension directly in it, hidden ones left out;
    a glob may reach deeper (``folder/**/*.parquet``).

    Raises:
        DataError: nothing is there, or nothing that can be read as samples.
    """
    if "\0" in source.path:
        raise DataError(f"source {source.name!r}: the path {source.path!r} holds a NUL character.")
    try:
        return _found(source, Path(source.path).expanduser())
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise DataError(
            f"source {source.name!r}: {source.path} cannot be looked up ({error.strerror}). "
            "Give a path that this user can read."
        ) from None


def _found(source: SourceSpec, path: Path) -> list[DataFile]:
    if path.is_dir():
        return _files_in_folder(path, source)
    if path.exists():
        return [_data_file(path, source)]
    if glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        found = [each for each in found if each.is_file()]
        if not found:
            raise DataError(f"source {source.name!r}: no file matches {source.path}. Mend it.")
        return [_data_file(each, source) for each in found]
    raise DataError(f"source {source.name!r}: there is no {source.path}. {_near_names(path)}")


def content_hash(source: SourceSpec, progress: Progress = no_progress) -> str:
    """SHA-256 (hex) of what a source holds: bytes of its files in name order, names left out.

    Of one file it is what ``sha256sum`` prints; of several it is taken over their hashes, so that
    where one file ends counts. Of a hub dataset it is taken over its name and commit.
    ``progress`` is told of megabytes.
    """
    if source.is_on_hub:
        from p2d_core.samples.hub import hub_commit

        identity = (source.path, source.config, source.split, hub_commit(source))
        return hashlib.sha256(repr(identity).encode()).hexdigest()
    files = [file.path for file in files_of(source)]
    try:
        digests = hashes_of(files, progress)
    except PermissionError as error:
        raise not_permitted(Path(error.filename)) from None
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def not_permitted(path: Path) -> DataError:
    """The error for a file that may not be opened."""
    return DataError(f"{path}: no permission to read it. Give this user read access to the file.")


def _data_file(path: Path, source: SourceSpec) -> DataFile:
    if not path.is_file():
        raise DataError(f"source {source.name!r}: {path} is not a plain file. Give one.")
    known = source.format or FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if known is None:
        cure = (
            "Unpack it first."
            if re.fullmatch(r"\.(gz|zst|bz2|xz|zip|tar|tgz)", path.suffix.lower())
            else f"Rename it, or set `format:` of source {source.name!r} to one of: "
            f"{', '.join(FORMATS)}."
        )
        raise DataError(
            f"{path}: the extension {path.suffix!r} is unknown. "
            f"Known: {', '.join(FORMAT_OF_SUFFIX)}. {cure}"
        )
    return DataFile(path, known)


def _files_in_folder(folder: Path, source: SourceSpec) -> list[DataFile]:
    entries = sorted(folder.iterdir())
    files = [
        DataFile(path, FORMAT_OF_SUFFIX[path.suffix.lower()])
        for path in entries
        if path.is_file()
        and not path.name.startswith((".", "_"))
        and path.suffix.lower() in FORMAT_OF_SUFFIX
    ]
    if source.format is not None:
        files = [file for file in files if file.format == source.format]
    if not files:
        raise DataError(
            f"source {source.name!r}: the folder {folder} has no file that can be read as "
            f"{source.format or 'samples'}. It holds: {listed([path.name for path in entries])}. "
            f"Known extensions: {', '.join(FORMAT_OF_SUFFIX)}; "
            "for files in folders below, write a glob such as `folder/**/*.parquet`."
        )
    return files


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        return f"The folder {path.parent} does not exist either ({folder.resolve()} does)."
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"Near names in {folder}: {', '.join(near)}."
    return f"The folder {folder} holds: {listed(names)}."
