"""What moved as a plain PEFT adapter: exact LoRAs, and whole modules for what no LoRA says."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from p2d_core.adaptation.exact_lora import addend, export_lora
from p2d_core.adaptation.slices import Block, TunedSlices, write_block
from p2d_core.errors import ExportError
from p2d_core.export.moved import Moved

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST = 1.5
"""Times the numbers of a layer that its LoRA may have. It is more than 1 because servers that take
LoRAs often take no whole modules, and because under GQA k and v have few rows: all of them are
still a small rank."""


@dataclass(frozen=True)
class LoraParts:
    """What an adapter consists of."""

    slices: TunedSlices
    """Rows or columns of linear weights: a LoRA of as many ranks."""
    whole: Mapping[str, Mapping[str, Tensor]]
    """Modules that take the place of the base's (PEFT's ``modules_to_save``): what has a moved
    bias or norm, and linear layers whose LoRA would be too large (`MOST`), or off by a rounding."""
    n_bytes: int

    @property
    def rank(self) -> int:
        """The largest rank of a LoRA in it; 0 without one."""
        return max((len(block.index) for block in self.slices.blocks.values()), default=0)

    def write(self, base: nn.Module, folder: Path, base_name: str, base_revision: str = "") -> None:
        """Writes the adapter; ``base`` has its own values in what moved."""
        export_lora(self.slices, base, folder, base_name, self.whole, base_revision)


def lora_parts(moved: Moved, base: nn.Module) -> LoraParts:
    """How an adapter says what moved.

    Args:
        base: the base, in the precision that the adapter will be loaded over.

    Raises:
        ExportError: an embedding, a weight that modules share, or a parameter of a module with
            modules of its own moved, which PEFT's adapters cannot say one by one.
    """
    shared = Counter(id(each) for _, each in base.named_parameters(remove_duplicate=False))
    blocks: dict[str, Block] = {}
    whole: dict[str, None] = {}
    for name, block in moved.items():
        path, _, leaf = name.rpartition(".")
        module = base.get_submodule(path)
        if (
            not path
            or isinstance(module, nn.Embedding)
            or any(True for _ in module.children())
            or shared[id(base.get_parameter(name))] > 1
        ):
            raise ExportError(
                f"{name} moved, and no LoRA adapter says so: it is no weight, bias or norm of a "
                f"layer of its own ({type(module).__name__})."
            )
        is_linear = isinstance(module, nn.Linear | Conv1D) and leaf == "weight"
        weight = base.get_parameter(name).detach()
        if (
            is_linear
            and _lora_values(module, block) < MOST * weight.numel()
            and _is_exact(weight, block)
        ):
            blocks[path] = block
        else:
            whole[path] = None
    slices = TunedSlices({path: each for path, each in blocks.items() if path not in whole})
    return LoraParts(
        slices,
        {path: _new_values(base.get_submodule(path), path, moved) for path in whole},
        sum(_lora_values(base.get_submodule(p), each) for p, each in slices.blocks.items()) * 4
        + sum(_own_bytes(base.get_submodule(path)) for path in whole),
    )


def copy_low_rank(adapter: Path, folder: Path, base_name: str, base_revision: str = "") -> None:
    """Copies an adapter that was trained as a LoRA, which names its base anew."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base_name, "revision": base_revision or None}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)


def _lora_values(module: Any, block: Block) -> int:
    """Of both factors; they are kept in float32."""
    rows, columns = module.weight.shape
    return len(block.index) * int(rows + columns)


def _is_exact(weight: Tensor, block: Block) -> bool:
    """Whether adding the change gives the new values bit for bit, in the weight's precision."""
    before = weight.index_select(block.dim, block.index)
    change = addend(weight, block)
    return torch.equal((before.to(change.dtype) + change).to(weight), block.values.to(weight))


def _own_bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.itemsize for each in module.parameters(recurse=False))


@torch.no_grad()
def _new_values(module: nn.Module, path: str, moved: Moved) -> dict[str, Tensor]:
    values = {}
    for name, parameter in module.named_parameters(recurse=False):
        values[name] = parameter.detach().clone()
        if (block := moved.get(f"{path}.{name}")) is not None:
            write_block(values[name], block)
    return values
