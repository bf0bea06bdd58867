"""A small store of real artifacts, made through `Store.produce`, and a run's summary over them."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from p2d_core.heads.head_map import HeadMap
from p2d_core.heads.picture import draw
from p2d_core.samples.schema import Sample, sample_id_of, to_table
from p2d_core.store import ArtifactRef, Making, Recipe, Store
from p2d_core.store.runs import keep_summary
from tasks.summary import Summary

N_SAMPLES = 40
N_CHOSEN = 4


def put(
    store: Store,
    stage: str,
    files: dict[str, pa.Table | str | bytes],
    *,
    inputs: dict[str, Any] | None = None,
    run_id: str = "run-1",
    facts: dict[str, Any] | None = None,
    **settings: Any,
) -> ArtifactRef:
    """An artifact of that stage with these files."""
    return store.produce(
        Recipe(stage, "1", settings, inputs or {}), writing(files, facts or {}), run_id=run_id
    )


def writing(
    files: dict[str, pa.Table | str | bytes], facts: dict[str, Any]
) -> Callable[[Making], None]:
    """A build step that writes the files."""

    def build(making: Making) -> None:
        for name, content in files.items():
            file = making.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                file.write_text(content, encoding="utf-8")
            elif isinstance(content, bytes):
                file.write_bytes(content)
            else:
                pq.write_table(content, file)
        making.facts |= facts
        making.samples = 3

    return build


def head_map() -> HeadMap:
    """Two layers of two heads; (0, 1) is the task head."""
    return HeadMap.from_scores(torch.tensor([[0.1, 0.4], [0.2, 0.3]]), 1, 0.25)


@functools.cache
def head_picture() -> bytes:
    """Its PNG."""
    with tempfile.TemporaryDirectory() as folder:
        draw(head_map(), Path(folder) / "heads.png", "spad")
        return (Path(folder) / "heads.png").read_bytes()


def samples() -> list[Sample]:
    """Forty, of two sources."""
    made = []
    for row in range(N_SAMPLES):
        prompt, response = f"what is {row} + 1?", str(row + 1)
        source = "sums" if row % 4 else "talk"
        made.append(Sample(sample_id_of(prompt, response), source, prompt, response, row))
    return made


def fill(store: Store, *, run_id: str = "run-1") -> dict[str, ArtifactRef]:
    """What a run leaves, in small: from samples to an adapter and its evaluation."""
    corpus = samples()
    ids = [sample.sample_id for sample in corpus]
    refs = {}
    refs["samples"] = put(
        store, "samples", {"part/0.parquet": to_table(corpus)}, run_id=run_id, source="sums.jsonl"
    )
    refs["proxy"] = put(
        store,
        "proxy",
        {"loss.json": curve(3.0)},
        inputs={"target": refs["samples"].key},
        run_id=run_id,
    )
    refs["heads"] = put(
        store,
        "heads",
        {"heads.parquet": head_map().to_table(), "heads.png": head_picture()},
        inputs={"proxy": refs["proxy"].key},
        run_id=run_id,
    )
    refs["measurements"] = put(
        store,
        "measurements",
        {"measured.parquet": pa.table({"sample_id": ids, "loss": [0.5] * N_SAMPLES})},
        inputs={"shard": "a" * 64, "heads": refs["heads"].key},
        run_id=run_id,
    )
    scores = pa.table(
        {
            "sample_id": ids,
            "source": [sample.source for sample in corpus],
            "affinity": [row / N_SAMPLES for row in range(N_SAMPLES)],
            "n_tokens": pa.array([9] * N_SAMPLES, pa.int32()),
            "n_response_tokens": pa.array([2] * N_SAMPLES, pa.int32()),
        }
    )
    refs["scores"] = put(
        store,
        "scores",
        {"scores.parquet": scores},
        inputs={"measurements": [refs["measurements"].key]},
        run_id=run_id,
    )
    first = N_SAMPLES - N_CHOSEN
    chosen = (
        to_table(corpus)
        .slice(first)
        .append_column("affinity", scores["affinity"].slice(first).combine_chunks())
        .append_column("chosen_by", pa.array(["affinity"] * (N_CHOSEN - 1) + ["replay"]))
    )
    refs["subset"] = put(
        store,
        "subset",
        {"subset.parquet": chosen},
        inputs={"scores": refs["scores"].key, "corpus": refs["samples"].key},
        run_id=run_id,
        facts={"cut_off": 0.9},
    )
    refs["model"] = put(
        store,
        "model",
        {
            "adapter/adapter_config.json": json.dumps({"peft_type": "LORA"}),
            "adapter/adapter_model.safetensors": "weights",
            "loss.json": curve(2.0),
        },
        inputs={"heads": refs["heads"].key, "subset": refs["subset"].key},
        run_id=run_id,
    )
    refs["evaluation"] = put(
        store,
        "evaluation",
        {"samples.parquet": pa.table({"sample_id": ids[:5], "exact_match": [1.0] * 5})},
        inputs={"model": refs["model"].key},
        run_id=run_id,
    )
    return refs


def curve(start: float) -> str:
    """A loss curve as training writes it."""
    points = [
        {"step": step, "epoch": step / 10, "loss": start / step, "learning_rate": 1e-4}
        for step in range(1, 21)
    ]
    points[-1]["eval_loss"] = 0.5
    return json.dumps(points)


def summary(refs: dict[str, ArtifactRef], run_id: str = "run-1", **changes: Any) -> Summary:
    """What a run over these artifacts says of itself; ``changes`` are by dotted key with __."""
    seconds = {"proxy": 2.0, "heads": 1.0, "scores": 3.0, "subset": 0.5, "model": 4.0}
    values: dict[str, Any] = {
        "run_id": run_id,
        "name": "sums",
        "base": "tiny",
        "target": "sums",
        "heads": {
            "total": 4,
            "selected": 1,
            "ids": [[0, 1]],
            "ranker": "spad",
            "picture": f"{refs['heads'].location}/heads.png",
        },
        "selection": {
            "scorer": "head-filter",
            "corpus": N_SAMPLES,
            "selected": N_CHOSEN,
            "by_source": {"sums": 3, "talk": 1},
            "corpus_by_source": {"sums": 30, "talk": 10},
            "by_label": {"right": 3, "wrong": 1},
            "notes": ["the consistency gate was relaxed: 2 samples passed, 4 are wanted"],
        },
        "trainable": {"parameters": 6144, "share_of_model": 0.01, "share_of_attention": 0.05},
        "quality": {
            "metric": "exact_match",
            "higher_is_better": True,
            "base": 0.05,
            "p2d": 0.75,
            "full": 0.5,
            "random": 0.2,
            "retention": {"base": 0.9, "p2d": 0.85, "full": 0.4, "random": 0.8},
            "losses": {"base": 3.0, "p2d": 0.7},
            "samples": 300,
        },
        "aer": {
            "cold": 0.21,
            "this_run": 0.01,
            "speedup": 1 / 0.21,
            "reference": "calibrated",
            "full_seconds": 50.0,
            "full_spread_seconds": 1.5,
            "stages": seconds,
            "stages_this_run": {name: value / 21 for name, value in seconds.items()},
        },
        "stages": [
            {"name": name, "reused": name == "proxy", "seconds": 0.1, "cold_seconds": value}
            for name, value in seconds.items()
        ],
        "reused": ["proxy"],
        "artifacts": {name: ref.location for name, ref in refs.items()},
        "seconds": 12.0,
    }
    for path, value in changes.items():
        *parts, last = path.split("__")
        place = values
        for part in parts:
            place = place[part]
        place[last] = value
    return Summary.model_validate(values)


def keep_run(store: Store, done: Summary) -> Path:
    """Writes the summary where runs keep theirs."""
    keep_summary(store.root, done.run_id, done.to_json())
    return store.root / "runs" / f"{done.run_id}.json"
