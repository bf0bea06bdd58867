"""Bad head maps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tests.faults.bad.job import Bad, Job
from tests.small_store import put


def head_rows() -> list[dict[str, Any]]:
    """A right head map of the demo's base: 4 layers of 8 heads."""
    config = json.loads((BASE_FOLDER / "config.json").read_text())
    n_layers, n_heads = config["num_hidden_layers"], config["num_attention_heads"]
    n_groups = config["num_key_value_heads"]
    count = n_layers * n_heads
    return [
        {
            "layer": i // n_heads,
            "head": i % n_heads,
            "kv_group": i % n_heads // (n_heads // n_groups),
            "score": float(count - i),
            "rank": i + 1,
            "is_task_head": i < 3,
        }
        for i in range(count)
    ]


def _rows(change: Callable[[list[dict[str, Any]], random.Random], Any]) -> Any:
    def made(rng: random.Random) -> pa.Table:
        rows = head_rows()
        return pa.Table.from_pylist(change(rows, rng) or rows)

    return made


def _one(**values: Any) -> Any:
    def change(rows: list[dict[str, Any]], rng: random.Random) -> None:
        rows[rng.randrange(len(rows))].update(values)

    return _rows(change)


def _all(**values: Any) -> Any:
    return _rows(lambda rows, rng: [row | values for row in rows])


BAD_MAPS: dict[str, Callable[[random.Random], pa.Table | str]] = {
    "a head twice": _rows(lambda rows, rng: [*rows, rng.choice(rows)]),
    "all heads twice": _rows(lambda rows, rng: rows * 2),
    "a head missing": _rows(lambda rows, rng: rows.pop(rng.randrange(len(rows))) and None),
    "a layer missing": _rows(lambda rows, rng: [row for row in rows if row["layer"] != 1]),
    "a layer too much": _rows(
        lambda rows, rng: rows
        + [
            {**row, "layer": 99, "rank": 99 + i, "score": -float(i), "is_task_head": False}
            for i, row in enumerate(rows[:4])
        ]
    ),
    "a layer out of range": _one(layer=10**6),
    "a head out of range": _one(head=2**31 - 1),
    "a layer below zero": _one(layer=-1),
    "a head below zero": _one(head=-7),
    "a group below zero": _one(kv_group=-1),
    "a group of others": _one(kv_group=77),
    "a layer beyond 32 bits": _one(layer=2**40),
    "a score that is NaN": _one(score=float("nan")),
    "an infinite score": _one(score=float("inf")),
    "a score that is null": _one(score=None),
    "a score that is a text": _all(score="high"),
    "a rank twice": _all(rank=1),
    "a rank of zero": _one(rank=0),
    "no task head": _all(is_task_head=False),
    "task heads that are null": _all(is_task_head=None),
    "task heads as numbers": _all(is_task_head=7.5),
    "no rows": lambda rng: pa.Table.from_pylist(head_rows()).slice(0, 0),
    "no columns of heads": lambda rng: pa.table({"a": [1]}),
    "no scores": _rows(lambda rows, rng: [row.pop("score") and None for row in rows] and rows),
    "no Parquet": lambda rng: "layer,head\n0,1\n",
    "an empty file": lambda rng: "",
    "half the layers": _rows(lambda rows, rng: rows[: len(rows) // 2]),
    "half the heads": _rows(
        lambda rows, rng: [
            {**row, "rank": i + 1}
            for i, row in enumerate(r for r in rows if r["head"] < 4 and r["kv_group"] < 2)
        ]
    ),
    "another number of groups": _rows(
        lambda rows, rng: [{**row, "kv_group": 0} for row in rows]
    ),
}  # fmt: skip


def base_hash() -> str:
    from p2d_core.models import model_hash

    return model_hash(BASE_FOLDER)


def put_map(job: Job, table: pa.Table | str, base: Any = None) -> Any:
    """An artifact that is whole, whatever the map in it."""
    inputs = {"base": {"sha256": base_hash()}} if base is None else base
    return put(Store(job.store), "heads", {"heads.parquet": table}, inputs=inputs)


def _damage(change: Callable[[Any], None]) -> Callable[[Job, random.Random], None]:
    def breaks(job: Job, rng: random.Random) -> None:
        ref = put_map(job, pa.Table.from_pylist(head_rows()))
        change(ref)
        job.words = ["--head-map", ref.key[:16]]

    return breaks


def _linked(ref: Any) -> None:
    outside = ref.path.parents[2] / "outside.parquet"
    (ref.path / "heads.parquet").rename(outside)
    (ref.path / "heads.parquet").symlink_to(outside)


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    def damage(ref: Any) -> None:
        values = json.loads((ref.path / "manifest.json").read_text())
        (ref.path / "manifest.json").write_text(json.dumps(change(values) or values))

    return damage


def head_maps() -> Iterator[Bad]:
    for name, made in BAD_MAPS.items():
        for draw in range(2):

            def breaks(job: Job, rng: random.Random, made: Any = made) -> None:
                ref = put_map(job, made(rng))
                job.words = ["--head-map", str(ref.path)]

            yield Bad(f"head map: {name} ({draw})", breaks, "head")
    for name, base in {
        "of another model": {"base": {"sha256": "f" * 64}},
        "of no model": {"proxy": "f" * 64},
        "of a model without a hash": {"base": {}},
        "of a model that is a list": {"base": ["f" * 64]},
    }.items():

        def other(job: Job, rng: random.Random, base: Any = base) -> None:
            ref = put_map(job, pa.Table.from_pylist(head_rows()), base)
            job.words = ["--head-map", ref.key]

        yield Bad(f"head map: {name}", other, "head map")
    for name, change in {
        "cut": lambda ref: (ref.path / "heads.parquet").write_bytes(b"PAR1"),
        "gone": lambda ref: (ref.path / "heads.parquet").unlink(),
        "a link out of the store": _linked,
        "its manifest is a list": lambda ref: (ref.path / "manifest.json").write_text("[]"),
        "its manifest is cut": lambda ref: (ref.path / "manifest.json").write_text('{"key": "'),
        "its manifest has no files": _manifest(lambda values: values.pop("files") and None),
        "its manifest names files outside": _manifest(
            lambda values: values["files"].update({"../../x": {"size": 1, "sha256": "0"}})
        ),
        "its manifest names an absolute file": _manifest(
            lambda values: values["files"].update({"/etc/passwd": {"size": 1, "sha256": "0"}})
        ),
        "its manifest has another key": _manifest(lambda values: values.update(key="0" * 64)),
    }.items():
        yield Bad(f"head map: {name}", _damage(change), "head map")
    for given in (
        "nope", "../../../etc/passwd", "/etc/passwd", "/", ".", "..", "", "heads", "heads/",
        "*", "heads/../../x", "a" * 5000, "0" * 64, "\x1b[31m", "~nobody/x", "a\nb", "%s", "{}",
    ):  # fmt: skip

        def named(job: Job, rng: random.Random, given: str = given) -> None:
            put_map(job, pa.Table.from_pylist(head_rows()))
            put_map(job, pa.Table.from_pylist(head_rows()), {"base": {"sha256": "0"}})
            job.words = ["--head-map", given]

        yield Bad(f"head map: called {given[:30]!r}", named, "artifact")
