"""Cosine similarity to the nearest of a few reference vectors."""

from torch import Tensor


def nearest_mean(similarities: Tensor, neighbours: int) -> Tensor:
    """Mean of the highest ``neighbours`` entries of each row; ``[n, references]`` to ``[n]``.

    With fewer references than that, of all of them.
    """
    count = min(neighbours, similarities.shape[1])
    return similarities.topk(count, dim=1).values.mean(dim=1)


def nearest_mean_of_others(similarities: Tensor, neighbours: int) -> Tensor:
    """`nearest_mean` of references to each other, each left out of its own row; ``[n, n]``.

    There have to be at least 2.
    """
    others = similarities.clone()
    others.fill_diagonal_(-float("inf"))
    return nearest_mean(others, min(neighbours, len(others) - 1))
