"""An exported folder as a commit on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_core.errors import InputError, ServiceError, SettingsError
from p2d_core.hub import PREFIX, HubName, endpoint, in_one_line, is_offline, token_refused


@dataclass(frozen=True)
class Pushed:
    """What came of it."""

    address: str
    """Of the commit."""
    private: bool


def check_push(repo: str, *, public: bool) -> None:
    """What can be known before there is anything to push; makes nothing.

    Raises:
        InputError: no name of a repository, offline, no token or none that the hub takes, or what
            is pushed would be public unasked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not _is_name(repo):
        raise InputError(f"--push {repo!r} is no name of a model on the hub. Give OWNER/NAME.")
    if is_offline():
        raise InputError(
            "--push needs the hub, and HF_HUB_OFFLINE is set. Unset it, or leave --push out and "
            f"upload the folder later: hf upload {repo} FOLDER"
        )
    api = HfApi()
    try:
        api.whoami()
        private = api.model_info(repo).private
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise InputError(f"--push {repo}: {_why(error)}") from None
    if not private and not public:
        raise InputError(
            f"--push {repo}: it is there already and public, so that everybody could read what is "
            "pushed. Say --public if that is meant, or name another."
        )


def push(folder: Path, repo: str, *, public: bool, message: str) -> Pushed:
    """Makes the repository if there is none, and commits the folder, which it then consists of.

    What was there before stays in its history.

    Raises:
        ServiceError: the hub did not take it; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=["*"]
        )
        private = bool(api.model_info(repo).private)
    except Exception as error:
        again = f"hf upload {repo} {folder}" + ("" if public else " --private")
        raise ServiceError(
            f"{folder} is written, but was not pushed to {repo}: {_why(error)} Then: {again}"
        ) from None
    return Pushed(done.commit_url, private)


def _is_name(repo: str) -> bool:
    try:
        return HubName.of_model(PREFIX + repo).repo == repo
    except SettingsError:
        return False


def _why(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if isinstance(error, LocalTokenNotFoundError):
        return (
            "no token is set. Set HF_TOKEN to one that may write "
            f"({endpoint()}/settings/tokens), or run `hf auth login`."
        )
    response: Any = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response.status_code in (401, 403):
        return token_refused(error)
    return f"{in_one_line(error)} Check the network and HF_ENDPOINT ({endpoint()})."
