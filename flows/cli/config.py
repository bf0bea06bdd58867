"""`p2d config`: every setting with its default and what it means, as YAML to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from flows.cli.commented import entry, yaml_value
from flows.cli.plugins import Kind, described
from flows.presets import PRESETS, Preset
from p2d_core.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

HEAD = """\
# Settings of one run. Fill in base and target, then:
#
#     p2d adapt {file}
#
# Everything else may be left as it is, or left out: the values below are those of the preset
# {preset}. Paths are relative to this file. What is empty is found, or left out, as its comment
# says.
"""
PLACEHOLDERS = {"base": "path/to/model", "path": "path/to/target.jsonl"}
EXAMPLES = {
    "corpus.sources": [
        "# sources:",
        "# - path: path/to/candidates.parquet",
        "#   name: candidates",
    ],
    "evaluation.source": ["#   path: path/to/test.jsonl"],
    "evaluation.retention": ["#   path: path/to/old_skills.jsonl"],
    "evaluation.harness": [
        "#   tasks: [my_task]",
        "#   include_path: path/to/task_files",
        "#   limit: 200",
        "#   num_fewshot: 0",
        "#   arms: [base, p2d]",
    ],
}
PLAIN = ("> 0", ">= 0", ">= 1")
"""Bounds that go without saying."""


def config(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write there; it must not exist yet."),
    ] = None,
    preset: Annotated[
        Preset,
        typer.Option(
            help="Values that were best in the demo (default), those of the papers (paper), "
            "or without what a run is held against (cheap); the reasons are in docs/evidence.md."
        ),
    ] = "default",
    list_: Annotated[
        Kind | None,
        typer.Option(
            "--list",
            help="List the plug-ins of a kind instead: what each is and costs, its options.",
        ),
    ] = None,
) -> None:
    """Print all settings with their values and meanings, as a YAML file to start from.

    Example: [bold]p2d config -o my.yaml[/bold]; which scorers are there, and
    what do they cost? [bold]p2d config --list scorers[/bold]
    """
    if list_ is not None:
        typer.echo("\n".join(described(list_)))
        return
    if output is None:
        typer.echo(commented_yaml("my.yaml", preset), nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as stream:
            stream.write(commented_yaml(output.name, preset))
    except FileExistsError:
        raise InputError(
            f"{output} is there already and stays as it is. Give another name to -o."
        ) from None
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}.") from error
    typer.echo(f"Wrote {output}. Fill in base and target, then: p2d adapt {output}")


def commented_yaml(file: str, preset: Preset = "default") -> str:
    """Loads again as it is; ``file`` stands in the command at its head."""
    from flows.settings import RunSettings

    head = HEAD.format(file=file, preset=preset)
    meant = {"preset": preset, **PRESETS[preset]}
    return "\n".join([head, *_lines(RunSettings, meant, "", "")]) + "\n"


def _lines(
    model: type[BaseModel], meant: Mapping[str, Any], indent: str, path: str
) -> Iterator[str]:
    after_section = False
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if not indent and after_section and inner is None:
            yield ""
        after_section = inner is not None
        if inner is not None:
            if not indent:
                yield ""
            meaning = field.description or (inner.__doc__ or "").strip()
            yield f"{indent}# {meaning}"
            yield f"{indent}{name}:"
            yield from _lines(inner, meant.get(name, {}), indent + "  ", f"{path}{name}.")
        else:
            yield from _entry(name, field, meant, indent)
            yield from (f"{indent}{line}" for line in EXAMPLES.get(path + name, []))


def _entry(name: str, field: FieldInfo, meant: Mapping[str, Any], indent: str) -> list[str]:
    value = yaml_value(meant[name]) if name in meant else _default(name, field)
    meaning = " ".join(part for part in (field.description or "", _bounds(field)) if part)
    return entry(name, value, meaning, indent)


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return PLACEHOLDERS[name]
    return yaml_value(field.get_default(call_default_factory=True))


def _bounds(field: FieldInfo) -> str:
    from annotated_types import Ge, Gt, Le, Lt

    choices = [str(value) for value in get_args(field.annotation)] if _is_choice(field) else []
    if choices and choices[0] not in (field.description or ""):
        return f"One of: {', '.join(choices)}."
    signs = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
    limits = [
        f"{sign} {getattr(limit, name)}"
        for kind, (sign, name) in signs.items()
        for limit in field.metadata
        if isinstance(limit, kind)
    ]
    text = " and ".join(limits)
    return f"({text})" if text and text not in PLAIN else ""


def _is_choice(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a section; None for a value, and for a section that may be left out."""
    from pydantic import BaseModel

    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_model else None
