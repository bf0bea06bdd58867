"""Base models of the Hugging Face hub: downloaded into its cache, then folders like any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2d_core.errors import ModelError, StorageError
from p2d_core.hub import PREFIX, HubName, refusal
from p2d_core.models.folder import check_configs
from p2d_core.progress import Progress, no_progress
from p2d_core.store.room import free_bytes

SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
"""Config, tokenizer, chat template, and the card, for its license. With the weights this is all
that `model_hash` looks at, so that a copy in a folder has the same hash."""
WEIGHTS = ("*.safetensors",)
"""Pickled weights and code are never downloaded."""


def is_hub_model(base: str) -> bool:
    """Whether a base is named by the hub, not a folder."""
    return base.startswith(PREFIX)


def hub_model_at_commit(base: str) -> HubName:
    """The model that a name means today, with its commit.

    Raises:
        SettingsError: it is no name of a model.
        ModelError: the hub has none, does not let this user in, or cannot be asked.
    """
    name = HubName.of_model(base)
    try:
        return name.at_commit()
    except Exception as error:
        # without its cause: that may hold the token
        raise ModelError(refusal(name, error)) from None


def download_model(name: HubName, progress: Progress = no_progress) -> Path:
    """The model's folder in huggingface_hub's cache; what is there already is not downloaded.

    What would be refused by its config is refused before its weights are downloaded.

    Args:
        name: at a commit.
        progress: is told of megabytes.

    Raises:
        ModelError: it cannot be had, or is not safe to load.
        StorageError: the cache has no room for it.
    """
    folder = _snapshot(name, SMALL, no_progress)
    try:
        check_configs(folder)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    _check_room(name, folder)
    folder = _snapshot(name, WEIGHTS, progress)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name}: has no safetensors weights, and pickled ones, which can run code, are never "
            f"downloaded. Name a revision that has them (often a proposal at {name.page}/"
            "discussions, such as @refs/pr/1), or convert it in a folder of your own: "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    return folder


def _snapshot(name: HubName, patterns: Sequence[str], progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                tqdm_class=_bar(progress),
            )
        )
    except Exception as error:
        raise ModelError(refusal(name, error)) from None


def _check_room(name: HubName, folder: Path) -> None:
    """Room for the weights, where the hub has said how large they are."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(name.repo, revision=name.revision)
    except CachedRepoTreeNotFoundError:
        return
    needed = sum(
        file.size
        for file in files
        if "/" not in file.path
        and file.path.endswith(".safetensors")
        and not (folder / file.path).exists()
    )
    free = free_bytes(folder)
    if needed > free:
        raise StorageError(
            f"{name}: its weights take {needed / 1e6:,.1f} MB, but the cache at {folder} has "
            f"{free / 1e6:,.1f} MB free. Nothing was started. Make room there (`hf cache prune`), "
            "or name another folder with HF_HUB_CACHE."
        )


def _bar(progress: Progress) -> Any:
    """A class of progress bars that show nothing and tell of bytes."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and self.total:
                progress(int(self.n) // 10**6, int(self.total) // 10**6)

    return Bar
