"""The loss of samples' responses under a model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from p2d_core.fused_loss import summed_cross_entropy
from p2d_core.recomputed import recomputed_activations
from p2d_core.samples.tokens import IGNORED_LABEL, needed_mask
from p2d_core.shaping import Shaping, shaping_of

_shapings: WeakKeyDictionary[nn.Module, Shaping | None] = WeakKeyDictionary()
"""By LM head; None: the logits have to be the model's own."""


def token_losses(model: Any, batch: dict[str, Tensor], run: Any = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of each response token, and where there is one.

    Logits are made only where the loss needs them: with a large vocabulary they outweigh the rest
    of the pass.

    Args:
        batch: as `collate` makes it, on the model's device.
        run: what runs the model where it is not called itself (DDP).

    Returns:
        Losses in float32, 0 where no response token stands, and a mask; ``[batch, positions]``.
    """
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORED_LABEL

    def keep(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :-1][wanted].unsqueeze(0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        mask = needed_mask(batch["attention_mask"])
        output = (model if run is None else run)(
            input_ids=batch["input_ids"], attention_mask=mask, use_cache=False
        )
    finally:
        hook.remove()
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    losses[wanted] = cross_entropy(
        output.logits.squeeze(0).float(), targets[wanted], reduction="none"
    )
    return losses, wanted


def summed_loss(model: Any, batch: dict[str, Tensor], run: Any = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) summed over the response tokens, and their number; scalars.

    What `token_losses` gives, with gradients, and without keeping logits or what activation
    functions give for them. Where the head is no plain linear layer, or the model does something
    to its logits that is not known, logits are kept, too.

    Args:
        batch: as `collate` makes it, on the model's device.
        run: what runs the model where it is not called itself (DDP).
    """
    if not torch.is_grad_enabled():
        losses, wanted = token_losses(model, batch, run)
        return losses.sum(), wanted.sum()
    head = model.get_output_embeddings()
    with recomputed_activations(model):
        if type(head) is nn.Linear and _shapings.get(head, Shaping()) is not None:
            total = _fused(model, batch, run, head)
            if total is not None:
                return total, (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
        losses, wanted = token_losses(model, batch, run)
    return losses.sum(), wanted.sum()


def batch_loss(model: Any, batch: dict[str, Tensor], run: Any = None) -> Tensor:
    """Mean cross-entropy (nats) of all response tokens of a batch: what training minimises."""
    total, n_tokens = summed_loss(model, batch, run)
    return total / n_tokens.clamp(min=1)


@torch.inference_mode()
def response_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of each row's response tokens, float32, shape ``[batch]``."""
    losses, wanted = token_losses(model, batch)
    return losses.sum(dim=1) / wanted.sum(dim=1).clamp(min=1)


def _fused(model: Any, batch: dict[str, Tensor], run: Any, head: nn.Linear) -> Tensor | None:
    """The summed loss from the head's inputs; None where the logits' shaping is not known.

    The head itself gives the logits of one position, which show what the model does to them.
    """
    targets = batch["labels"][:, 1:]
    rows, places = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
    hidden: list[Tensor] = []
    raw: list[Tensor] = []

    def narrow(_head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden.append(inputs[0][rows, places])
        one = hidden[-1][:1]
        if not len(rows):
            # a process that has nothing to learn from has to find what the others find
            one = inputs[0][0, batch["attention_mask"][0].argmax()].unsqueeze(0)
        return (one.detach().unsqueeze(0),)

    def finish(_model: nn.Module, _inputs: Any, output: Any) -> Any:
        # before the model's pass is over: what shards it (FSDP2) has the weights here, and hangs
        # its own backward pass on what the model returns
        if head not in _shapings:
            _shapings[head] = shaping_of(model.config, raw[-1].detach(), output.logits.detach())
        shaping = _shapings[head]
        output.logits = None
        if shaping is not None:
            output.logits = summed_cross_entropy(
                hidden[-1], head.weight, head.bias, targets[rows, places], shaping, raw[-1].dtype
            )
        return output

    with ExitStack() as hooks:
        for hook in (
            head.register_forward_pre_hook(narrow),
            head.register_forward_hook(lambda _head, _inputs, output: raw.append(output)),
            model.register_forward_hook(finish, prepend=True),
        ):
            hooks.callback(hook.remove)
        output = (model if run is None else run)(
            input_ids=batch["input_ids"],
            attention_mask=needed_mask(batch["attention_mask"]),
            use_cache=False,
        )
    total: Tensor | None = output.logits
    return total
