"""What rankers, scorers, adaptations and metrics there are, and the settings of each."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from typing import Any, Literal

from flows.cli.commented import comment, entry, yaml_value

Kind = Literal["scorers", "rankers", "adaptations", "metrics"]
REGISTRIES = {
    "scorers": ("p2d_core.affinity", "scoring: {scorer: NAME, options: {...}}"),
    "rankers": ("p2d_core.heads.ranking", "heads: {ranker: NAME, options: {...}}"),
    "adaptations": (
        "p2d_core.adaptation.adaptations",
        "training: {adaptation: NAME, options: {...}}",
    ),
    "metrics": ("p2d_core.evaluation", "evaluation: {metric: NAME}"),
}
"""Kind -> the module of its registry, and where the settings name one."""
OF_COST_OR_SOURCE = re.compile(r"(Costs|Runs no model|Source:) .*")
"""From there on a paragraph says it."""


def described(kind: Kind) -> Iterator[str]:
    """Lines of YAML: every plug-in of a kind, what it is, and its options with their defaults."""
    module, place = REGISTRIES[kind]
    registry = getattr(import_module(module), kind)
    yield f"# In the settings:  {place}"
    for name in registry:
        plugin = registry.get(name)
        yield ""
        yield f"{name}:"
        yield from comment(_meaning(plugin), "  ")
        options = [each for each in fields(plugin) if each.init] if is_dataclass(plugin) else []
        if options:
            yield "  options:"
        meanings = _meanings(plugin) if options else {}
        for option in options:
            meaning = meanings.get(option.name, "")
            yield from entry(option.name, yaml_value(_default(option)), meaning, "    ")


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return None if option.default is MISSING else option.default


def _meaning(plugin: Any) -> str:
    """The first paragraph of its docstring, and what others say of its cost and its source."""
    first, *others = (
        " ".join(each.split()) for each in (inspect.getdoc(plugin) or "").split("\n\n")
    )
    told = [found.group() for each in others if (found := OF_COST_OR_SOURCE.search(each))]
    return " ".join([first, *told])


def _meanings(plugin: Any) -> dict[str, str]:
    """The string that stands below each field of a dataclass."""
    found: dict[str, str] = {}
    for owner in reversed(inspect.getmro(plugin)):
        if not is_dataclass(owner):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found
