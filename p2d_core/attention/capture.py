"""What single heads put out on a batch, and how the model runs to see it.

The model runs only as deep as the deepest head that is asked for; its final norm and its LM head
never run.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from p2d_core.attention.layout import AttentionLayer
from p2d_core.errors import HeadMapError
from p2d_core.samples.tokens import needed_mask


class Seen(Exception):
    """Everything that was asked for has been seen: `run_backbone` ends."""


def capture_head_outputs(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    heads: Sequence[tuple[int, int]],
    input_ids: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Each head's output before the output projection.

    Args:
        heads: (layer, head) pairs.
        input_ids: ``[batch, tokens]``.
        attention_mask: 1 for a token and 0 for padding, ``[batch, tokens]``.

    Returns:
        ``[batch, tokens, n_heads, head_dim]`` in the model's precision, in the order of ``heads``;
        what stands at padding means nothing.

    Raises:
        HeadMapError: there are no heads, or one is not in the model.
    """

    def whole(outputs: Tensor) -> Tensor:
        return outputs

    return _gather(model, layers, heads, input_ids, attention_mask, whole)


def mean_head_outputs(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    heads: Sequence[tuple[int, int]],
    input_ids: Tensor,
    attention_mask: Tensor,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Each head's output before the output projection, averaged over a row's tokens.

    It is averaged layer by layer as the model runs, so that what is kept does not grow with the
    number of tokens.

    Args:
        token_mask: 1 for the tokens to average over, ``[batch, tokens]``; every token that is not
            padding when None.

    Returns:
        ``[batch, n_heads, head_dim]`` in float32, in the order of ``heads``; zeros for a row
        without such tokens.

    Raises:
        HeadMapError: there are no heads, or one is not in the model.
    """
    weights = (attention_mask if token_mask is None else token_mask * attention_mask).float()
    weights = (weights / weights.sum(1, keepdim=True).clamp(min=1)).to(device_of(model))

    def mean(outputs: Tensor) -> Tensor:
        batch, tokens, n_heads, head_dim = outputs.shape
        flat = outputs.reshape(batch, tokens, -1).float()
        return torch.bmm(weights[:, None, :], flat).view(batch, n_heads, head_dim)

    return _gather(model, layers, heads, input_ids, attention_mask, mean)


def _gather(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    heads: Sequence[tuple[int, int]],
    input_ids: Tensor,
    attention_mask: Tensor,
    keep: Callable[[Tensor], Tensor],
) -> Tensor:
    """Runs to the deepest wanted layer; ``keep`` sees ``[batch, tokens, heads, head_dim]``."""
    wanted = by_layer(layers, heads)
    deepest = max(wanted)
    kept: dict[int, Tensor] = {}

    def reader(index: int) -> Callable[[Tensor], None]:
        layer = layers[index]
        inside = torch.tensor([head for _, head in wanted[index]], device=device_of(model))

        def read(inputs: Tensor) -> None:
            shape = (*inputs.shape[:-1], layer.n_query_heads, layer.head_dim)
            outputs = inputs.reshape(shape)
            kept[index] = keep(outputs.index_select(2, inside))
            if index == deepest:
                raise Seen

        return read

    with ExitStack() as hooks, torch.inference_mode():
        for index in wanted:
            hooks.callback(before(model, layers[index].o, reader(index)))
        run_backbone(model, input_ids, attention_mask)
    return in_order(kept, layers, heads)


def before(
    model: nn.Module, path: str, look: Callable[[Tensor], Tensor | None]
) -> Callable[[], None]:
    """Calls ``look`` with the module's input before it runs; returns what takes the hook away."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = look(inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    return model.get_submodule(path).register_forward_pre_hook(hook).remove


def run_backbone(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **settings: Any
) -> None:
    """Runs the backbone until a hook raises `Seen`; dropout is off."""
    device = device_of(model)
    mask = needed_mask(attention_mask)
    mask = None if mask is None else mask.to(device)
    backbone = getattr(model, "base_model", model)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        backbone(input_ids=input_ids.to(device), attention_mask=mask, use_cache=False, **settings)
    except Seen:
        pass
    finally:
        if was_training:
            model.train()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def by_layer(
    layers: Sequence[AttentionLayer], heads: Sequence[tuple[int, int]]
) -> dict[int, list[tuple[int, int]]]:
    """Layer -> (place in ``heads``, head index) of the heads in it."""
    if not heads:
        raise HeadMapError("no heads were given to look at.")
    found: dict[int, list[tuple[int, int]]] = {}
    for place, (index, head) in enumerate(heads):
        if not (0 <= index < len(layers) and 0 <= head < layers[index].n_query_heads):
            raise HeadMapError(
                f"head ({index}, {head}) is not in the model: it has {len(layers)} layers of "
                f"{layers[0].n_query_heads} query heads, counted from 0."
            )
        found.setdefault(index, []).append((place, head))
    return found


def in_order(
    kept: dict[int, Tensor], layers: Sequence[AttentionLayer], heads: Sequence[tuple[int, int]]
) -> Tensor:
    """Joins what was kept of each layer along the heads' dimension, in the order of ``heads``."""
    wanted = by_layer(layers, heads)
    dim = 1 if next(iter(kept.values())).ndim == 3 else 2
    joined = torch.cat([kept[index] for index in wanted], dim=dim)
    places = [place for inside in wanted.values() for place, _ in inside]
    order = sorted(range(len(places)), key=places.__getitem__)
    return joined.index_select(dim, torch.tensor(order, device=joined.device))
