"""Which tasks of lm-eval are run, checked and loaded before anything is started."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from p2d_core.errors import SettingsError
from p2d_core.evaluation.harness.contained import SEEDS, contained

PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "config_source")
"""Of a task's settings: where its documents and its file lie. What is there is in the hash."""
MOST_NEAR = 5


@dataclass(frozen=True, slots=True)
class HarnessSpec:
    """Tasks, and all that can change what comes of them."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    """Folder of further task files."""
    limit: int | None = None
    """First documents of each task; None: all."""
    num_fewshot: int | None = None
    """None: as the task says."""
    sha256: str = ""
    """Of the tasks' settings, functions and documents."""
    version: str = ""
    """Of lm-eval."""

    @property
    def identity(self) -> dict[str, Any]:
        """Where the files lie changes nothing."""
        return {key: value for key, value in asdict(self).items() if key != "include_path"}


def checked_tasks(
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> HarnessSpec:
    """Loads every task with its documents.

    Raises:
        SettingsError: lm-eval is not installed, a task is unknown, cannot be loaded, or is of a
            kind that is not run here.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "evaluation.harness runs tasks of lm-eval, which is not installed "
            f"({error}). pip install 'p2d[eval]', or leave evaluation.harness out."
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise SettingsError(
            f"evaluation.harness.include_path: {include_path} is no folder. Name the folder that "
            "the task files (.yaml) lie in."
        )
    asked = HarnessSpec(tuple(dict.fromkeys(tasks)), include_path, limit, num_fewshot)
    with contained():
        loaded = _load(asked)
        sha256 = _hash(loaded, limit)
    spec = HarnessSpec(asked.tasks, include_path, limit, num_fewshot, sha256, version("lm_eval"))
    _kept.clear()
    _kept[spec] = loaded
    return spec


def loaded_tasks(spec: HarnessSpec) -> Any:
    """What `checked_tasks` loaded, as lm-eval's ``evaluate`` takes it; call it `contained`.

    Raises:
        SettingsError: the task files or their documents are not what they were.
    """
    if spec not in _kept:
        loaded = _load(spec)
        if _hash(loaded, spec.limit) != spec.sha256:
            raise SettingsError(
                f"evaluation.harness: the tasks {', '.join(spec.tasks)} or their documents have "
                "changed since the run began. Start it again."
            )
        _kept.clear()
        _kept[spec] = loaded
    return _kept[spec]


def documents_of(spec: HarnessSpec) -> list[int]:
    """How many documents each task has, as far as the limit goes."""
    with contained():
        counts = [len(task.eval_docs) for task in loaded_tasks(spec)["tasks"].values()]
    return [min(count, spec.limit or count) for count in counts]


_kept: dict[HarnessSpec, Any] = {}
"""The last tasks: loading them takes seconds, and every model of a run is asked the same."""


def _load(spec: HarnessSpec) -> dict[str, Any]:
    manager = _index(spec.include_path, spec.tasks)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in spec.tasks:
        try:
            found = manager.load(name)
        except Exception as error:
            # whatever a task file, its functions or the reading of its data can raise
            said = " ".join(f"{type(error).__name__}: {error}".split())[:400].rstrip(".")
            raise SettingsError(
                f"evaluation.harness.tasks: {name!r} cannot be loaded ({said}). Mend its file or "
                "its data; data_files are looked for from the folder that the command runs in."
            ) from error
        for kind, parts in loaded.items():
            parts |= found.get(kind, {})
    for name, task in loaded["tasks"].items():
        _prepare(name, task, spec.num_fewshot)
    return loaded


def _index(include_path: str | None, names: Sequence[str]) -> Any:
    """A task manager that knows the names; of lm-eval's own 14,000 tasks only if it has to."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=include_path, include_defaults=False)
    if all(_is_whole(name, own.task_index) for name in names):
        return own
    missing = [name for name in names if name not in own.task_index]
    files = _built_in_files() if missing else b""
    for name in missing:
        if name.encode() not in files:
            _refuse(name, [*own.all_tasks, *_names_in(files)], include_path)
    known = TaskManager(include_path=include_path) if include_path else _built_in()
    for name in names:
        if name not in known.task_index:
            _refuse(name, known.all_tasks, include_path)
    return known


def _is_whole(name: Any, index: Mapping[str, Any]) -> bool:
    """Whether a task is in the index; of a group, whether all of its members are."""
    if isinstance(name, dict):
        name = name.get("task", name.get("group"))
    if not isinstance(name, str) or name not in index:
        return False
    settings = index[name].cfg or {}
    members = settings.get("task", []) if "group" in settings else []
    return all(_is_whole(each, index) for each in members)


def _refuse(name: str, known: Sequence[str], include_path: str | None) -> None:
    near = difflib.get_close_matches(name, known, n=MOST_NEAR, cutoff=0.5)
    hint = f"Near: {', '.join(near)}." if near else "`lm-eval ls tasks` lists them."
    where = f"lm-eval {version('lm_eval')}"
    if include_path:
        where += f" or in {include_path}, where a file that is no task is passed over"
    raise SettingsError(f"evaluation.harness.tasks: there is no task {name!r} in {where}. {hint}")


@functools.lru_cache(maxsize=1)
def _built_in() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _built_in_files() -> bytes:
    """The text of lm-eval's own task files: a second to search, where an index takes many."""
    import lm_eval

    folder = Path(lm_eval.__path__[0]) / "tasks"
    return b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*.yaml")))


def _names_in(files: bytes) -> list[str]:
    found = re.findall(rb"^(?:task|group|tag)\s*:\s*[\"']?([\w.+-]+)", files, re.MULTILINE)
    return sorted({name.decode() for name in found})


def _prepare(name: str, task: Any, num_fewshot: int | None) -> None:
    """As lm-eval's command does it; refuses what is not run here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise SettingsError(
            f"evaluation.harness.tasks: {name!r} runs code that the model writes, which P2D does "
            "not. Leave it out."
        )
    if getattr(task, "MULTIMODAL", False):
        raise SettingsError(
            f"evaluation.harness.tasks: {name!r} asks of pictures or sound, and the base model "
            "reads text. Leave it out."
        )
    functions = getattr(task, "_metric_fn_list", {})
    lacking = [metric for metric, function in functions.items() if function is None]
    if lacking and task.get_config("process_results") is None:
        raise SettingsError(
            f"evaluation.harness.tasks: {name!r} asks for the metric {lacking[0]!r}, which lm-eval "
            "would load as code from the hub; P2D does not. Take a metric of lm-eval's own."
        )
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEEDS[1])


def _hash(loaded: dict[str, Any], limit: int | None) -> str:
    """SHA-256 (hex) of what the tasks are, wherever their files lie."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_in_words)
        found.update(text.encode(errors="replace") + b"\n")

    for name, task in sorted(loaded["tasks"].items()):
        settings = task.config.to_dict(keep_callable=True)
        add([name, _without_places(settings)])
        add(_in_words(type(task)))
        _add_documents(add, islice(task.eval_docs, limit))
        if settings.get("num_fewshot"):
            _add_documents(add, task.fewshot_docs())
    for name, group in sorted(loaded["groups"].items()):
        add([name, group.child_names, str(group.aggregate_metric_list)])
    return found.hexdigest()


def _without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in PLACES}
    if isinstance(kept.get("metadata"), dict):
        kept["metadata"] = _without_places(kept["metadata"])
    return kept


def _add_documents(add: Any, documents: Iterable[Any]) -> None:
    for document in documents:
        add(document)


def _in_words(value: Any) -> Any:
    """Code by the text of its file, as what it calls there counts too."""
    if callable(value):
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        module = sys.modules.get(getattr(value, "__module__", ""))
        try:
            own = module is not None and not module.__name__.startswith("lm_eval.")
            return [name.rpartition("/")[2], inspect.getsource(module) if module and own else ""]
        except (OSError, TypeError):
            return name
    return str(value)
