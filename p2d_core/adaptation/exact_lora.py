"""Tuned head slices as a plain PEFT LoRA adapter, which gives the tuned model back."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from p2d_core.adaptation.slices import Block, TunedSlices
from p2d_core.errors import TrainingError


def export_lora(tuned: TunedSlices, model: nn.Module, folder: Path, base_name: str) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``.

    A change of k rows or columns is a LoRA of rank k whose one side is one-hot: for rows A is the
    change and B says where it goes, for columns A says where it comes from and B is the change.
    A transposed weight (Conv1D) is taken the other way round, as PEFT does. The scale is 1, so
    that merging adds the change and nothing else.

    Args:
        model: the base, with its own values in the slices.
        base_name: what ``AutoModelForCausalLM.from_pretrained`` takes to load the base.

    Raises:
        TrainingError: no module is tuned, so that there is no adapter to write.
        ModelError: the slices are of another model.
    """
    from peft import LoraConfig, TaskType
    from safetensors.torch import save_file

    if not tuned.blocks:
        raise TrainingError("nothing was tuned, so that there is no adapter to export.")
    tensors = {}
    ranks = {}
    transposed = False  # models have one kind of projection
    for module, block in tuned.blocks.items():
        weight = model.get_submodule(module).get_parameter("weight").detach()
        change = addend(weight, tuned.patched(module, weight), block)
        a, b = _factors(change, block, weight.shape[block.dim])
        if transposed := isinstance(model.get_submodule(module), Conv1D):
            a, b = b.t().contiguous(), a.t().contiguous()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        # anchored: PEFT matches a bare key at the end of longer paths, too
        ranks[f"^{re.escape(module)}"] = len(block.index)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        inference_mode=True,
        target_modules=sorted(tuned.blocks),
        r=1,
        lora_alpha=1,
        lora_dropout=0.0,
        fan_in_fan_out=transposed,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    _sort_keys(folder / "adapter_config.json")


def addend(base: Tensor, target: Tensor, block: Block) -> Tensor:
    """What has to be added to the base's slices to give the target's, ``[k, ...]`` or ``[..., k]``.

    In float32 where the base is of lower precision, as PEFT adds it. Where the target was itself
    made by adding a delta to the base in that precision, as head deltas are, adding this gives it
    back bit for bit; else it can be off by the rounding of the change.
    """
    index = block.index.to(base.device)
    dtype = torch.promote_types(base.dtype, torch.float32)
    old, new = (each.index_select(block.dim, index).to(dtype) for each in (base, target))
    return (new - old).cpu()


def _factors(change: Tensor, block: Block, along: int) -> tuple[Tensor, Tensor]:
    """Which B @ A is the change: A ``[k, columns]`` and B ``[rows, k]``.

    ``along`` is the weight's size where k counts.
    """
    k = len(block.index)
    index = block.index.cpu()
    ranks = torch.arange(k)
    if block.dim == 0:
        b = torch.zeros(along, k, dtype=change.dtype)
        b[index, ranks] = 1
        return change.contiguous(), b
    a = torch.zeros(k, along, dtype=change.dtype)
    a[ranks, index] = 1
    return a, change.contiguous()


def _sort_keys(path: Path) -> None:
    """PEFT writes sets in the order of their hashes; sorted, the same adapter is the same file."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
