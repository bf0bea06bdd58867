"""How far head rankings agree from one draw of the proxy set to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from prefect import flow

from flows.hub import pinned
from flows.inputs import Inputs, check_inputs, make_runtime
from flows.launch import ranked_bases, run_of, started
from flows.ledger import Ledger
from flows.settings import RunSettings
from flows.stages import Run, draws_of, rank_on, read_target
from p2d_core.errors import InputError
from p2d_core.heads.draws import Agreement, agreement
from p2d_core.heads.head_map import HeadPick
from p2d_core.heads.ranking import rankers
from p2d_core.store import Store
from tasks.heads import head_map_in
from tasks.samples import target_part
from tasks.stage import BaseModel, Plugin

SHARES = (0.05, 0.1, 0.2, 0.5)
"""Of the heads, that are compared beside the settings' own choice."""


@dataclass(frozen=True)
class Stability:
    """What came of a comparison of draws."""

    name: str
    draws: int
    proxy_samples: int
    shared_samples: float
    """Share of the proxy samples that two draws have in common; the mean over pairs."""
    task_heads: int
    """As the settings pick them."""
    total_heads: int
    rankers: dict[str, Agreement]
    """``top[0]`` of each compares the task heads as the settings pick them."""
    maps: dict[str, list[str]]
    """The head maps' folders, one a draw."""

    def as_json(self) -> dict[str, Any]:
        """Plain values; the keys are the fields' names."""
        return asdict(self)


def run_stability(
    settings: RunSettings, *, store: Path, draws: int, names: Sequence[str] = ()
) -> Stability:
    """Checks all input, then ranks the heads on every draw.

    Args:
        names: of the rankers; that of the settings, with its options, if empty.

    Raises:
        InputError: before anything was started.
    """
    if draws < 2:
        raise InputError(f"--draws is {draws}; it takes at least 2 draws to compare.")
    plugins = [_plugin(settings, name) for name in dict.fromkeys(names or [settings.heads.ranker])]
    several = settings.heads.model_copy(update={"average_over": draws})
    settings = pinned(settings.model_copy(update={"heads": several}))
    inputs = check_inputs(settings, ranked_bases(Store(store)))
    named = stability.with_options(flow_run_name=f"{settings.name} stability")

    def run() -> Stability:
        return named(settings, str(store.resolve()), plugins)

    return started(settings, inputs.base, inputs, store, run)


def _plugin(settings: RunSettings, name: str) -> Plugin:
    options = settings.heads.options if name == settings.heads.ranker else {}
    return Plugin.of(name, rankers.make(name, options, seed=settings.seed))


@flow(name="heads-stability", persist_result=False, validate_parameters=False)
def stability(settings: RunSettings, store: str, plugins: list[Plugin]) -> Stability:
    """Ranks the heads on draws of the proxy set, ``heads.average_over`` of them, and compares."""

    def check(given: RunSettings) -> tuple[Inputs, BaseModel]:
        inputs = check_inputs(given, ranked_bases(Store(Path(store))))
        return inputs, inputs.base

    with run_of(settings, Path(store), check) as begun:
        run_id, runtime = begun.run_id, make_runtime(settings, Path(store), begun.run_id)
        done = on_draws(Run(begun.settings, begun.checked, runtime, Ledger(run_id)), plugins)
        begun.finished.append(done)
        return done


def on_draws(run: Run, plugins: Sequence[Plugin]) -> Stability:
    """The work, within a flow."""
    settings = run.settings
    with run.ledger.stage("samples") as made:
        target, _ = read_target(run, [])
        made.append(target)
    targets = draws_of(run, target, settings.heads.average_over)
    found: dict[str, Agreement] = {}
    folders: dict[str, list[str]] = {}
    for plugin in plugins:
        refs = [rank_on(run, each, plugin) for each in targets]
        maps = [head_map_in(ref) for ref in refs]
        tops = [[set(each.task_heads) for each in maps]]
        for share in SHARES:
            picked = [HeadPick(share).of(each.scores, each.n_kv_groups) for each in maps]
            tops.append([set(each.task_heads) for each in picked])
        found[plugin.name] = agreement([each.scores for each in maps], tops)
        folders[plugin.name] = [ref.location for ref in refs]
    samples = [{s.sample_id for s in target_part(each, "proxy")} for each in targets]
    shared = [len(a & b) / len(a) for a, b in combinations(samples, 2)]
    return Stability(
        name=settings.name,
        draws=len(targets),
        proxy_samples=settings.proxy.samples,
        shared_samples=sum(shared) / len(shared),
        task_heads=len(maps[0].task_heads),
        total_heads=maps[0].scores.numel(),
        rankers=found,
        maps=folders,
    )
