"""Where each query head's slices are in a model's projection weights.

A layout is data: which module's weight, along which of its dimensions, and where each head begins.
Separate, fused, interleaved and transposed weights differ in nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from p2d_core.attention.kv_groups import kv_group_of
from p2d_core.errors import HeadMapError

Role = Literal["q", "k", "v", "o"]
Roles = Annotated[tuple[Role, ...], Field(min_length=1)]
ROLES: tuple[Role, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True, slots=True)
class Projection:
    """Where the heads of one role are: of ``starts[i]`` on, ``head_dim`` entries are head i's.

    For q and o these are query heads, for k and v KV groups. ``dim`` is that of the weight along
    which they lie: in a linear layer's weight ``[outputs, inputs]`` 0 for q, k and v and 1 for o;
    in a transposed one (Conv1D) the other way round.
    """

    module: str
    dim: int
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One self-attention: ``name`` is its module path, ``roles`` says where q, k, v and o are."""

    index: int
    name: str
    roles: Mapping[str, Projection]
    n_query_heads: int
    n_kv_groups: int
    head_dim: int
    shares_norm: bool = False
    """q or k are normalised over all heads at once, so that each head's rows act on all heads."""

    @property
    def q(self) -> str:
        """Path of the module whose weight has the heads' q; the same as ``k`` where fused."""
        return self.roles["q"].module

    @property
    def k(self) -> str:
        return self.roles["k"].module

    @property
    def v(self) -> str:
        return self.roles["v"].module

    @property
    def o(self) -> str:
        return self.roles["o"].module

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that have slices, each once."""
        return tuple(dict.fromkeys(self.roles[role].module for role in ROLES))


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Rows (``dim`` 0) or columns (``dim`` 1) start..stop of a module's weight, as it is kept."""

    module: str
    dim: int
    start: int
    stop: int


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Every self-attention of the model, in order.

    Raises:
        UnsupportedModelError: there is none in which single heads can be found, or the layers
            differ in heads.
    """
    from p2d_core.attention.structure import find_layers

    return find_layers(model)


def head_slices(
    layer: AttentionLayer, head: int, roles: Iterable[Role] = ROLES
) -> dict[str, WeightSlice]:
    """The slices of one query head by role: its q and o, and its KV group's k and v.

    Raises:
        HeadMapError: the layer has no such head.
    """
    if not 0 <= head < layer.n_query_heads:
        raise HeadMapError(
            f"{layer.name} has no query head {head}: it has "
            f"{in_words(layer.n_query_heads, layer.n_kv_groups, layer.head_dim)}, counted from 0."
        )
    group = kv_group_of(head, layer.n_query_heads, layer.n_kv_groups)
    slices: dict[str, WeightSlice] = {}
    for role in roles:
        where = layer.roles[role]
        start = where.starts[group if role in "kv" else head]
        slices[role] = WeightSlice(where.module, where.dim, start, start + layer.head_dim)
    return slices


def slices_of(
    layers: Sequence[AttentionLayer],
    heads: Iterable[tuple[int, int]],
    roles: Sequence[Role] = ROLES,
) -> list[WeightSlice]:
    """The slices of these (layer, head) pairs; what heads of one KV group share comes once.

    Raises:
        HeadMapError: a head is not in the model.
    """
    slices: dict[WeightSlice, None] = {}
    for index, head in heads:
        if not 0 <= index < len(layers):
            raise HeadMapError(
                f"head ({index}, {head}) is not in the model: it has layers 0 to {len(layers) - 1}."
            )
        slices.update(dict.fromkeys(head_slices(layers[index], head, roles).values()))
    return list(slices)


def all_heads(layers: Sequence[AttentionLayer]) -> list[tuple[int, int]]:
    """Every (layer, head), in order."""
    return [(layer.index, head) for layer in layers for head in range(layer.n_query_heads)]


def module_weights(model: nn.Module, layer: AttentionLayer) -> dict[str, Tensor]:
    """Module path -> weight as it is kept, of the modules that have slices; each once."""
    return {path: model.get_submodule(path).get_parameter("weight") for path in layer.modules}


def by_role(weights: Mapping[str, Tensor], layer: AttentionLayer) -> dict[str, Tensor]:
    """q, k, v ``[heads or groups * head_dim, d_model]`` and o ``[d_model, heads * head_dim]``.

    The heads stand in order, however the weights keep them; parts that lie together are views.

    Args:
        weights: module path -> a tensor of its weight's shape.
    """
    found: dict[str, Tensor] = {}
    for role in ROLES:
        where = layer.roles[role]
        part = _part(weights[where.module], where, layer.head_dim)
        heads_along = 1 if role == "o" else 0
        found[role] = part if where.dim == heads_along else part.t()
    return found


def projection_weights(model: nn.Module, layer: AttentionLayer) -> dict[str, Tensor]:
    """The weights of one layer `by_role`."""
    return by_role(module_weights(model, layer), layer)


def in_words(n_query_heads: int, n_kv_groups: int, head_dim: int) -> str:
    """What heads a layer has."""
    return f"{n_query_heads} query heads of {head_dim} in {n_kv_groups} KV groups"


def _part(weight: Tensor, where: Projection, size: int) -> Tensor:
    first, n = where.starts[0], len(where.starts) * size
    if where.starts == tuple(range(first, first + n, size)):
        return weight if n == weight.shape[where.dim] else weight.narrow(where.dim, first, n)
    index = [start + i for start in where.starts for i in range(size)]
    return weight.index_select(where.dim, torch.tensor(index, device=weight.device))
