"""`p2d artifacts`: what the store keeps, what from, whether it is sound, and what can go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption, artifact, existing_store, size_text
from p2d_core.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

    from p2d_core.store import ArtifactRef, Store
    from p2d_core.store.manifest import Manifest

SHORT = 12

app = typer.Typer(
    no_args_is_help=True,
    help="List, look into, check and clear what earlier runs kept.\n\n"
    "Example: [bold]p2d artifacts ls --stage heads[/bold]",
)

KeyArgument = Annotated[
    str,
    typer.Argument(metavar="KEY", help="Key or its beginning, such as 3fa9, or heads/3fa9."),
]


@app.command()
def ls(
    stage: Annotated[str | None, typer.Option(help="Only artifacts of this stage.")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """List every artifact: stage, key, when it was made, size, seconds, and what from.

    Example: [bold]p2d artifacts ls --stage model[/bold]
    """
    from rich.console import Console

    here = existing_store(store)
    refs = list(here.refs())
    wanted = [ref for ref in refs if stage in (None, ref.stage)]
    if not wanted and stage is not None and refs:
        raise InputError(
            f"no artifact of stage {stage!r} in {here.root}. "
            f"Stages here: {', '.join(sorted({ref.stage for ref in refs}))}."
        )
    if not wanted:
        typer.echo(f"{here.root} holds no artifact yet. `p2d demo` or `p2d adapt FILE` makes some.")
        return
    manifests = [_manifest(ref) for ref in wanted]
    known = {ref.key: ref.stage for ref in refs}
    Console().print(_listing(wanted, manifests, known))
    total = sum(manifest.total_bytes for manifest in manifests if manifest)
    typer.echo(f"{len(wanted)} artifacts, {size_text(total)}, in {here.root}")


@app.command()
def show(key: KeyArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Show one artifact: what it is, what it was made from, and its files.

    Example: [bold]p2d artifacts show heads/3fa9[/bold]
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    here = existing_store(store)
    ref = artifact(here, key)
    manifest = ref.manifest
    console = Console()
    console.print(Text(f"{ref.stage} {ref.key}", "bold"))
    cost = manifest.cost
    facts = {
        "folder": ref.location,
        "made": f"{manifest.made_at} by run {manifest.run_id}",
        "cost": f"{cost.get('wall_seconds', 0):.1f} s, {cost.get('samples', 0):,} samples, "
        f"{cost.get('tokens', 0):,} tokens, on {cost.get('machine') or 'an unknown machine'}",
        "algorithm": f"version {manifest.version}",
        "libraries": ", ".join(f"{name} {v}" for name, v in manifest.libraries.items()),
    }
    about = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        about.add_row(Text(name, "dim"), Text(value, overflow="fold"))
    console.print(about)
    for title, values in (("settings", manifest.settings), ("facts", manifest.facts)):
        if values:
            console.print(Text(f"\n{title}", "bold"))
            _print_values(values)
    console.print(Text("\nmade from", "bold"))
    console.print(_lineage_tree(here, ref))
    console.print(Text("\nfiles", "bold"))
    files = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, entry in manifest.files.items():
        sha = Text(str(entry["sha256"])[:SHORT], "dim")
        files.add_row(Text(name), Text(size_text(entry["size"]), justify="right"), sha)
    console.print(files)


@app.command()
def verify(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="Only this one; all if empty.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Check that every file is as it was made. Exit code 1 if one is not.

    Artifacts, summaries of runs and the note of head maps in use are looked at; what MLflow and
    Prefect keep for themselves is not.

    Example: [bold]p2d artifacts verify[/bold]
    """
    from flows.cli.progress import StageProgress
    from p2d_core.store.in_use import keys_in_use
    from p2d_core.store.runs import read_summary, run_files

    here = existing_store(store)
    refs = [artifact(here, key)] if key is not None else list(here.refs())
    damaged: list[str] = []
    with StageProgress() as progress, progress.stage("verifying") as tell:
        for done, ref in enumerate(refs):
            tell(done, len(refs))
            damaged += [f"{ref.location}: {fault}" for fault in here.faults(ref)]
    for file in run_files(here) if key is None else ():
        try:
            read_summary(file)
        except ArtifactError as error:
            damaged.append(f"{error} No run makes it again: delete it.")
    try:
        keys_in_use(here.root)
    except ArtifactError as error:
        damaged.append(str(error))
    if damaged:
        raise ArtifactError(
            "\n".join(damaged) + "\nWhat is damaged is found and made again by the next run that "
            "needs it: run `p2d adapt` or `p2d demo` as before. To be rid of it now, delete its "
            "folder."
        )
    typer.echo(f"{len(refs)} artifacts checked: every file is as it was made.")


@app.command()
def gc(
    keep: Annotated[
        int,
        typer.Option(
            "--keep", "--keep-runs", min=0, metavar="N", help="Keep what the newest N runs need."
        ),
    ] = 10,
    keep_days: Annotated[
        float,
        typer.Option(
            min=0, metavar="D", help="Also keep what runs that ended in the last D days need."
        ),
    ] = 0.0,
    mlflow: Annotated[
        list[str] | None,
        typer.Option(
            "--mlflow",
            metavar="URI",
            envvar="MLFLOW_TRACKING_URI",
            help="Also keep what models need that are registered there.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Remove leftovers of killed runs, and artifacts that no recent run and no registered model
    needs.

    A registered model keeps its adapter, head map, subset and all that those were made from; a head
    map in use stays too. While a run is in progress, or when MLflow does not answer, nothing is
    removed.

    Example: [bold]p2d artifacts gc --keep 3 --keep-days 30 --dry-run[/bold]
    """
    from flows.killed import between_runs
    from flows.registered import registered_keys
    from p2d_core.store.gc import COMPARISON, remove, unneeded
    from p2d_core.store.runs import run_files

    here = existing_store(store)
    freed = 0
    gone = 0
    with between_runs(here.root):
        registered = registered_keys(here, mlflow or [])
        removals = unneeded(here, keep_runs=keep, keep_days=keep_days, registered=registered)
        for removal in removals if dry_run else remove(removals):
            freed += removal.bytes
            gone += 1
            name = removal.path.relative_to(here.root)
            typer.echo(f"{'would remove' if dry_run else 'removed'} {name}: {removal.why}")
    what = "would be freed" if dry_run else "freed"
    typer.echo(f"{gone} folders, {size_text(freed)} {what} ({freed:,} bytes) in {here.root}")
    if not run_files(here) and not any(here.refs(COMPARISON)) and any(here.refs()):
        typer.echo("No run has ended in this store yet, so every whole artifact stays.")
    if not dry_run and gone < len(removals):
        raise ArtifactError(
            f"{len(removals) - gone} folders could not be removed. Are they yours to write?"
        )


def _manifest(ref: ArtifactRef) -> Manifest | None:
    try:
        return ref.manifest
    except ArtifactError:
        return None


def _listing(
    refs: list[ArtifactRef], manifests: list[Manifest | None], known: dict[str, str]
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("stage", "left"), ("key", "left"), ("made", "left"), ("size", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    for ref, manifest in zip(refs, manifests, strict=True):
        key = ref.key[:SHORT]
        if manifest is None:
            table.add_row(ref.stage, key, Text("manifest damaged: p2d artifacts verify", "red"))
            continue
        table.add_row(
            ref.stage,
            key,
            manifest.made_at[:16].replace("T", " "),
            size_text(manifest.total_bytes),
            f"{manifest.cost.get('wall_seconds', 0):.1f}",
            Text(_made_from(manifest, known), "dim"),
        )
    return table


def _made_from(manifest: Manifest, known: dict[str, str]) -> str:
    """A few words: the source's name, and the artifacts that went in."""
    name = manifest.facts.get("name") or manifest.facts.get("source")
    parts = [str(name)] if name else []
    by_stage: dict[str, list[str]] = {}
    for key in _keys(manifest.inputs):
        if key in known:
            by_stage.setdefault(known[key], []).append(key[:6])
    for stage, keys in by_stage.items():
        parts.append(f"{stage} {keys[0]}" if len(keys) == 1 else f"{len(keys)} {stage}")
    return ", ".join(parts) or ", ".join(manifest.inputs)


def _keys(value: object) -> list[str]:
    from p2d_core.store.store import strings_in

    return list(dict.fromkeys(strings_in(value)))


def _lineage_tree(store: Store, ref: ArtifactRef) -> Tree:
    """What went in, and what went into that; what stands elsewhere in the tree is not repeated."""
    from rich.text import Text
    from rich.tree import Tree

    by_key = {other.key: other for other in store.refs()}
    seen: set[str] = set()

    def label(of: ArtifactRef, role: str = "") -> Text:
        text = Text(f"{role}: " if role else "", "dim")
        text.append(f"{of.stage} {of.key[:SHORT]}")
        if of.key in seen:
            text.append(" (above)", "dim")
        return text

    def grow(tree: Tree, of: ArtifactRef) -> None:
        if of.key in seen:
            return
        seen.add(of.key)
        manifest = _manifest(of)
        if manifest is None:
            tree.add(Text("manifest damaged: p2d artifacts verify", "red"))
            return
        for role, value in manifest.inputs.items():
            keys = _keys(value)
            artifacts = [by_key[key] for key in keys if key in by_key]
            for inner in artifacts:
                grow(tree.add(label(inner, role)), inner)
            if not artifacts and keys:
                tree.add(Text(f"{role}: {_content(value)}", "dim"))

    tree = Tree(label(ref))
    grow(tree, ref)
    return tree


def _content(value: object) -> str:
    """An input that is no artifact of this store: content hashes, shortened."""
    keys = _keys(value)
    shown = ", ".join(key[:SHORT] for key in keys[:3])
    return f"{shown}, ... ({len(keys)})" if len(keys) > 3 else shown


def _print_values(values: object) -> None:
    import yaml

    text = yaml.safe_dump(values, sort_keys=True, allow_unicode=True, width=96)
    lines = text.rstrip().splitlines()
    for line in lines[:40]:
        typer.echo(f"  {line}")
    if len(lines) > 40:
        typer.echo(f"  ... {len(lines) - 40} lines more in manifest.json")
