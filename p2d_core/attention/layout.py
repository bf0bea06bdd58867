"""Where each query head's slices are in a model's projection weights, found by structure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from p2d_core.attention.kv_groups import kv_group_of
from p2d_core.errors import HeadMapError, UnsupportedModelError

# the names that a role goes by in models whose projections are separate
ROLE_NAMES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "out_proj", "dense"),
}


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One self-attention; ``name``, ``q``, ``k``, ``v`` and ``o`` are module paths in the model."""

    index: int
    name: str
    q: str
    k: str
    v: str
    o: str
    n_query_heads: int
    n_kv_groups: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Rows (``dim`` 0, outputs) or columns (``dim`` 1, inputs) start..stop of a module's weight."""

    module: str
    dim: int
    start: int
    stop: int


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Every self-attention of the model, in order.

    Raises:
        UnsupportedModelError: there is none with separate q, k, v and o linear projections, their
            shapes do not make heads, or the layers differ in heads.
    """
    found = [
        (name, module, roles)
        for name, module in model.named_modules()
        if (roles := _projections(name, module)) is not None
    ]
    if not found:
        raise UnsupportedModelError(_nothing_found(model))
    layers = tuple(
        _layer(index, name, module, roles, model)
        for index, (name, module, roles) in enumerate(found)
    )
    first = layers[0]
    for layer in layers[1:]:
        if _shape(layer) != _shape(first):
            raise UnsupportedModelError(
                f"{layer.name} has {_in_words(layer)}, but {first.name} has {_in_words(first)}. "
                "Layers that differ in heads are not supported."
            )
    n_expected = getattr(_text_config(model), "num_hidden_layers", None)
    if n_expected is not None and n_expected != len(layers):
        raise UnsupportedModelError(
            f"the model has {n_expected} layers, but separate q, k, v and o projections were found "
            f"in {len(layers)} ({first.name} to {layers[-1].name}). Models in which only some "
            "layers attend, or with a second stack of attention, are not supported."
        )
    return layers


def head_slices(
    layer: AttentionLayer, head: int, include_kv: bool = True
) -> dict[str, WeightSlice]:
    """The slices of one query head: its q rows, its o columns, and its KV group's k and v rows.

    Raises:
        HeadMapError: the layer has no such head.
    """
    if not 0 <= head < layer.n_query_heads:
        raise HeadMapError(
            f"{layer.name} has no query head {head}: it has {_in_words(layer)}, counted from 0."
        )
    size = layer.head_dim
    group = kv_group_of(head, layer.n_query_heads, layer.n_kv_groups)
    slices = {"q": WeightSlice(layer.q, 0, head * size, (head + 1) * size)}
    if include_kv:
        slices["k"] = WeightSlice(layer.k, 0, group * size, (group + 1) * size)
        slices["v"] = WeightSlice(layer.v, 0, group * size, (group + 1) * size)
    slices["o"] = WeightSlice(layer.o, 1, head * size, (head + 1) * size)
    return slices


def slices_of(
    layers: Sequence[AttentionLayer], heads: Iterable[tuple[int, int]], include_kv: bool = True
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
        slices.update(dict.fromkeys(head_slices(layers[index], head, include_kv).values()))
    return list(slices)


def all_heads(layers: Sequence[AttentionLayer]) -> list[tuple[int, int]]:
    """Every (layer, head), in order."""
    return [(layer.index, head) for layer in layers for head in range(layer.n_query_heads)]


def projection_weights(model: nn.Module, layer: AttentionLayer) -> dict[str, Tensor]:
    """The weights of q, k, v ``[outputs, inputs]`` and o ``[inputs, outputs]`` of one layer."""
    paths = {"q": layer.q, "k": layer.k, "v": layer.v, "o": layer.o}
    return {role: model.get_submodule(path).get_parameter("weight") for role, path in paths.items()}


def _projections(name: str, module: nn.Module) -> dict[str, tuple[str, nn.Linear]] | None:
    """Role -> (module path, linear), or None where the module is no attention of this structure."""
    roles = {}
    for role, candidates in ROLE_NAMES.items():
        for child in candidates:
            linear = getattr(module, child, None)
            if isinstance(linear, nn.Linear):
                roles[role] = (f"{name}.{child}" if name else child, linear)
                break
        else:
            return None
    return roles


def _layer(
    index: int,
    name: str,
    module: nn.Module,
    roles: dict[str, tuple[str, nn.Linear]],
    model: nn.Module,
) -> AttentionLayer:
    q, k, v, o = (roles[role][1] for role in "qkvo")
    head_dim = _head_dim(module, model)
    fits = (
        head_dim is not None
        and q.out_features % head_dim == 0
        and k.out_features % head_dim == 0
        and k.out_features == v.out_features
        and o.in_features == q.out_features
        and k.in_features == q.in_features == v.in_features == o.out_features
        and q.out_features % k.out_features == 0
    )
    if head_dim is None or not fits:
        raise UnsupportedModelError(
            f"the projections of {name} do not divide into heads of {head_dim}: "
            f"{_shapes(roles[role] for role in 'qkvo')}."
        )
    return AttentionLayer(
        index,
        name,
        roles["q"][0],
        roles["k"][0],
        roles["v"][0],
        roles["o"][0],
        n_query_heads=q.out_features // head_dim,
        n_kv_groups=k.out_features // head_dim,
        head_dim=head_dim,
    )


def _head_dim(module: nn.Module, model: nn.Module) -> int | None:
    """From the attention module itself, else from the model's config."""
    if isinstance(size := getattr(module, "head_dim", None), int):
        return size
    config = _text_config(model)
    if isinstance(size := getattr(config, "head_dim", None), int):
        return size
    width = getattr(config, "hidden_size", None)
    n_heads = getattr(config, "num_attention_heads", None)
    return width // n_heads if isinstance(width, int) and isinstance(n_heads, int) else None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _shape(layer: AttentionLayer) -> tuple[int, int, int]:
    return layer.n_query_heads, layer.n_kv_groups, layer.head_dim


def _in_words(layer: AttentionLayer) -> str:
    return f"{layer.n_query_heads} query heads of {layer.head_dim} in {layer.n_kv_groups} KV groups"


def _nothing_found(model: nn.Module) -> str:
    """Names what looks most like attention, so that the reader sees what was not understood."""
    wanted = "Separate linear projections q_proj, k_proj, v_proj and o_proj (or out_proj, dense)"
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower():
            weighted = list(_weighted(name, module))
            if weighted:
                return (
                    f"the attention {name} ({type(module).__name__}) has a structure in which "
                    f"single heads cannot be found: {_shapes(weighted)}. {wanted} are supported."
                )
    return f"no attention was found in {type(model).__name__}. {wanted} are supported."


def _weighted(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child, part in module.named_modules():
        if isinstance(getattr(part, "weight", None), Tensor):
            yield f"{name}.{child}", part


def _shapes(modules: Iterable[tuple[str, nn.Module]]) -> str:
    return ", ".join(
        f"{path.rpartition('.')[2]} {type(module).__name__} {list(module.weight.shape)}"
        for path, module in modules
        if isinstance(module.weight, Tensor)
    )
