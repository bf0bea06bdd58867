"""What an adaptation changed in its base: of each parameter the rows or columns that differ."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from p2d_core.adaptation.slices import Block, write_block

Moved = Mapping[str, Block]
"""Parameter name -> what of it has new values."""


@torch.no_grad()
def what_moved(base: nn.Module, tuned: nn.Module) -> dict[str, Block]:
    """Every parameter that differs, whatever it is of; the smaller of its rows and its columns.

    Both models have the same parameters, on the CPU. A bias or a norm has entries for rows.
    """
    before = dict(base.named_parameters())
    blocks = {}
    for name, new in tuned.named_parameters():
        differs = new != before[name]
        if bool(differs.any()):
            blocks[name] = _block(differs, new)
    return blocks


def write_moved(moved: Moved, model: nn.Module) -> None:
    """Writes the new values into the model, in its precision."""
    for name, block in moved.items():
        write_block(model.get_parameter(name), block)


def n_values(moved: Moved) -> int:
    """How many numbers the blocks have."""
    return sum(block.values.numel() for block in moved.values())


def _block(differs: Tensor, new: Tensor) -> Block:
    if differs.ndim < 2:
        places = [(0, differs)]
    else:
        places = [(dim, differs.transpose(0, dim).flatten(1).any(1)) for dim in (0, 1)]
    dim, entries = min(places, key=lambda place: int(place[1].sum()) / place[1].numel())
    index = entries.nonzero().flatten()
    return Block(dim, index.cpu(), new.detach().index_select(dim, index).cpu())
