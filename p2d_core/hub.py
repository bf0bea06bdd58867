"""The Hugging Face hub: names with revisions, the commits they stand for, and what its noes mean.

Tokens are found and sent by huggingface_hub alone; here they are only kept out of messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from p2d_core.errors import SettingsError

PREFIX = "hf://"
DEFAULT_ENDPOINT = "https://huggingface.co"
OF_KIND = {"model": "", "dataset": "datasets/"}
"""What stands before a repository's name, in ``hf://`` names and in addresses of its pages."""

KEYS = {
    "model": "the name and the revision in `base:`",
    "dataset": "the name and `split:`, `config:`, `revision:`",
}
FOLDERS = {"model": "the folder as `base:`", "dataset": "the folder's files as `path:`"}


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, at a revision."""

    kind: Literal["model", "dataset"]
    repo: str
    """``OWNER/NAME``."""
    revision: str | None = None
    """Branch, tag or commit; None: the newest of the main branch."""

    @classmethod
    def of_model(cls, text: str) -> HubName:
        """From ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``.

        Raises:
            SettingsError: it is none of the two.
        """
        from huggingface_hub import parse_hf_uri
        from huggingface_hub.errors import HfUriError

        try:
            found = parse_hf_uri(text)
        except HfUriError as error:
            raise SettingsError(_no_model(text, str(error))) from None
        if found.type != "model" or found.path_in_repo:
            what = "names a file" if found.path_in_repo else f"is a {found.type}"
            raise SettingsError(_no_model(text, f"It {what}."))
        return cls("model", found.id, found.revision)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{OF_KIND[self.kind]}{self.repo}{at}"

    @property
    def is_pinned(self) -> bool:
        """Whether it means the same for ever."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None

    @property
    def page(self) -> str:
        """Its address in a browser."""
        return f"{endpoint()}/{OF_KIND[self.kind]}{self.repo}"

    @property
    def download(self) -> str:
        """The command that puts it into the cache."""
        words = ["hf download", "--repo-type dataset" if self.kind == "dataset" else "", self.repo]
        words.append(f"--revision {self.revision}" if self.revision else "")
        return " ".join(word for word in words if word)

    def at_commit(self) -> HubName:
        """The same at the commit that its revision stands for; asks the hub unless it is one.

        Where the hub cannot be reached, or offline, it is the commit that the cache knows.

        Raises:
            Exception: what `refusal` explains.
        """
        if self.is_pinned:
            return self
        from huggingface_hub import HfApi

        found = HfApi().resolve_revision(
            self.repo,
            repo_type=self.kind,
            revision=self.revision,
            local_files_only=is_offline(),
        )
        return replace(self, revision=found.resolved)


def _no_model(text: str, why: str) -> str:
    return (
        f"base {text!r} is no model of the hub: {without_tokens(why)} Give hf://OWNER/NAME@COMMIT, "
        "or a folder."
    )


def refusal(name: HubName, error: Exception) -> str:
    """Why a repository cannot be had, and what to do, from what huggingface_hub or datasets raised.

    It never holds the token.
    """
    from huggingface_hub import errors

    for each in _chain(error):
        status = each.response.status_code if isinstance(each, errors.HfHubHTTPError) else 0
        if isinstance(each, errors.GatedRepoError):
            return (
                f"{name} is gated: only accounts that its owner let in may read it. Ask for access "
                f"at {name.page}, and set HF_TOKEN to a token of that account ({token_words()})."
            )
        if isinstance(each, errors.RevisionNotFoundError):
            return (
                f"{name}: there is no revision {name.revision!r}. Give a branch, tag or commit of "
                f"{name.page}."
            )
        # who sends no token is not told whether it is there
        if isinstance(each, errors.RepositoryNotFoundError) or (
            status == 401 and not token_place()
        ):
            return (
                f"{name}: there is no such {name.kind} at {endpoint()}, or it is private. Mend the "
                "name; for a private one set HF_TOKEN to a token that may read it "
                f"({token_words()})."
            )
        if isinstance(each, errors.HfHubHTTPError) and status in (401, 403):
            return f"{name}: {token_refused(each)}"
        if is_offline() and isinstance(
            each,
            errors.OfflineModeIsEnabled
            | errors.RevisionResolutionError
            | errors.LocalEntryNotFoundError
            | errors.CachedRepoTreeNotFoundError,
        ):
            return (
                f"{name} is not in the cache ({_cache()}), or not whole, and HF_HUB_OFFLINE is "
                f"set, so that the hub is not asked. Unset it; or run `{name.download}` where "
                "there is a network, with the same HF_HOME."
            )
    if isinstance(error, errors.RevisionResolutionError | errors.LocalEntryNotFoundError):
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return (
        f"{name} cannot be opened: {in_one_line(error)} Check the network and HF_ENDPOINT "
        f"({endpoint()}), and {KEYS[name.kind]}; or download it where there is a network "
        f"({name.download} --local-dir FOLDER) and give {FOLDERS[name.kind]}."
    )


def token_refused(error: Exception) -> str:
    """What to do when the hub did not take the token, or none was sent."""
    said = getattr(error, "server_message", None)
    said = without_tokens(said.rstrip(".")) if said else in_one_line(error).rstrip(".")
    return (
        f"the hub at {endpoint()} refuses: {said} ({token_words()}). Set HF_TOKEN to a valid token "
        f"that may do this, of {endpoint()}/settings/tokens."
    )


def in_one_line(error: Exception) -> str:
    """Type and beginning of an error's message, without a token in it."""
    text = " ".join(without_tokens(str(error)).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {text}."


def without_tokens(text: str) -> str:
    """The text with stars where a token stood: HTTP libraries show a header that they refuse."""
    for token in _tokens():
        text = text.replace(token, "***")
    return re.sub(r"(?i)(bearer\s+)[^\s'\"]+", r"\1***", text)


def token_place() -> str:
    """Where huggingface_hub finds a token, ``HF_TOKEN`` first; empty if there is none."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    file = Path(constants.HF_TOKEN_PATH)
    return str(file) if file.is_file() and file.stat().st_size else ""


def token_words() -> str:
    """Which token was sent, such as that of HF_TOKEN; never the token."""
    place = token_place()
    return f"the token sent was that of {place}" if place else "no token is set"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def endpoint() -> str:
    """Address of the hub (HF_ENDPOINT), without a user's name and password."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _tokens() -> Iterator[str]:
    from huggingface_hub import constants

    found = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError, ValueError):
        found.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8"))
    for token in (each.strip() for each in found):
        if token:
            yield token


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, the first cause first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    yield from reversed(found)
