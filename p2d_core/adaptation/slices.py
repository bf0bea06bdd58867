"""New values for some rows or columns of projection weights: what tuning heads changes."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from p2d_core.attention.layout import WeightSlice
from p2d_core.errors import ArtifactError, ModelError

FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows (``dim`` 0) or columns (``dim`` 1) of one module's weight.

    ``index`` says which, int64, rising; ``values`` is what ``weight[index]`` or
    ``weight[:, index]`` gives: ``[k, inputs]`` or ``[outputs, k]``.
    """

    dim: int
    index: Tensor
    values: Tensor


def merged(slices: Iterable[WeightSlice]) -> dict[str, tuple[int, Tensor]]:
    """Module -> (dim, rising index) that covers its slices; what they share is in it once.

    Raises:
        ValueError: one module has both rows and columns.
    """
    positions: dict[str, set[int]] = {}
    dims: dict[str, int] = {}
    for piece in slices:
        if dims.setdefault(piece.module, piece.dim) != piece.dim:
            raise ValueError(
                f"{piece.module} has slices of rows and of columns; one kind it can be"
            )
        positions.setdefault(piece.module, set()).update(range(piece.start, piece.stop))
    return {
        module: (dims[module], torch.tensor(sorted(covered), dtype=torch.int64))
        for module, covered in positions.items()
    }


@dataclass(frozen=True, eq=False)
class TunedSlices:
    """Module path -> the block of its weight that has new values."""

    blocks: Mapping[str, Block]

    @classmethod
    def from_model(cls, model: nn.Module, slices: Iterable[WeightSlice]) -> "TunedSlices":
        """A copy, on the CPU, of what these slices hold in the model now."""
        blocks = {}
        for module, (dim, index) in merged(slices).items():
            weight = _weight(model, module)
            values = weight.detach().index_select(dim, index.to(weight.device))
            blocks[module] = Block(dim, index, values.cpu())
        return cls(blocks)

    def apply_(self, model: nn.Module) -> None:
        """Writes the values into the model's weights, in their precision.

        Raises:
            ModelError: the model has no such modules or they have other shapes.
        """
        weights = {module: self.fitting(model, module) for module in self.blocks}
        for module, weight in weights.items():
            write_block(weight, self.blocks[module])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has these values; after, bit for bit what it had before.

        Raises:
            ModelError: the model has no such modules or they have other shapes.
        """
        before = {}
        for module, block in self.blocks.items():
            weight = self.fitting(model, module)
            old = weight.detach().index_select(block.dim, block.index.to(weight.device))
            before[module] = Block(block.dim, block.index, old)
        try:
            self.apply_(model)
            yield
        finally:
            TunedSlices(before).apply_(model)

    def patched(self, module: str, weight: Tensor) -> Tensor:
        """That module's weight with the new values in it, not to be written to."""
        if module not in self.blocks:
            return weight
        block = self.blocks[module]
        _check(module, block, weight)
        if block.values.shape == weight.shape:
            return block.values.to(weight)
        copy = weight.detach().clone()
        write_block(copy, block)
        return copy

    def save(self, path: Path) -> None:
        """Writes one safetensors file; the dims are JSON in its header."""
        from safetensors.torch import save_file

        tensors = {}
        for module, block in self.blocks.items():
            tensors[f"{module}.index"] = block.index.cpu().contiguous()
            tensors[f"{module}.values"] = block.values.cpu().contiguous()
        dims = {module: block.dim for module, block in sorted(self.blocks.items())}
        header = {"p2d": json.dumps({"format": FORMAT, "dims": dims}, sort_keys=True)}
        save_file(tensors, path, metadata=header)

    @classmethod
    def load(cls, path: Path) -> "TunedSlices":
        """The inverse of `save`.

        Raises:
            ArtifactError: the file is not one that `save` wrote.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["p2d"])
                if header["format"] != FORMAT:
                    raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
                blocks = {
                    module: Block(
                        int(dim),
                        file.get_tensor(f"{module}.index"),
                        file.get_tensor(f"{module}.values"),
                    )
                    for module, dim in header["dims"].items()
                }
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{path} cannot be read as tuned slices: {error!r}. "
                "Remove the artifact's folder to have it made again."
            ) from error
        return cls(blocks)

    def fitting(self, model: nn.Module, module: str) -> Tensor:
        """The weight of a tuned module.

        Raises:
            ModelError: the model has no such module, or the block does not fit its weight.
        """
        weight = _weight(model, module)
        _check(module, self.blocks[module], weight)
        return weight


def _weight(model: nn.Module, module: str) -> Tensor:
    try:
        return model.get_submodule(module).get_parameter("weight")
    except AttributeError as error:
        raise ModelError(
            f"tuned slices of {module} do not fit: {type(model).__name__} has no such module. "
            "Use them with the base model that they were tuned from."
        ) from error


def _check(module: str, block: Block, weight: Tensor) -> None:
    expected = list(weight.shape)
    expected[block.dim] = len(block.index)
    if list(block.values.shape) != expected or int(block.index.max()) >= weight.shape[block.dim]:
        raise ModelError(
            f"tuned slices of {module} do not fit: they are {list(block.values.shape)} with "
            f"{'rows' if block.dim == 0 else 'columns'} up to {int(block.index.max())}, its weight "
            f"is {list(weight.shape)}. Use them with the base model that they were tuned from."
        )


@torch.no_grad()
def write_block(weight: Tensor, block: Block) -> None:
    """Writes a block's values into a weight, in its precision."""
    values = block.values.to(device=weight.device, dtype=weight.dtype)
    weight.index_copy_(block.dim, block.index.to(weight.device), values)
