"""The head map: every query head with its score and rank, and which are the task heads."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from p2d_core.attention.kv_groups import kv_group_of
from p2d_core.attention.layout import AttentionLayer
from p2d_core.errors import HeadMapError

HEAD_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("head", pa.int32(), nullable=False),
        pa.field("kv_group", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("is_task_head", pa.bool_(), nullable=False),
    ]
)


HEADS = "heads.parquet"
"""What a head map is called in its artifact."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadMap:
    """Scores ``[n_layers, n_query_heads]`` in float64, higher is more task-sensitive.

    ``task_heads`` are (layer, head), the best first.
    """

    scores: Tensor
    task_heads: tuple[tuple[int, int], ...]
    n_kv_groups: int

    @classmethod
    def from_scores(cls, scores: Tensor, n_kv_groups: int, fraction: float = 0.1) -> "HeadMap":
        """Takes the best ``fraction`` of all heads as task heads, without limits; see `HeadPick`.

        Raises:
            HeadMapError: a score is not finite, or the fraction is outside (0, 1].
        """
        return HeadPick(fraction).of(scores, n_kv_groups)

    @property
    def n_layers(self) -> int:
        return self.scores.shape[0]

    @property
    def n_query_heads(self) -> int:
        """In each layer."""
        return self.scores.shape[1]

    def ranks(self) -> Tensor:
        """``[n_layers, n_query_heads]`` int64; 1 is the best head."""
        ranks = torch.empty_like(self.scores, dtype=torch.int64)
        for rank, (layer, head) in enumerate(_by_score(self.scores), start=1):
            ranks[layer, head] = rank
        return ranks

    def check_fits(self, layers: Sequence[AttentionLayer]) -> None:
        """That this map is of a model with these layers.

        Raises:
            HeadMapError: it is of another shape.
        """
        mine = (self.n_layers, self.n_query_heads, self.n_kv_groups)
        theirs = (len(layers), layers[0].n_query_heads, layers[0].n_kv_groups)
        if mine != theirs:
            words = "{} layers of {} query heads in {} KV groups"
            raise HeadMapError(
                f"the head map is of a model with {words.format(*mine)}, but this model has "
                f"{words.format(*theirs)}. Rank this model's own heads, or give the base model "
                "that the map was made from."
            )

    def to_table(self) -> pa.Table:
        """A row a head, by layer and head; the schema of a `heads` artifact."""
        ranks = self.ranks()
        task_heads = set(self.task_heads)
        rows = [
            {
                "layer": layer,
                "head": head,
                "kv_group": kv_group_of(head, self.n_query_heads, self.n_kv_groups),
                "score": float(self.scores[layer, head]),
                "rank": int(ranks[layer, head]),
                "is_task_head": (layer, head) in task_heads,
            }
            for layer in range(self.n_layers)
            for head in range(self.n_query_heads)
        ]
        return pa.Table.from_pylist(rows, schema=HEAD_SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> "HeadMap":
        """The inverse of `to_table`; the rows may be in any order.

        Raises:
            HeadMapError: columns are missing or of another type, a head is missing, there twice or
                out of range, a score is not finite, the ranks do not follow from the scores, the
                KV groups are not even blocks, or there is no task head.
        """
        rows = _rows(table)
        scores = _score_grid(rows)
        n_groups = 1 + max(row["kv_group"] for row in rows)
        scores = _checked(scores, n_groups)
        for row in rows:
            group = kv_group_of(row["head"], scores.shape[1], n_groups)
            if row["kv_group"] != group:
                raise HeadMapError(
                    f"head map: head ({row['layer']}, {row['head']}) is in KV group "
                    f"{row['kv_group']}; with {scores.shape[1]} query heads in {n_groups} groups "
                    f"it has to be {group}."
                )
        ranks = {(row["layer"], row["head"]): row["rank"] for row in rows}
        in_order = _by_score(scores)
        for rank, head in enumerate(in_order, start=1):
            if ranks[head] != rank:
                raise HeadMapError(
                    f"head map: head {head} has rank {ranks[head]}; by its score it has to be "
                    f"{rank} (1 is the highest score; ties by layer, then head)."
                )
        chosen = {(row["layer"], row["head"]) for row in rows if row["is_task_head"]}
        if not chosen:
            raise HeadMapError("head map: no head has is_task_head: nothing could be tuned.")
        return cls(scores, tuple(head for head in in_order if head in chosen), n_groups)


@dataclass(frozen=True, slots=True)
class HeadPick:
    """How task heads are picked from scores: the best, within limits.

    Ties go to the lower layer, then to the lower head.

    Raises:
        HeadMapError: the fraction is outside (0, 1], or the limit below 1.
    """

    fraction: float = 0.1
    """Share of all heads that become task heads, rounded up; at least one."""
    max_per_layer: int | None = None
    """Heads of a layer beyond so many give way to the next best elsewhere."""
    one_per_kv_group: bool = False
    """So do heads whose KV group, and with it its K and V, is taken already."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise HeadMapError(
                f"the fraction of task heads is {self.fraction}; it has to be in (0, 1]."
            )
        if self.max_per_layer is not None and self.max_per_layer < 1:
            raise HeadMapError(f"max_per_layer is {self.max_per_layer}; it has to be at least 1.")

    def count(self, n_layers: int, n_query_heads: int, n_kv_groups: int) -> int:
        """How many task heads a model of that shape has.

        Raises:
            HeadMapError: the limits leave fewer.
        """
        # 0.07 * 100 is a little over 7 in floating point, and is meant to be 7
        count = max(1, math.ceil(self.fraction * n_layers * n_query_heads - 1e-9))
        in_a_layer = n_kv_groups if self.one_per_kv_group else n_query_heads
        if self.max_per_layer is not None:
            in_a_layer = min(in_a_layer, self.max_per_layer)
        if count > n_layers * in_a_layer:
            most = self.max_per_layer
            limits = [] if most is None else [f"heads.max_per_layer {most}"]
            limits += ["heads.one_per_kv_group"] if self.one_per_kv_group else []
            raise HeadMapError(
                f"heads.fraction {self.fraction} asks for {count} of {n_layers * n_query_heads} "
                f"heads, but {' and '.join(limits)} leave at most {n_layers * in_a_layer} "
                f"({in_a_layer} in each of {n_layers} layers). Lower heads.fraction, or lift the "
                "limit."
            )
        return count

    def of(self, scores: Tensor, n_kv_groups: int) -> HeadMap:
        """The head map of these scores.

        Raises:
            HeadMapError: a score is not finite, or the limits leave too few heads.
        """
        scores = _checked(scores, n_kv_groups)
        count = self.count(scores.shape[0], scores.shape[1], n_kv_groups)
        chosen: list[tuple[int, int]] = []
        in_layer: Counter[int] = Counter()
        groups: set[tuple[int, int]] = set()
        for layer, head in _by_score(scores):
            group = (layer, kv_group_of(head, scores.shape[1], n_kv_groups))
            if in_layer[layer] == self.max_per_layer:
                continue
            if self.one_per_kv_group and group in groups:
                continue
            chosen.append((layer, head))
            in_layer[layer] += 1
            groups.add(group)
            if len(chosen) == count:
                break
        return HeadMap(scores, tuple(chosen), n_kv_groups)


def read_head_map(path: Path) -> HeadMap:
    """Reads a ``heads.parquet``.

    Raises:
        HeadMapError: the file is missing, is no Parquet, or what it holds is no head map.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise HeadMapError(
            f"{path} cannot be read as a head map in Parquet: {error}. Rank the heads anew."
        ) from error
    try:
        return HeadMap.from_table(table)
    except HeadMapError as error:
        raise HeadMapError(f"{path}: {error} Mend the file, or rank the heads anew.") from error


def _by_score(scores: Tensor) -> tuple[tuple[int, int], ...]:
    """All heads, the highest score first; ties by layer, then head."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return tuple(divmod(place, scores.shape[1]) for place in order)


def _checked(scores: Tensor, n_kv_groups: int) -> Tensor:
    """The scores in float64 on the CPU."""
    scores = scores.detach().to(device="cpu", dtype=torch.float64)
    if scores.ndim != 2 or scores.numel() == 0:
        raise HeadMapError(
            f"head scores have the shape {list(scores.shape)}; it has to be [layers, query heads]."
        )
    if n_kv_groups < 1 or scores.shape[1] % n_kv_groups:
        raise HeadMapError(
            f"head map: {scores.shape[1]} query heads do not divide into {n_kv_groups} KV groups."
        )
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        layer, head = bad[0].tolist()
        raise HeadMapError(
            f"the score of head ({layer}, {head}) is {float(scores[layer, head])}, and {len(bad)} "
            "of all scores are not finite. Look at the loss of the proxy run: it may have diverged."
        )
    return scores


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    missing = [name for name in HEAD_SCHEMA.names if name not in table.column_names]
    if missing:
        raise HeadMapError(
            f"head map: no column {', '.join(missing)}. It has to have "
            f"{', '.join(HEAD_SCHEMA.names)}; found {', '.join(table.column_names)}."
        )
    if table.num_rows == 0:
        raise HeadMapError("head map: there are no rows.")
    table = table.select(HEAD_SCHEMA.names)
    for name in HEAD_SCHEMA.names:
        if table[name].null_count:
            raise HeadMapError(f"head map: column {name} has empty values.")
    if not pa.types.is_boolean(table.schema.field("is_task_head").type):
        raise HeadMapError("head map: column is_task_head has to be true or false.")
    try:
        rows: list[dict[str, Any]] = table.cast(HEAD_SCHEMA).to_pylist()
    except pa.ArrowException as error:
        raise HeadMapError(f"head map: the columns are not of the right types: {error}.") from error
    return rows


def _score_grid(rows: list[dict[str, Any]]) -> Tensor:
    seen: dict[tuple[int, int], float] = {}
    for row in rows:
        layer, head = int(row["layer"]), int(row["head"])
        if layer < 0 or head < 0 or row["kv_group"] < 0:
            raise HeadMapError(
                f"head map: head ({layer}, {head}) in KV group {row['kv_group']} is out of range; "
                "all are counted from 0."
            )
        if (layer, head) in seen:
            raise HeadMapError(f"head map: head ({layer}, {head}) is there twice.")
        seen[layer, head] = float(row["score"])
    n_layers = 1 + max(layer for layer, _ in seen)
    n_heads = 1 + max(head for _, head in seen)
    if len(seen) != n_layers * n_heads:
        every = ((layer, head) for layer in range(n_layers) for head in range(n_heads))
        lacking = next(head for head in every if head not in seen)
        raise HeadMapError(
            f"head map: of {n_layers} layers x {n_heads} query heads only {len(seen)} are there; "
            f"head {lacking} is missing. A head map has every head with its score."
        )
    values = [[seen[layer, head] for head in range(n_heads)] for layer in range(n_layers)]
    return torch.tensor(values, dtype=torch.float64)
