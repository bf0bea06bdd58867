"""Which model a person means, its base, and a folder with it in a form that other tools load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.choice import kept, sound
from flows.hub import base_folder
from p2d_core.adaptation.adaptations import ADAPTER
from p2d_core.errors import ArtifactError, InputError, ModelError
from p2d_core.export.exporting import AdaptedModel, Exported, export
from p2d_core.export.folder import appearing
from p2d_core.export.rounding import SAMPLES
from p2d_core.hub import HubName
from p2d_core.models import check_model_folder, is_hub_model, load_tokenizer, model_hash
from p2d_core.samples.shards import read_shard
from p2d_core.samples.tokens import EncodedSample, Encoder, TextFormat
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.runs import read_summary, run_files
from tasks.progress import progress_of
from tasks.report.card import CARD, PICTURE, Card, as_card, license_of
from tasks.summary import Summary

PROXY = "proxy.parquet"
LISTED = 5
"""Runs that are named where several are meant."""


@dataclass(frozen=True)
class Chosen:
    """A `model` artifact, and the newest run that it is of."""

    model: ArtifactRef
    arm: str
    summary: Summary | None
    """None where no run of the store names it."""


def export_run(
    store: Store,
    run: str,
    form: str,
    to: Path,
    *,
    dtype: str | None = None,
    base: Path | None = None,
    base_name: str = "",
    license_id: str = "",
    for_hub: bool = False,
) -> tuple[Chosen, Exported]:
    """Exports the model of a run, with its card, into a folder that appears whole or not at all.

    Args:
        run: a run's id or a model artifact's key, or the beginning of one.
        base: where the base is now; where the run had it if None.
        base_name: what the export and its card call the base; if empty its name on the hub, where
            the run had it from there, or else its folder.
        license_id: for the card; that of the base's own card if empty, else unknown.
        for_hub: it has to name its base as others find it.

    Raises:
        InputError: none or more than one model is meant, its base is not there, or the folder is.
        ArtifactError: the model is gone, or not as it was made.
        ExportError, StorageError: as for `p2d_core.export.exporting.export`.
    """
    chosen = choose(store, run)
    manifest = chosen.model.manifest
    found = manifest.inputs["base"]
    named = _base_of(store, chosen)
    origin = HubName.of_model(named) if is_hub_model(named or "") else None
    base_name = base_name or (origin.repo if origin is not None else "")
    if for_hub and not base_name:
        raise InputError(
            f"the base of model {chosen.model.key[:12]} is a folder of this machine, which nobody "
            "finds from a hub. Say with --base-name OWNER/NAME what it is called there."
        )
    revision = origin.revision or "" if origin is not None and origin.repo == base_name else ""
    model = AdaptedModel(
        base=_base(chosen, base or named),
        base_sha256=found["sha256"],
        precision=found["precision"],
        kept=chosen.model.path,
        low_rank=manifest.facts["adaptation"] == "lora",
    )
    text = TextFormat(found["separator"], found["max_tokens"], found.get("template", "plain"))
    encoder = Encoder(load_tokenizer(model.base), text)
    picture = _picture(store, chosen.model)
    with appearing(to) as folder:
        with progress_of(f"exporting as {form} (steps)") as progress:
            done = export(
                model,
                form,
                folder,
                dtype=dtype,
                base_name=base_name,
                base_revision=revision,
                samples=_proxy_samples(store, chosen.model, encoder),
                progress=progress,
            )
        if picture is not None:
            (folder / PICTURE).write_bytes(picture.read_bytes())
        card = Card(
            model=chosen.model,
            arm=chosen.arm,
            summary=chosen.summary,
            exported=done,
            base=str(model.base),
            base_name=base_name,
            base_revision=revision,
            license_id=license_id or license_of(model.base),
            has_picture=picture is not None,
        )
        (folder / CARD).write_text(as_card(card), encoding="utf-8")
        mode = (folder / CARD).stat().st_mode
        for file in folder.iterdir():
            file.chmod(mode)  # safetensors writes files that none but their owner reads
    return chosen, done


def choose(store: Store, asked: str) -> Chosen:
    """The model that is meant.

    Raises:
        InputError: none or more than one is.
        ArtifactError: it is gone, or not as it was made.
    """
    chosen = _of_run(store, asked) or _of_key(store, asked)
    found = store.faults(chosen.model)
    if found:
        raise ArtifactError(
            f"the model {chosen.model.key[:12]} is not as it was made: {'; '.join(found)}. "
            "`p2d adapt` with the same settings makes it again."
        )
    return chosen


def _of_run(store: Store, asked: str) -> Chosen | None:
    files = [file for file in run_files(store) if asked and file.stem.startswith(asked)]
    keys = [ref.key for ref in store.refs("model") if asked and ref.key.startswith(asked)]
    if not files:
        return None
    if len(files) + len(keys) > 1:
        meant = [f"run {file.stem}" for file in files] + [f"model {key[:12]}" for key in keys]
        raise InputError(
            f"{len(meant)} begin with {asked!r}: {', '.join(meant[:LISTED])}. Give more."
        )
    summary = _summary(files[0])
    key = Path(summary.artifacts.get("model", "")).name
    ref = kept(store, "model", key) if key else None
    if ref is None:
        raise ArtifactError(
            f"the model {key[:12]} of run {summary.run_id} is gone from {store.root}. "
            f"`{summary.command or 'p2d adapt'}` makes it again."
        )
    return Chosen(ref, "p2d", summary)


def _of_key(store: Store, asked: str) -> Chosen:
    try:
        ref = store.resolve(asked, "model")
    except ArtifactError as error:
        runs = ", ".join(file.stem for file in run_files(store)[:LISTED]) or "none"
        raise InputError(f"{error} Nor is it a run; the newest here: {runs}.") from error
    for summary in _summaries(store):
        for name, place in summary.artifacts.items():
            if Path(place).name == ref.key:
                return Chosen(ref, name.removeprefix("model").lstrip("_") or "p2d", summary)
    return Chosen(ref, "", None)


def _summaries(store: Store) -> Iterator[Summary]:
    """Those that can be read, newest first."""
    for file in run_files(store):
        with suppress(ArtifactError):
            yield _summary(file)


def _summary(file: Path) -> Summary:
    values = read_summary(file)
    try:
        return Summary.model_validate(values)
    except ValidationError as error:
        raise ArtifactError(
            f"{file} is not the summary of a run that this version reads. Name its model by key: "
            "`p2d artifacts ls --stage model`."
        ) from error


def _base(chosen: Chosen, named: Path | str | None) -> Path:
    """The folder of the base, if its content is still what the model was made from."""
    manifest = chosen.model.manifest
    key = chosen.model.key[:12]
    if named is None:
        raise InputError(f"where the base of model {key} lies is not known. Give --base FOLDER.")
    try:
        there, _ = base_folder(str(named))
        check_model_folder(there)
    except ModelError as error:
        raise ModelError(f"the base of model {key}: {error} Give --base FOLDER.") from error
    with progress_of("hashing the base model (MB)") as progress:
        sha = model_hash(there, progress)
    wanted = manifest.inputs["base"]["sha256"]
    if sha != wanted:
        raise ModelError(
            f"{there} has other content ({sha[:12]}) than the base that model {key} was made from "
            f"({wanted[:12]}). Give with --base the folder of that one."
        )
    return there.absolute()


def _base_of(store: Store, chosen: Chosen) -> str | None:
    """As the run's settings name it, else as its model does: a folder, or a name on the hub."""
    model = chosen.model
    run_id = chosen.summary.run_id if chosen.summary is not None else model.manifest.run_id
    named: list[Any] = []
    with suppress(OSError, yaml.YAMLError, TypeError, KeyError):
        text = (store.root / "runs" / f"{run_id}.yaml").read_text(encoding="utf-8")
        named.append(yaml.safe_load(text)["base"])
    named.append(model.manifest.facts.get("base"))
    with suppress(OSError, yaml.YAMLError, TypeError, KeyError):
        text = (model.path / ADAPTER / "adapter_config.json").read_text(encoding="utf-8")
        named.append(yaml.safe_load(text)["base_model_name_or_path"])
    bases = [each for each in named if isinstance(each, str)]
    there = (each for each in bases if is_hub_model(each) or Path(each).is_dir())
    return next(there, bases[0] if bases else None)


def _proxy_samples(store: Store, model: ArtifactRef, encoder: Encoder) -> list[EncodedSample]:
    """A few, to compare logits on; none where the target's samples are gone."""
    for ref in store.lineage(model):
        if ref.stage == "samples" and PROXY in ref.manifest.files:
            with suppress(ArtifactError):
                return list(encoder.encode_all(read_shard(sound(ref, PROXY))[:SAMPLES]))
    return []


def _picture(store: Store, model: ArtifactRef) -> Path | None:
    """Of the head map that the model was made by; None where there is none, or it is gone."""
    key = model.manifest.beside.get("heads")
    ref = kept(store, "heads", key) if key else None
    with suppress(ArtifactError):
        return sound(ref, PICTURE) if ref is not None else None
    return None
