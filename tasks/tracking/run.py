"""One MLflow run for each adaptation, and one for each arm beside it: siblings of one group."""

from __future__ import annotations

import math
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from p2d_core.errors import ArtifactError
from p2d_core.store import ArtifactRef
from tasks.report.markdown import escaped
from tasks.report.page import Page, user
from tasks.summary import ARMS, Summary
from tasks.tracking.views import GROUP, KIND
from tasks.verdict import ARM_NAMES, gain, percent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

T = TypeVar("T")
Curves = Mapping[str, list[dict[str, float]]]

LONGEST_PARAM = 6000
CURVE_POINTS = 1000
CURVE_KEYS = {"loss": "loss", "learning_rate": "learning_rate", "eval_loss": "held_out_loss"}
"""Of a point of a loss curve, and what MLflow's metrics of them are called."""
BAR = 16
"""Characters of the bar of a run's stages: what a column of the table has room for."""
TERM_CHARACTERS = {"proxy": "░", "heads": "▒", "scores": "▓", "subset": "│", "model": "█"}
ARM_REFS = {"proxy": "head_proxy", "random": "model_random", "full": "model_full"}
"""What was trained in an arm."""


def start(
    client: MlflowClient,
    experiment_id: str,
    page: Page,
    settings: Mapping[str, Any],
    refs: Mapping[str, ArtifactRef],
    tags: Mapping[str, str],
) -> str:
    """Begins the run of an adaptation with its parameters, numbers, curves and tags; its id."""
    from mlflow.entities import Param

    summary = page.summary
    title = f"{summary.name} {summary.run_id}"
    described = common_tags(page) | _tags(page, refs) | dict(tags)
    run_id = client.create_run(experiment_id, run_name=title, tags=described).info.run_id
    try:
        params = [Param(key, value) for key, value in flat(settings).items()]
        for batch in batches(params, 100):
            client.log_batch(run_id, params=batch)
        for batch in batches(_metrics(page, refs.get("model")), 1000):
            client.log_batch(run_id, metrics=batch)
    except BaseException:
        end(client, run_id, "FAILED")
        raise
    return str(run_id)


def end(client: MlflowClient, run_id: str, status: str = "FINISHED") -> None:
    """Ends a run; that it failed is said if that can be."""
    if status == "FINISHED":
        client.set_terminated(run_id, status)
        return
    try:
        client.set_terminated(run_id, status)
    except Exception:  # the failure itself is what has to be told
        return


def write_arms(
    client: MlflowClient,
    experiment_id: str,
    page: Page,
    refs: Mapping[str, ArtifactRef],
    tags: Mapping[str, str],
) -> None:
    """A finished run for each arm but P2D's, with the numbers that charts compare."""
    summary = page.summary
    for arm, name, trained, _, _ in page.arms:
        if arm == "p2d":
            continue
        ref = refs.get(ARM_REFS.get(arm, ""))
        described = common_tags(page) | {KIND: "arm", "arm": name, "trained": trained}
        described |= {f"key.{ref.stage}": ref.key} if ref is not None else {}
        note = f"**{name}** ({trained}), beside {escaped(summary.name)} {summary.run_id}."
        described |= {"mlflow.note.content": note}
        title = f"{name}, {summary.name} {summary.run_id}"
        run = client.create_run(experiment_id, run_name=title, tags=described | dict(tags))
        metrics = _arm_metrics(page, arm, ref)
        for batch in batches(metrics, 1000):
            client.log_batch(run.info.run_id, metrics=batch)
        end(client, run.info.run_id)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted keys, as MLflow takes them; without what is empty."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        key = _safe(name)
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            found |= flat({str(i): part for i, part in enumerate(value)}, f"{prefix}{key}.")
        elif value is not None and value != "" and value != []:
            found[f"{prefix}{key}"] = str(value)[:LONGEST_PARAM]
    return found


def common_tags(page: Page) -> dict[str, str]:
    """Of every run of a group."""
    summary = page.summary
    tags = {
        GROUP: summary.run_id,
        "p2d.run_id": summary.run_id,
        "base_model": summary.base,
        "target": summary.target,
        "mlflow.source.name": "p2d",
        "mlflow.source.type": "LOCAL",
    }
    return tags | ({"mlflow.user": page.user or user()} if page.user or user() else {})


def bar(stages: Mapping[str, float], full_seconds: float) -> str:
    """Seconds by stage as a stacked bar of 16 characters, which are full fine-tuning.

    Where P2D took longer, they are P2D.
    """
    whole = max(full_seconds, sum(stages.values()))
    if whole <= 0:
        return ""
    drawn, done = "", 0.0
    for term, seconds in stages.items():
        done += seconds
        drawn += TERM_CHARACTERS.get(term, "?") * (round(BAR * done / whole) - len(drawn))
    return drawn + "·" * (BAR - len(drawn))


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """Lists of at most so many."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _tags(page: Page, refs: Mapping[str, ArtifactRef]) -> dict[str, str]:
    summary = page.summary
    tags = {
        KIND: "adaptation",
        "arm": ARM_NAMES["p2d"],
        "data": _out_of(summary.selection.selected, summary.selection.corpus),
        "AER parts": bar(summary.aer.stages, summary.aer.full_seconds),
        "reused": page.reused_text,
        "scorer": summary.selection.scorer,
    }
    if (heads := summary.heads) is not None:
        tags |= {"heads": _out_of(heads.selected, heads.total), "ranker": heads.ranker}
    commit = _git("rev-parse", "HEAD")
    if commit:
        changes = _git("status", "--porcelain", "--untracked-files=no")
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
        tags["git_changes"] = "yes" if changes else "no"
    # the rest stands in the report's lineage: a page of tags would hide its note
    named = {name: ref for name, ref in refs.items() if name == ref.stage and name != "evaluation"}
    return tags | {f"key.{name}": ref.key for name, ref in named.items()}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _metrics(page: Page, model: ArtifactRef | None) -> list[Metric]:
    summary = page.summary
    quality, aer, selection = summary.quality, summary.aer, summary.selection
    numbers: dict[str, float | None] = {
        # what the table and the charts show, short enough for their cells
        "quality": _short(quality.p2d),
        "quality before": _short(quality.base),
        "quality gain": _short(gain(quality, "base")),
        "retention": quality.retention.get("p2d"),
        "eval loss": quality.losses.get("p2d"),
        "AER": round(aer.cold, 3),
        "speedup": round(aer.speedup, 2),
    } | _trained(model)
    numbers["parameters"] = summary.trainable.parameters
    numbers |= {f"quality/{arm}": getattr(quality, arm) for arm in ARMS}
    numbers |= {f"retention/{arm}": value for arm, value in quality.retention.items()}
    numbers |= {f"eval_loss/{arm}": value for arm, value in quality.losses.items()}
    for name, values in quality.also.items():
        numbers |= {f"quality/{name}/{arm}": value for arm, value in values.items()}
    numbers |= _further(summary, "p2d")
    numbers |= {
        "aer/cold": aer.cold,
        "aer/this_run": aer.this_run,
        "aer/speedup": aer.speedup,
        "aer/full_seconds": aer.full_seconds,
        "aer/full_spread_seconds": aer.full_spread_seconds,
        "trainable/parameters": summary.trainable.parameters,
        "trainable/learning_rate": summary.trainable.learning_rate or None,
        "trainable/share_of_model": summary.trainable.share_of_model,
        "trainable/share_of_attention": summary.trainable.share_of_attention,
        "selection/selected": selection.selected,
        "selection/corpus": selection.corpus,
        "selection/cut_off": selection.cut_off,
        "samples/rejected": sum(one.rows for one in summary.rejected),
        "seconds": summary.seconds,
    }
    if (heads := summary.heads) is not None:
        numbers |= {"heads/selected": heads.selected, "heads/total": heads.total}
        if (proxy_run := heads.proxy_run) is not None:
            numbers |= {
                "proxy/learning_rate": proxy_run.learning_rate,
                "proxy/held_out_loss_before": proxy_run.held_out_before,
                "proxy/held_out_loss_after": proxy_run.held_out_after,
            }
    numbers |= {f"aer_seconds_cold/{term}": s for term, s in aer.stages.items()}
    numbers |= {f"aer_seconds_this_run/{term}": s for term, s in aer.stages_this_run.items()}
    for what, counts in (("source", selection.by_source), ("label", selection.by_label)):
        safe: Counter[str] = Counter()  # C+ and C# become one name
        for name, n in counts.items():
            safe[_safe(name)] += n
        numbers |= {f"selected_by_{what}/{name}": n for name, n in safe.items()}
    curves = {f"{{}}/{name}": curve for name, curve in page.curves.items()}
    return as_metrics(numbers, curves) + as_metrics(
        {}, {"training {}": page.curves.get("model", [])}
    )


def _arm_metrics(page: Page, arm: str, ref: ArtifactRef | None) -> list[Metric]:
    quality = page.summary.quality
    numbers: dict[str, float | None] = {
        "quality": _short(getattr(quality, arm)),
        "retention": quality.retention.get(arm),
        "eval loss": quality.losses.get(arm),
    } | _further(page.summary, arm)
    if ref is None:
        return as_metrics(numbers | ({"parameters": 0} if arm == "base" else {}), {})
    curves = {"training {}": page.curves.get(ARM_REFS[arm], [])}
    return as_metrics(numbers | _trained(ref), curves)


def _trained(model: ArtifactRef | None) -> dict[str, float | None]:
    """What one training moved and took; a search for its rate, which arms share, is not in it."""
    try:
        manifest = model.manifest if model is not None else None
    except ArtifactError:
        manifest = None
    if manifest is None:
        return {}
    seconds = manifest.facts.get("training_seconds", manifest.cost.get("wall_seconds"))
    return {"parameters": manifest.facts.get("trainable"), "training seconds": seconds}


def _further(summary: Summary, arm: str) -> dict[str, float | None]:
    """An arm's own further metrics and results of lm-eval: the same names in every run."""
    numbers = {
        f"quality/{name}": values.get(arm) for name, values in summary.quality.also.items()
    }  # fmt: skip
    for line in summary.harness:
        name = "/".join(_safe(part) for part in (line.task, *line.metric.split("/")))
        numbers |= {f"harness/{name}": line.value.get(arm)}
        numbers |= {f"harness/{name}_stderr": line.stderr.get(arm)}
    return numbers


def as_metrics(numbers: Mapping[str, float | None], curves: Curves) -> list[Metric]:
    """Numbers that are there and finite; of a curve (its name has ``{}``) at most 1,000 points."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(key, float(value), now, 0)
        for key, value in numbers.items()
        if value is not None and math.isfinite(value)
    ]
    for name, curve in curves.items():
        every = -(-len(curve) // CURVE_POINTS) or 1
        for point in curve[::every]:
            # eval_loss/<arm> is of the evaluation samples
            for key, called in CURVE_KEYS.items():
                value = point.get(key)
                if value is not None and math.isfinite(value):
                    metrics.append(Metric(name.format(called), value, now, int(point["step"])))
    return metrics


def _short(value: float) -> float:
    """Four significant digits: what a cell of MLflow's table shows without being cut."""
    return float(f"{value:.4g}")


def _out_of(part: int, whole: int) -> str:
    return f"{part:,}/{whole:,} ({percent(part, whole)})"


def _safe(name: str) -> str:
    """As MLflow wants a part of the name of a parameter or metric; no way up a folder."""
    safe = "".join(c if c.isalnum() or c in "_-. " else "_" for c in name)[:200]
    return safe if set(safe) - {"."} else "_" * max(1, len(safe))
