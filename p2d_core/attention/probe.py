"""Which outputs of an attention's projections make which head's q, k and v: found by trying.

Shapes alone cannot tell: a fused weight of three times the width may keep all of q first, or q, k
and v of each head together. So one attention is run alone, on two tokens, with free numbers for
what its projections give; what a head's output depends on is its own:

- numbers of the first token that one entry of the output depends on, and another too: k;
- numbers of the first token that some entry depends on, but not all: v, which is only averaged;
- numbers of the last token beyond these: q.

The weights are not needed, so that a model without any (on the meta device) will do.
"""

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_RUNNABLE = ("eager", "sdpa")


@dataclass(frozen=True)
class Traced:
    """What a run of two tokens showed.

    ``made_of`` has, for each role of q, k and v and each query head, the outputs that it is made
    of: projection name -> which of its outputs, rising.
    """

    o: str
    made_of: Mapping[str, list[dict[str, list[int]]]]
    shares_norm: bool


class NotTraced(Exception):
    """The attention could not be run alone, or what it showed is no attention by heads."""


def trace(model: Any, attention: nn.Module, projections: Mapping[str, int], n_heads: int) -> Traced:
    """Runs a copy of ``attention`` with free numbers for its projections' outputs.

    Args:
        projections: name of a child of ``attention`` -> how many outputs it has.

    Raises:
        NotTraced: see there.
    """
    # three copies of the same two tokens for each head: one asks for all of its output, two for
    # single entries
    arguments, named = _arguments_of(model, attention, 3 * n_heads)
    # where a model has no values, what masks say is not known: True is what a token sees in some
    # models and what it does not see in others, where the last token would then see nothing
    for flag in (True, False):
        fresh = _Fresh(flag)
        traced = _run(attention, projections, n_heads, fresh(arguments), fresh(named))
        if traced.made_of["q"][0] or not fresh.guessed:
            break
    return traced


def _run(
    attention: nn.Module, projections: Mapping[str, int], n_heads: int, arguments: Any, named: Any
) -> Traced:
    order: list[str] = []
    stubs = {
        name: _Stub(name, n_outputs, 3 * n_heads, order) for name, n_outputs in projections.items()
    }
    alone, norms = _alone(attention, stubs)
    try:
        with torch.enable_grad():
            alone(*arguments, **named)
    except Exception as error:
        raise NotTraced(f"it cannot be run alone: {type(error).__name__}: {error}") from error
    if sorted(order) != sorted(projections):
        raise NotTraced(f"it runs {', '.join(order) or 'no projection'}, and not each once")
    o = order.pop()
    mixed = stubs[o].given
    assert mixed is not None
    if mixed.shape[:2] != (3 * n_heads, 2) or mixed.shape[-1] % n_heads or not mixed.requires_grad:
        raise NotTraced(f"what {o} is given is not made of {n_heads} heads")
    torch.autograd.backward(_sum_of_own_outputs(mixed, n_heads))
    made_of: dict[str, list[dict[str, list[int]]]] = {"q": [], "k": [], "v": []}
    for head in range(n_heads):
        for found in made_of.values():
            found.append({})
        for name in order:
            depends = stubs[name].gradient().view(n_heads, 3, 2, -1)[head] != 0
            (some, one, another), last = depends[:, 0], depends[0, 1]
            for role, those in (
                ("q", last & ~some),
                ("k", one & another),
                ("v", some & ~(one & another)),
            ):
                if places := those.nonzero().flatten().tolist():
                    made_of[role][head][name] = places
    head_dim = mixed.shape[-1] // n_heads
    return Traced(o, made_of, any(norm.width > head_dim for norm in norms))


def _sum_of_own_outputs(mixed: Tensor, n_heads: int) -> Tensor:
    """Of the last token and each head: all entries, the first, and the second; a copy for each."""
    last = mixed[:, -1].reshape(n_heads, 3, n_heads, -1)
    own = last.diagonal(dim1=0, dim2=2)  # [3, head_dim, heads]
    # weighted: a softmax does not see what is added to all entries
    weights = torch.arange(1.0, own.shape[1] + 1)[:, None]
    total: Tensor = (own[0] * weights).sum() + own[1, 0].sum() + own[2, 1].sum()
    return total


class _Caught(Exception):
    """The attention's arguments are known."""


def _arguments_of(model: Any, attention: nn.Module, batch: int) -> tuple[Any, Any]:
    """What the model gives this attention for two tokens; it runs no further than that."""
    caught: list[tuple[Any, Any]] = []
    here = threading.get_ident()

    def catch(_module: nn.Module, arguments: Any, named: Any) -> None:
        if threading.get_ident() == here:  # other threads may run the model meanwhile
            caught.append((arguments, named))
            raise _Caught

    hook = attention.register_forward_pre_hook(catch, with_kwargs=True)
    words = model.get_input_embeddings().weight
    try:
        with torch.no_grad():
            # with words' ids or without a cache, transformers looks at values (is it padding? are
            # there several texts?), which the meta device has not
            tokens = torch.zeros(batch, 2, words.shape[1], dtype=words.dtype, device=words.device)
            getattr(model, "base_model", model)(inputs_embeds=tokens, use_cache=True)
    except _Caught:
        pass
    except Exception as error:
        raise NotTraced(f"the model does not run up to it: {error}") from error
    finally:
        hook.remove()
    if not caught:
        raise NotTraced("the model does not run it")
    return caught[0]


def _alone(attention: nn.Module, stubs: "Mapping[str, _Stub]") -> tuple[nn.Module, "list[_Norm]"]:
    """A copy on the CPU without weights, and what stands for its norms."""
    instead: dict[int, Any] = {
        id(attention.get_submodule(name)): stub for name, stub in stubs.items()
    }
    norms = []
    fresh = _Fresh()
    for child in attention.children():
        if id(child) not in instead and any(True for _ in child.parameters()):
            norms.append(_Norm())
            instead[id(child)] = norms[-1]
    for tensor in (*attention.parameters(recurse=False), *attention.buffers()):
        instead[id(tensor)] = fresh.tensor(tensor)
    alone = copy.deepcopy(attention, instead).eval()
    config = getattr(alone, "config", None)
    if getattr(config, "_attn_implementation", None) not in (None, *_RUNNABLE):
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    return alone, norms


class _Stub(nn.Module):
    """Stands for a projection: gives free numbers, the same for all of the batch."""

    def __init__(self, name: str, n_outputs: int, batch: int, order: list[str]) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(len(name) + n_outputs)
        one = 0.5 * torch.randn(1, 2, n_outputs, generator=numbers)
        self.numbers = one.repeat(batch, 1, 1).requires_grad_()
        self.given: Tensor | None = None
        self.name = name
        self.order = order

    def forward(self, inputs: Tensor) -> Tensor:
        self.order.append(self.name)
        self.given = inputs
        return self.numbers.clone()  # a model may write to what a projection gives

    def gradient(self) -> Tensor:
        """``[batch, 2, outputs]``."""
        grad = self.numbers.grad
        return torch.zeros_like(self.numbers) if grad is None else grad


class _Norm(nn.Module):
    """Stands for a norm of q or k: it would make what one head gives depend on its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 0

    def forward(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        self.width = max(self.width, inputs.shape[-1])
        return inputs


class _Fresh:
    """Copies on the CPU, in float32 where floating; with numbers of their own where there are none.

    ``flag`` is what truth values are where there are none; ``guessed`` says that it was used.
    """

    def __init__(self, flag: bool = True) -> None:
        self.flag = flag
        self.guessed = False

    def __call__(self, given: Any) -> Any:
        from transformers import Cache

        if isinstance(given, Tensor):
            return self.tensor(given)
        if isinstance(given, Cache):
            return None
        if isinstance(given, dict):
            return {name: self(each) for name, each in given.items()}
        if isinstance(given, list | tuple):
            return type(given)(self(each) for each in given)
        return given

    def tensor(self, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if not tensor.is_meta:
            return tensor.detach().to("cpu", dtype)
        if dtype.is_floating_point:
            return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2))
        self.guessed = self.guessed or dtype == torch.bool
        return torch.full(tensor.shape, self.flag, dtype=dtype)
