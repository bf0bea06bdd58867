"""What settings name of the Hugging Face hub: each revision as a commit, the base as a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from flows.settings import RunSettings, SourceSettings
from p2d_core.hub import HubName
from p2d_core.models import download_model, hub_model_at_commit, is_hub_model
from p2d_core.samples.hub import hub_commit
from p2d_core.samples.source import SourceSpec
from tasks.progress import progress_of

log = logging.getLogger(__name__)


def pinned(settings: RunSettings) -> RunSettings:
    """The same with its commit in place of every hub revision, so that it is what is recorded.

    Warns of each that was none. The hub is asked of those alone.

    Raises:
        InputError: a name is wrong, or the hub does not give what it names.
    """

    def source(given: SourceSettings | None) -> SourceSettings | None:
        if given is None or not _spec(given).is_on_hub:
            return given
        commit = hub_commit(_spec(given))
        if commit != given.revision:
            _warn(f"source {given.name!r}", given.revision, f"revision: {commit}")
        return given.model_copy(update={"revision": commit})

    base = settings.base
    if is_hub_model(base):
        name = HubName.of_model(base)
        base = str(hub_model_at_commit(base))
        if not name.is_pinned:
            _warn(f"the base {name.repo}", name.revision, f"base: {base}")
    corpus, evaluation = settings.corpus, settings.evaluation
    return settings.model_copy(
        update={
            "base": base,
            "target": source(settings.target),
            "corpus": corpus.model_copy(
                update={"sources": tuple(source(each) for each in corpus.sources)}
            ),
            "evaluation": evaluation.model_copy(
                update={
                    "source": source(evaluation.source),
                    "retention": source(evaluation.retention),
                }
            ),
        }
    )


def _warn(what: str, revision: str | None, pin: str) -> None:
    log.warning(
        "%s is not pinned: %s may be another commit at the next run. This one takes `%s`; write "
        "that into the settings to stay with it.",
        what,
        revision or "the newest",
        pin,
    )


def base_folder(base: str) -> tuple[Path, str]:
    """Where a base lies, and its name and commit on the hub, empty if it is a folder.

    Raises:
        InputError: the hub does not give it.
        StorageError: there is no room for it.
    """
    if not is_hub_model(base):
        return Path(base), ""
    name = hub_model_at_commit(base)
    with progress_of("downloading the base model (MB)") as progress:
        return download_model(name, progress), str(name)


def base_name(base: str) -> str:
    """What a base is called: its name on the hub, or that of its folder."""
    return HubName.of_model(base).repo if is_hub_model(base) else Path(base).name


def hub_names(settings: RunSettings) -> list[str]:
    """All that settings, pinned, take from the hub, with commits."""
    evaluation = settings.evaluation
    given = [settings.target, *settings.corpus.sources, evaluation.source, evaluation.retention]
    return sorted({*_hub_sources(given), *([settings.base] if is_hub_model(settings.base) else [])})


def _hub_sources(given: list[SourceSettings | None]) -> Iterator[str]:
    for each in given:
        if each is not None and _spec(each).is_on_hub:
            yield f"{each.path}@{each.revision}"


def _spec(given: SourceSettings) -> SourceSpec:
    return SourceSpec(name=given.name, path=given.path, revision=given.revision)
