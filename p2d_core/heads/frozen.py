"""A model of which no weight learns, for rankers that take gradients of few of its values."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter takes a gradient and dropout is off; after, the model is as before.

    What is let take a gradient inside does not stay so.
    """
    moved = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(moved[name])
        model.train(was_training)
