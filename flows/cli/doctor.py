"""`p2d doctor`: whether what is installed, the machine, the store and a model can do the job."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption, size_text
from p2d_core.errors import P2DError, UnsupportedModelError

if TYPE_CHECKING:
    from p2d_core.attention.layout import AttentionLayer

NEEDED = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "prefect",
    "mlflow",
    "duckdb",
    "pyarrow",
    "safetensors",
    "scikit-learn",
)
PORTS = {4200: "Prefect's server", 5000: "MLflow's UI"}
LITTLE_MEMORY = 2e9
LITTLE_DISK = 2e9


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and the cure where one is needed."""

    what: str
    found: str
    cure: str = ""
    fatal: bool = False
    """Something cannot work at all; with a cure that is not fatal it is a warning."""


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="Also say what is recognised in this model, and where; hf://OWNER/NAME is downloaded.",
    ),
]


def doctor(store: StoreOption = DEFAULT_STORE, model: ModelOption = None) -> None:
    """Check the installation, the machine and the store. Exit code 1 if something cannot work.

    Example: [bold]p2d doctor --model models/my-model[/bold]
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = list(examine(store))
    if model is not None:
        findings += examine_model(model)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text("ok", "green")
        if finding.cure:
            mark = Text("FAILS", "bold red") if finding.fatal else Text("warning", "yellow")
        said = Text(finding.found)
        if finding.cure:
            said.append(f"\n-> {finding.cure}", "bold")
        table.add_row(mark, Text(finding.what), said)
    console = Console()
    console.print(table)
    fatal = sum(finding.fatal for finding in findings)
    warnings = sum(bool(finding.cure) for finding in findings) - fatal
    if fatal:
        console.print(f"{fatal} cannot work, {warnings} warnings.", style="bold red")
        raise typer.Exit(1)
    console.print(f"Everything can work; {warnings} warnings." if warnings else "All is well.")


def examine(store: Path) -> Iterator[Finding]:
    """Every finding, in order; nothing is changed and no server asked."""
    yield _python()
    for name in NEEDED:
        yield _installed(name)
    if (ray := _version("ray")) is not None:
        yield Finding("ray", f"{ray} (for engine: ray)")
    yield from known_conflicts(_version)
    yield from _device()
    yield from _memory()
    yield from _store(store)
    yield _killed(store)
    yield from _ports()
    yield from _hub()


def examine_model(base: str | Path) -> Iterator[Finding]:
    """What is recognised in a model: heads, and where their slices are. No weights are loaded."""
    from flows.hub import base_folder
    from p2d_core.attention.layout import attention_layers
    from p2d_core.models import check_model_folder, without_weights

    try:
        folder, _ = base_folder(str(base))
        check_model_folder(folder)
        model = without_weights(folder)
        layers = attention_layers(model)
    except UnsupportedModelError as error:
        yield Finding("model", str(error), "Take another base: docs/families.md.", fatal=True)
        return
    except P2DError as error:
        cure = "Give --model a folder as transformers saves one, or hf://OWNER/NAME."
        yield Finding("model", str(error), cure, fatal=True)
        return
    first = layers[0]
    yield Finding("model", f"{base} ({type(model).__name__})")
    yield Finding(
        "heads",
        f"{len(layers)} layers of {first.n_query_heads} query heads of {first.head_dim}, in "
        f"{first.n_kv_groups} KV group{'s' if first.n_kv_groups != 1 else ''}",
    )
    for role in first.roles:
        yield Finding(f"  {role}", _where(layers, role))
    if first.shares_norm:
        yield Finding(
            "  norm",
            "q or k are normalised over all heads together: a head's q and k slices also change "
            "the scale of the other heads' q and k",
        )
    if model.config._attn_implementation == "eager":
        yield Finding(
            "attention",
            "eager: SDPA does not compute this family's attention (soft-capping, sinks, biases), "
            "so that it is slower and its memory grows with the square of the tokens",
        )
    else:
        yield Finding("attention", str(model.config._attn_implementation))


def _where(layers: Sequence[AttentionLayer], role: str) -> str:
    """Such as ``model.layers.*.self_attn.q_proj: rows 0-7, 8-15, ..., 56-63; separate``."""
    first, last = layers[0], layers[-1]
    where = first.roles[role]
    path = ".".join(
        one if one == other else f"{one}..{other}"
        for one, other in zip(
            where.module.split("."), last.roles[role].module.split("."), strict=True
        )
    )
    each = [f"{start}-{start + first.head_dim - 1}" for start in where.starts]
    places = ", ".join(each if len(each) <= 4 else [*each[:2], "...", each[-1]])
    beside = [r for r, of in first.roles.items() if of.module == where.module and r != role]
    kept = f"fused with {' and '.join(beside)}" if beside else "separate"
    return f"{path}: {'rows' if where.dim == 0 else 'columns'} {places}; {kept}"


def known_conflicts(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Versions that are known not to work with Prefect 3.8."""
    limits = {
        "fastapi": ((0, 151), "0.151", "Prefect's own calls are refused, or no flow starts"),
        "sqlalchemy": ((2, 1), "2.1", "Prefect's scheduled runs never appear"),
    }
    for name, (limit, text, what_fails) in limits.items():
        found = version_of(name)
        if found is None:
            yield Finding(name, "not installed", f"pip install '{name}<{text}'", fatal=True)
        elif _numbers(found) >= limit:
            yield Finding(
                name, f"{found}: {what_fails}", f"pip install '{name}<{text}'", fatal=True
            )
        else:
            yield Finding(name, f"{found} (below {text}, as Prefect 3.8 needs)")


def _numbers(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", found)


def _installed(name: str) -> Finding:
    found = _version(name)
    if found is None:
        cure = "make demo installs it, or: pip install -c constraints.txt -e ."
        return Finding(name, "not installed", cure, fatal=True)
    return Finding(name, found)


def _device() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("device", f"torch cannot be loaded: {error}", "Install it anew.", fatal=True)
        return
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name(0)
        yield Finding("device", f"{name}, {size_text(free)} of {size_text(total)} free")
    elif torch.backends.mps.is_available():
        yield Finding("device", "mps (Apple GPU)")
    else:
        yield Finding("device", "cpu (no GPU seen; the demo needs none)")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads > cores:
        cure = f"Set `threads: {cores}`, or OMP_NUM_THREADS={cores}: more slows it down."
        yield Finding("threads", f"{threads} on {cores} cores", cure)
    else:
        yield Finding("threads", f"{threads} of torch, {cores} cores")


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{size_text(memory.available)} of {size_text(memory.total)} free"
    cure = (
        "Close other programs, or take a smaller base." if memory.available < LITTLE_MEMORY else ""
    )
    yield Finding("memory", found, cure)


def _store(store: Path) -> Iterator[Finding]:
    folder = store.resolve()
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        cure = "Name a folder with --store or P2D_STORE."
        yield Finding("store", f"{there} is no folder", cure, fatal=True)
        return
    if not os.access(there, os.W_OK | os.X_OK):
        cure = "Make it writable, or name another with --store or P2D_STORE."
        yield Finding("store", f"{there} cannot be written", cure, fatal=True)
    elif there != folder:
        yield Finding("store", f"{folder} (not there yet; will be made)")
    else:
        from p2d_core.store import Store
        from p2d_core.store.gc import bytes_of

        here = Store(folder)
        found = f"{folder}: {sum(1 for _ in here.refs())} artifacts, {size_text(bytes_of(folder))}"
        leftovers = len(here.leftovers())
        cure = f"{leftovers} leftovers: `p2d artifacts gc` removes them." if leftovers else ""
        yield Finding("store", found, cure)
    free = shutil.disk_usage(there).free
    cure = "Make room, or: p2d artifacts gc --keep 3" if free < LITTLE_DISK else ""
    yield Finding("disk", f"{size_text(free)} free at {there}", cure)


def _killed(store: Path) -> Finding:
    from flows.killed import killed_runs, orphaned_servers

    runs, servers = len(killed_runs(store)), len(orphaned_servers(store))
    if not runs and not servers:
        return Finding("killed runs", "nothing left of any")
    found = f"{runs} that Prefect shows as running, {servers} of its temporary servers still there"
    return Finding("killed runs", found, "The next run over this store puts both right.")


def _hub() -> Iterator[Finding]:
    """Which hub is asked, and as whom; the token is not read, and the hub not asked."""
    from p2d_core.hub import DEFAULT_ENDPOINT, endpoint, is_offline, token_place

    place = token_place()
    found = f"there is one ({place})" if place else "none: public models and datasets only"
    yield Finding("hub token", found)
    if endpoint() != DEFAULT_ENDPOINT:
        yield Finding("hub", f"{endpoint()} (HF_ENDPOINT)")
    if is_offline():
        yield Finding("hub offline", "HF_HUB_OFFLINE is set: only what is in its cache is used")


def _ports() -> Iterator[Finding]:
    from flows.cli.ui import is_free

    for port, whose in PORTS.items():
        if is_free(port):
            yield Finding(f"port {port}", f"free ({whose})")
        else:
            cure = {
                4200: "Only a Prefect server of your own needs it: is that it already?",
                5000: "`p2d ui` takes another by itself.",
            }[port]
            yield Finding(f"port {port}", f"busy ({whose})", cure)
