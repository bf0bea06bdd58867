"""Finds a model's attention, and in it each head's slices, by structure.

An attention is a module whose own projections fit the config's heads in shape: one takes
heads x head_dim inputs (o), the others give (heads + 2 x KV groups) x head_dim outputs together.
Which outputs are whose is found by `trace`. Names are looked at for error messages alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from p2d_core.attention.layout import AttentionLayer, Projection, in_words
from p2d_core.attention.probe import NotTraced, trace
from p2d_core.errors import UnsupportedModelError

SEE = "docs/families.md says which structures are recognised."


def find_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Every self-attention of the model, in order.

    Raises:
        UnsupportedModelError: there is none in which single heads can be found, or the layers
            differ in heads.
    """
    layouts: dict[Any, _Layout] = {}
    found = list(_attentions(model, layouts))
    layers = []
    for index, each in enumerate(found):
        if index and each.heads != found[0].heads:
            raise UnsupportedModelError(
                f"{each.name} has {each.heads}, but {found[0].name} has {found[0].heads}. "
                "Layers that differ in heads are not supported."
            )
        if each.signature not in layouts:
            layouts[each.signature] = _layout_or_refusal(model, each)
        layers.append(layouts[each.signature].layer(index, each))
    n_expected = getattr(_text_config(model), "num_hidden_layers", None)
    if n_expected is not None and n_expected != len(layers):
        raise UnsupportedModelError(
            f"the model has {n_expected} layers, but heads were found in {len(layers)} "
            f"({layers[0].name} to {layers[-1].name}). Models in which only some layers attend, "
            "or with a second stack of attention, are not supported."
        )
    return tuple(layers)


def is_transposed(projection: nn.Module) -> bool:
    """Whether a projection keeps its weight as ``[inputs, outputs]``."""
    return isinstance(projection, Conv1D)


def sizes_of(projection: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a projection."""
    first, second = projection.get_parameter("weight").shape
    return (second, first) if is_transposed(projection) else (first, second)


# -- finding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    n_query_heads: int
    n_kv_groups: int
    head_dim: int

    def __str__(self) -> str:
        return in_words(self.n_query_heads, self.n_kv_groups, self.head_dim)


@dataclass(frozen=True)
class _Found:
    """A module whose projections fit in shape."""

    name: str
    module: nn.Module
    projections: Mapping[str, nn.Module]
    heads: _Heads

    @property
    def signature(self) -> Any:
        """What two attentions have to share for one layout to be right for both."""
        return type(self.module), tuple(
            (name, type(child), tuple(child.get_parameter("weight").shape))
            for name, child in self.projections.items()
        )


def _attentions(model: nn.Module, layouts: dict[Any, "_Layout"]) -> Iterator[_Found]:
    """In order; of a class whose first module turns out to be no attention, none.

    ``layouts`` is given the layout of each signature that was looked at, to be looked at once.
    """
    kinds: dict[type[nn.Module], bool] = {}
    why: tuple[str, nn.Module, str] | None = None
    n_found = 0
    for name, module in model.named_modules():
        projections = _projections(module)
        if len(projections) < 2 or kinds.get(type(module), True) is False:
            continue
        heads = _heads(module, projections, model)
        if heads is None:
            if type(module) in kinds:
                raise UnsupportedModelError(
                    f"the projections of {name} do not divide into heads of "
                    f"{_head_dim(module, model)}: {_shapes(projections.items())}. {SEE}"
                )
            continue
        each = _Found(name, module, projections, heads)
        if type(module) not in kinds:
            try:
                layouts[each.signature] = _layout(model, each)
                kinds[type(module)] = True
            except NotTraced as error:
                kinds[type(module)] = False
                why = why or (name, module, str(error))
                continue
        n_found += 1
        yield each
    if not n_found:
        raise UnsupportedModelError(_refusal(model, why))


def _projections(module: nn.Module) -> dict[str, nn.Module]:
    """The module's own linear projections with plain weights, by name."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, Conv1D):
            fits = child.weight.shape == (child.weight.shape[0], child.nf)
        elif isinstance(child, nn.Linear):
            # quantised weights are packed into other shapes
            fits = child.weight.shape == (child.out_features, child.in_features)
        else:
            continue
        if fits:
            found[name] = child
    return found


def _outputs(projections: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: sizes_of(child)[0] for name, child in projections.items()}


def _heads(
    module: nn.Module, projections: Mapping[str, nn.Module], model: nn.Module
) -> _Heads | None:
    """How many heads the shapes make; None where they make none."""
    n_heads = getattr(_text_config(model), "num_attention_heads", None)
    size = _head_dim(module, model)
    if not isinstance(n_heads, int) or not isinstance(size, int) or n_heads < 1 or size < 1:
        return None
    sizes = list(map(sizes_of, projections.values()))
    total = sum(outputs for outputs, _ in sizes)
    for place, (width, inputs) in enumerate(sizes):
        others = sizes[:place] + sizes[place + 1 :]
        groups, rest = divmod(total - width - n_heads * size, 2 * size)
        if (
            inputs == n_heads * size
            and all(each == width for _, each in others)
            and rest == 0
            and groups > 0
            and n_heads % groups == 0
            and all(outputs % size == 0 for outputs, _ in others)
        ):
            return _Heads(n_heads, groups, size)
    return None


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


# -- from what a run showed to a layout ---------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Role -> child and where its heads start, for all attentions of one signature."""

    starts: Mapping[str, tuple[str, tuple[int, ...]]]
    shares_norm: bool

    def layer(self, index: int, found: _Found) -> AttentionLayer:
        def projection(role: str) -> Projection:
            child, starts = self.starts[role]
            heads_along = 1 if role == "o" else 0
            dim = 1 - heads_along if is_transposed(found.projections[child]) else heads_along
            return Projection(f"{found.name}.{child}" if found.name else child, dim, starts)

        return AttentionLayer(
            index,
            found.name,
            {role: projection(role) for role in "qkvo"},
            found.heads.n_query_heads,
            found.heads.n_kv_groups,
            found.heads.head_dim,
            self.shares_norm,
        )


def _layout_or_refusal(model: nn.Module, found: _Found) -> _Layout:
    try:
        return _layout(model, found)
    except NotTraced as error:
        why = (found.name, found.module, str(error))
        raise UnsupportedModelError(_refusal(model, why)) from error


def _layout(model: nn.Module, found: _Found) -> _Layout:
    """Every head's q, and every KV group's k and v, as one run of ``head_dim`` outputs.

    Raises:
        NotTraced: they are not.
    """
    heads = found.heads
    traced = trace(model, found.module, _outputs(found.projections), heads.n_query_heads)
    starts: dict[str, tuple[str, tuple[int, ...]]] = {}
    per_group = heads.n_query_heads // heads.n_kv_groups
    for role, by_head in traced.made_of.items():
        children: set[str] = set()
        begins: list[int] = []
        for head, made_of in enumerate(by_head):
            places = next(iter(made_of.values()), [])
            if len(made_of) != 1 or places != list(range(places[0], places[0] + heads.head_dim)):
                raise NotTraced(
                    f"head {head}'s {role} is made of {_in_runs(made_of)}, and not of "
                    f"{heads.head_dim} outputs of one projection that stand together"
                )
            children.update(made_of)
            begins.append(places[0])
        if role != "q":
            if any(begins[head] != begins[head - head % per_group] for head in range(len(begins))):
                raise NotTraced(f"its {heads.n_kv_groups} KV groups are not even blocks of heads")
            begins = begins[::per_group]
        if len(children) != 1 or len(set(begins)) != len(begins):
            raise NotTraced(f"its heads share what makes their {role}")
        starts[role] = children.pop(), tuple(begins)
    o_starts = range(0, heads.n_query_heads * heads.head_dim, heads.head_dim)
    starts["o"] = traced.o, tuple(o_starts)
    return _Layout(starts, traced.shares_norm)


# -- words -------------------------------------------------------------------------------------


def _refusal(model: nn.Module, why: tuple[str, nn.Module, str] | None) -> str:
    """Names what looks most like attention, so that the reader sees what was not understood."""
    if why is not None:
        name, module, reason = why
        return _cannot(name, module, f"{reason[0].upper()}{reason[1:]}.")
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower() and any(_weighted(name, module)):
            return _cannot(name, module, _shape_trouble(module, model))
    return f"no attention was found in {type(model).__name__}. {SEE}"


def _cannot(name: str, module: nn.Module, reason: str) -> str:
    return (
        f"the attention {name} ({type(module).__name__}) has a structure in which single heads "
        f"cannot be found: {_shapes(_weighted(name, module))}. {reason} {SEE}"
    )


def _shape_trouble(module: nn.Module, model: nn.Module) -> str:
    projections = _projections(module)
    width = getattr(_text_config(model), "hidden_size", None)
    outputs = {each for each in _outputs(projections).values()}
    latent = [
        name
        for name, child in projections.items()
        if sizes_of(child)[1] != width and sizes_of(child)[0] != width
    ]
    if latent and outputs:
        return (
            f"{' and '.join(latent)} work{'s' if len(latent) == 1 else ''} on what another "
            "projection gives (multi-head latent attention): no rows of a weight are one head's "
            "k and v alone."
        )
    n_heads = getattr(_text_config(model), "num_attention_heads", None)
    size = _head_dim(module, model)
    return (
        f"With {n_heads} heads of {size}, one projection has to take {n_heads} x {size} inputs and "
        f"the others to give ({n_heads} + 2 x KV groups) x {size} outputs."
    )


def _in_runs(made_of: Mapping[str, list[int]]) -> str:
    """Such as ``q_proj 0-7 and kv_proj 3``; at most a few."""
    said = []
    for name, places in made_of.items():
        runs: list[list[int]] = []
        for place in places:
            if runs and runs[-1][1] == place - 1:
                runs[-1][1] = place
            else:
                runs.append([place, place])
        words = [f"{a}-{b}" if a != b else str(a) for a, b in runs[:3]]
        said.append(f"{name} {', '.join(words)}{', ...' if len(runs) > 3 else ''}")
    return " and ".join(said) or "nothing"


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
