"""A stage as a Prefect task: its artifact is made once, and found again by what it is made from."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.serializers import JSONSerializer
from prefect.settings import get_current_settings

from p2d_core.errors import TransientError
from p2d_core.models import CapturedModel, model_hash, pick_device
from p2d_core.samples.source import SourceSpec, content_hash
from p2d_core.samples.tokens import TextFormat
from p2d_core.store import ArtifactRef, Making, Recipe, Store
from p2d_core.store.manifest import Manifest, faults
from p2d_core.store.room import check_room, storage_error
from p2d_core.store.store import readable
from tasks.elsewhere import stays, workers
from tasks.progress import progress_of
from tasks.room import SMALL
from tasks.together import helped, shared

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """What a run is made with and cannot change a result: it is in no key."""

    store: str
    run_id: str
    device: str = "auto"
    threads: int = 0
    tokens_per_batch: int = 8192
    checkpoint_seconds: float = 60
    gradient_checkpointing: bool = False
    micro_batch_tokens: int | None = None
    parallel: str | None = None
    """ddp or fsdp, where there are several processes; None: as their launcher said."""
    skip_bad_rows: int = 0
    """A sample is one or is not, however many rows may be left out; more than this is an error."""
    only_look: bool = False
    """Nothing is made and Prefect not asked: a stage gives the artifact that is there, or says by a
    `NotMade` that there is none."""


class NotMadeError(Exception):
    """What was to be read is of an artifact that is not made."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


class NotMade(ArtifactRef):
    """An artifact that is not there; its key is known if that of all it is made from is."""

    key: str = ""
    location: str = ""
    waits_for: str = ""
    """The stage that has to be made before the key is known; empty if it is known."""

    @property
    def path(self) -> Path:
        """Raises NotMadeError."""
        raise NotMadeError(self.waits_for or self.stage)

    @property
    def manifest(self) -> Manifest:
        """Raises NotMadeError."""
        raise NotMadeError(self.waits_for or self.stage)


class StageTask(Task[..., ArtifactRef]):
    """The task of a stage: Prefect's, but for `Runtime.only_look`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The artifact."""
        runtime = kwargs["runtime"] if "runtime" in kwargs else args[0]
        return self.fn(*args, **kwargs) if runtime.only_look else super().__call__(*args, **kwargs)


@dataclass(frozen=True)
class BaseModel:
    """The base model and how text goes into it; its content is in keys, its place is not."""

    folder: str
    sha256: str
    precision: str
    separator: str
    max_tokens: int
    hub: str = ""
    """Its name and commit on a hub, such as hf://OWNER/NAME@COMMIT, if it came from there."""
    template: Literal["plain", "chat"] = "plain"

    @classmethod
    def of(cls, folder: Path, precision: str, text: TextFormat, hub: str = "") -> BaseModel:
        """Hashes the folder."""
        with progress_of("hashing the base model (MB)") as progress:
            sha256 = model_hash(folder, progress)
        return cls(
            str(folder), sha256, precision, text.separator, text.max_tokens, hub, text.template
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What of it can change a result; the template is named where it is not plain."""
        unsaid = {"folder", "hub"} | ({"template"} if self.template == "plain" else set())
        return {k: v for k, v in asdict(self).items() if k not in unsaid}

    @property
    def text(self) -> TextFormat:
        """How samples become its tokens."""
        return TextFormat(self.separator, self.max_tokens, self.template)

    def captured(self, runtime: Runtime) -> CapturedModel:
        """The model, loaded when it is first needed; kept for the process."""
        with _MAKING:
            return _captured(self, runtime.device, runtime.threads, runtime.tokens_per_batch)


_MAKING = threading.Lock()


@functools.lru_cache(maxsize=1)
def _captured(base: BaseModel, device: str, threads: int, tokens_per_batch: int) -> CapturedModel:
    import torch

    if threads:
        torch.set_num_threads(threads)
    return CapturedModel(
        Path(base.folder),
        precision=base.precision,
        device=pick_device(device),
        text=base.text,
        tokens_per_batch=tokens_per_batch,
    )


@dataclass(frozen=True)
class SourceInput:
    """A source of samples; the content of its files is in keys, their place is not."""

    spec: SourceSpec
    sha256: str

    @classmethod
    def of(cls, spec: SourceSpec) -> SourceInput:
        """Hashes the files."""
        with progress_of(f"hashing {spec.name} (MB)") as progress:
            return cls(spec, content_hash(spec, progress))

    @property
    def identity(self) -> dict[str, Any]:
        """What of it can change a result."""
        unsaid = {"path"} | ({"messages"} if self.spec.messages is None else set())
        return {"sha256": self.sha256} | {
            k: v for k, v in asdict(self.spec).items() if k not in unsaid
        }


@dataclass(frozen=True)
class Plugin:
    """A ranker, scorer or adaptation by name, made where it is used; its version is in keys."""

    name: str
    version: str
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, name: str, made: Any) -> Plugin:
        """From a plug-in that was made, so that defaults count as if they had been given."""
        return cls(name, made.version, tuple(sorted(asdict(made).items())))

    @property
    def options(self) -> dict[str, Any]:
        """The settings to make it again with."""
        return dict(self.settings)


@dataclass(frozen=True)
class ShardRef:
    """One shard of the corpus; only the ids in it are in keys."""

    file: str
    index: int
    sha: str

    @property
    def identity(self) -> str:
        """`p2d_core.samples.shards.shard_hash` of its samples."""
        return self.sha


def is_transient(task: Any, run: Any, state: Any) -> bool:
    """Whether a failure may pass by itself: those alone are tried again."""
    import torch

    try:
        state.result()
    except (TransientError, OSError, torch.cuda.OutOfMemoryError):
        return True
    except Exception:
        return False
    return False


class StoredResult(JSONSerializer):
    """JSON, never pickle; a result counts only as the sound artifact that was asked for."""

    type: str = "p2d-stored"

    def loads(self, blob: bytes) -> Any:
        """Raises FileNotFoundError, which Prefect takes for a miss, when the artifact is gone.

        A damaged one counts as gone: the stage's own look then sets it aside and says so. So does
        another one than the running task is to make: its record was damaged, or is of another.
        """
        # not Prefect's decoder, which imports whatever class the text names
        ref = ArtifactRef.model_validate(json.loads(blob)["data"])
        asked_for = _asked_for()
        if asked_for not in (None, ref):
            log.warning("Prefect's record of %s is damaged: looked up anew", ref.stage)
            raise FileNotFoundError(ref.location)
        if faults(ref.path, ref.key):
            raise FileNotFoundError(ref.location)
        return ref


def _asked_for() -> ArtifactRef | None:
    """What the stage that runs here is to make; None outside of one."""
    run = TaskRunContext.get()
    policy = run.task.cache_policy if run is not None else None
    if run is None or not isinstance(policy, ArtifactKey) or policy.recipe_of is None:
        return None
    recipe = policy.recipe_of(run.parameters)
    folder = Store(Path(run.parameters["runtime"].store)).path(recipe.stage, recipe.key)
    return ArtifactRef(stage=recipe.stage, key=recipe.key, location=str(folder))


@dataclass
class ArtifactKey(CachePolicy):
    """Prefect's cache key is the artifact's own key, told apart by store."""

    recipe_of: Callable[[Mapping[str, Any]], Recipe] | None = None

    def compute_key(
        self,
        task_ctx: Any,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """``<stage>-<key>-<store>``."""
        assert self.recipe_of is not None
        recipe = self.recipe_of(inputs)
        root = inputs["runtime"].store
        store = hashlib.sha256(root.encode()).hexdigest()[:8]
        key = f"{recipe.stage}-{recipe.key[:40]}-{store}"
        path = Store(Path(root)).path(recipe.stage, recipe.key)
        kept = get_current_settings().results.local_storage_path / key
        expected = ArtifactRef(stage=recipe.stage, key=recipe.key, location=str(path))
        if kept.exists() and not _is_ours(kept, expected):
            log.warning("%s is no result of this stage: removed, looked up anew", kept)
            kept.unlink()
        return key


def _is_ours(file: Path, expected: ArtifactRef) -> bool:
    """Whether a kept result is what we write: Prefect believes it how it wants to be read.

    One that names pickle, or says nothing, would have code run when it is loaded.
    """
    try:
        record = json.loads(file.read_bytes())
        return (
            set(record) == {"metadata", "result"}
            and record["metadata"]["serializer"] == StoredResult().model_dump(mode="json")
            and json.loads(record["result"])["data"] == expected.model_dump(mode="json")
        )
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return False


def stage(
    name: str,
    *,
    version: str = "1",
    outside_key: tuple[str, ...] = (),
    room: Callable[..., int] = lambda **inputs: SMALL,
    together: bool = False,
    sent: Callable[..., Mapping[str, Any] | None] = stays,
) -> Callable[[Callable[..., None]], StageTask]:
    """Turns ``build(making, runtime, **inputs)`` into a Prefect task that returns an ArtifactRef.

    The recipe is made of all inputs but ``runtime`` and those named in ``outside_key``: artifacts
    by their key, base models, sources and shards by their content, the rest by value. ``room``
    says of the inputs about how many bytes will be written; without so much free the stage does
    not start. ``sent`` says which inputs a worker gets where a flow has some (`tasks.elsewhere`);
    None: the stage is made in this process all the same. Where a run has several processes, all of
    them build a stage that is made ``together``; what it keeps is written by the first.
    """

    def wrap(build: Callable[..., None]) -> StageTask:
        signature = inspect.signature(build)
        if together:
            shared(name, build)

        def recipe_of(inputs: Mapping[str, Any]) -> Recipe:
            settings: dict[str, Any] = {}
            made_from: dict[str, Any] = {}
            for key, value in inputs.items():
                if key != "runtime" and key not in outside_key:
                    (made_from if _is_input(value) else settings)[key] = _plain(value)
            beside = {k: _plain(v) for k, v in inputs.items() if k in outside_key and _is_input(v)}
            return Recipe(name, version, settings, made_from, beside)

        @functools.wraps(build)
        def run(*args: Any, **kwargs: Any) -> ArtifactRef:
            bound = run.__signature__.bind(*args, **kwargs)  # type: ignore[attr-defined]
            bound.apply_defaults()
            runtime: Runtime = bound.arguments["runtime"]
            store = Store(Path(runtime.store))
            if runtime.only_look:
                return _looked_up(store, name, recipe_of, bound.arguments)

            def make(making: Making) -> None:
                check_room(store.root, room(**bound.arguments), f"the stage {name}")
                for value in bound.arguments.values():
                    if isinstance(value, BaseModel) and value.hub:
                        making.facts["base"] = value.hub
                others = workers()
                inputs = sent(making, **bound.arguments) if others is not None else None
                if others is not None and inputs is not None:
                    others.build(build, making, inputs)
                    return
                with helped(name, making, bound.arguments) if together else nullcontext():
                    build(making, **bound.arguments)

            try:
                return store.produce(recipe_of(bound.arguments), make, run_id=runtime.run_id)
            except Exception as error:
                # to be tried again makes no room on a disk
                if told := storage_error(error, store.root, f"the stage {name}"):
                    raise told from error
                raise

        parameters = [p for n, p in signature.parameters.items() if n != "making"]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {"return": ArtifactRef}
        return StageTask(
            run,
            name=name,
            task_run_name=lambda parameters: shown_name(name, parameters),
            retries=2,
            retry_delay_seconds=[1, 5],
            retry_condition_fn=is_transient,
            cache_policy=ArtifactKey(recipe_of=recipe_of),
            persist_result=True,
            result_serializer=StoredResult(),
        )

    return wrap


def _looked_up(
    store: Store,
    stage: str,
    recipe_of: Callable[[Mapping[str, Any]], Recipe],
    inputs: Mapping[str, Any],
) -> ArtifactRef:
    """The artifact if its manifest is there; files are not looked at."""
    for value in inputs.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, NotMade) and not part.key:
                return NotMade(stage=stage, waits_for=part.waits_for)
    key = recipe_of(inputs).key
    ref = ArtifactRef(stage=stage, key=key, location=str(store.path(stage, key)))
    return ref if readable(ref) else NotMade(stage=stage, key=key)


def shown_name(stage: str, inputs: Mapping[str, Any]) -> str:
    """What a stage's task run is called: of which source, shard, draw or arm it is."""
    of: list[str] = []
    for name, value in inputs.items():
        if isinstance(value, SourceInput):
            of.append(value.spec.name)
        elif isinstance(value, ShardRef):
            of.append(f"shard {value.index}")
        elif name == "draw":
            of.append(f"draw {value}")
        elif name == "arm":
            of.append(str(value))
    return f"{stage}: {', '.join(of)}" if of else stage


def _is_input(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_input(part) for part in value)
    return isinstance(value, ArtifactRef | BaseModel | SourceInput | ShardRef)


def _plain(value: Any) -> Any:
    if isinstance(value, ArtifactRef):
        return value.key
    if hasattr(value, "identity"):
        return _plain(value.identity)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
