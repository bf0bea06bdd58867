"""What is wrong with settings, in words: the key, what was given, what it means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flows.plain_yaml import shortened

IN_YAML = {
    "a valid tuple": "a list, such as [first, second]",
    "Tuple should have": "The list should have",
    r"a valid dictionary( or instance of \w+)?": "a mapping of names to values",
}


def explain(error: ValidationError, file: Path, root: type[BaseModel]) -> str:
    """Every problem in a line: the key, what was given, what would do.

    Args:
        root: the model of the whole file.
    """
    lines = []
    # where several types would do, pydantic has a problem for each, with its name as one more part
    by_place: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in error.errors():
        place = tuple(part for part in problem["loc"] if not _names_a_type(part))
        by_place.setdefault(place, []).append(problem)
    for place, problems in by_place.items():
        key, kind = ".".join(map(str, place)), problems[0]["type"]
        if kind == "extra_forbidden":
            known = ", ".join(model_at(place[:-1], root).model_fields)
            lines.append(f"{file}: unknown key `{key}`. Known here: {known}.")
        elif kind == "missing":
            lines.append(f"{file}: `{key}` is missing. {_help(place, root)}")
        else:
            given, meaning = shortened(problems[0]["input"]), _help(place, root)
            wrong = ", or ".join([problem["msg"] for problem in problems])
            wrong = wrong.replace(", or Input should be ", ", or ")
            for pythons, of_yaml in IN_YAML.items():
                wrong = re.sub(pythons, of_yaml, wrong)
            lines.append(f"{file}: `{key}` was {given}. {wrong}. {meaning}")
    return "\n".join(line.rstrip() for line in lines)


def _names_a_type(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith(("literal[", "constrained-"))


def model_at(location: tuple[int | str, ...], model: type[BaseModel]) -> type[BaseModel]:
    """The model of the section that a key stands in."""
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        inner = inner_model(model.model_fields[part].annotation)
        if inner is not None:
            model = inner
    return model


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation, of a section that may be left out too; None: a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = inner_model(part)
        if found is not None:
            return found
    return None


def _help(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    names = [part for part in location if isinstance(part, str)]
    fields = model_at(location[: location.index(names[-1])], root).model_fields if names else {}
    field = fields.get(names[-1]) if names else None
    return f"It means: {field.description}" if field is not None and field.description else ""
