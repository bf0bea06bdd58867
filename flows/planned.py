"""Plans as they are kept in the store: by the settings and inputs that they are for."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from pydantic import ValidationError

from flows.inputs import Inputs
from flows.settings import RunSettings
from p2d_core.store.recipe import canonical_json
from tasks.planned import Plan

log = logging.getLogger(__name__)

PLANS = "plans"
"""Folder below that of the runs' summaries."""
LEFT_OUT = {"name", "tracking", "compare", "base", "target"}
"""What costs nothing, and paths: what lies there is in the key by its content."""


def plan_key(settings: RunSettings, inputs: Inputs, head_map: str | None) -> str:
    """SHA-256 (hex) of all that can change what a run takes, the machine and the store apart.

    Args:
        head_map: key of the head map that the run is given.
    """
    values = settings.model_dump(mode="json", exclude=LEFT_OUT)
    values["corpus"].pop("sources")
    for name in ("source", "retention"):
        values["evaluation"].pop(name)
    if inputs.harness is not None:
        values["evaluation"]["harness"] |= inputs.harness.identity | {"include_path": None}
    sources = [inputs.target, inputs.evaluation, inputs.retention, *inputs.corpus]
    identities = [each.identity if each is not None else None for each in sources]
    whole = [values, inputs.base.identity, identities, head_map]
    return hashlib.sha256(canonical_json(whole).encode()).hexdigest()


def keep_plan(store: Path, plan: Plan) -> Path:
    """Writes it; it appears whole."""
    file = _file(store, plan.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return file.with_suffix(".tmp").replace(file)


def kept_plan(
    store: Path, settings: RunSettings, inputs: Inputs, head_map: str | None
) -> Plan | None:
    """The plan that was made for such a run, if there is one."""
    file = _file(store, plan_key(settings, inputs, head_map))
    try:
        return Plan.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        log.warning("the plan %s cannot be read and is left out: %s", file, error)
        return None


def _file(store: Path, key: str) -> Path:
    return store / "runs" / PLANS / f"{key}.json"
