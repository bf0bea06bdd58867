"""Tuned head slices as a plain PEFT LoRA adapter, which gives the tuned model back."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from p2d_core.adaptation.slices import Block, TunedSlices
from p2d_core.errors import TrainingError


def export_lora(
    tuned: TunedSlices,
    model: nn.Module,
    folder: Path,
    base_name: str,
    whole: Mapping[str, Mapping[str, Tensor]] | None = None,
    base_revision: str = "",
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``.

    A change of k rows or columns is a LoRA of rank k whose one side is one-hot: for rows A is the
    change and B says where it goes, for columns A says where it comes from and B is the change.
    A transposed weight (Conv1D) is taken the other way round, as PEFT does. The scale is 1, so
    that merging adds the change and nothing else.

    Args:
        model: the base, with its own values in the slices.
        base_name: what ``AutoModelForCausalLM.from_pretrained`` takes to load the base.
        whole: modules that take the place of the base's (PEFT's ``modules_to_save``), for what no
            LoRA says, such as biases and norms: path -> every parameter of the module by its name.
        base_revision: commit of the base on a hub; empty: none is named.

    Raises:
        TrainingError: no module is tuned, so that there is no adapter to write.
        ModelError: the slices are of another model.
    """
    from peft import LoraConfig, TaskType
    from peft.utils.constants import DUMMY_TARGET_MODULES
    from safetensors.torch import save_file

    if not tuned.blocks and not whole:
        raise TrainingError("nothing was tuned, so that there is no adapter to export.")
    tensors = {}
    ranks = {}
    transposed = False  # models have one kind of projection
    for module, block in tuned.blocks.items():
        weight = tuned.fitting(model, module).detach()
        change = addend(weight, block)
        a, b = _factors(change, block, weight.shape[block.dim])
        if transposed := isinstance(model.get_submodule(module), Conv1D):
            a, b = b.t().contiguous(), a.t().contiguous()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        # anchored: PEFT matches a bare key at the end of longer paths, too
        ranks[f"^{re.escape(module)}"] = len(block.index)
    for module, parameters in (whole or {}).items():
        for name, values in parameters.items():
            tensors[f"base_model.model.{module}.{name}"] = values.detach().cpu().contiguous()
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        revision=base_revision or None,
        inference_mode=True,
        target_modules=sorted(tuned.blocks) or DUMMY_TARGET_MODULES,
        r=1,
        lora_alpha=1,
        lora_dropout=0.0,
        fan_in_fan_out=transposed,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        modules_to_save=sorted(whole) if whole else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    _sort_keys(folder / "adapter_config.json")


def addend(base: Tensor, block: Block) -> Tensor:
    """What has to be added to a base's weight to give a block's values; of their shape.

    In float32 where the base is of lower precision, as PEFT adds it. Where the values were
    themselves made by adding a delta to the base in that precision, as head deltas are, adding this
    gives them back bit for bit; else it can be off by the rounding of the change.
    """
    old = base.index_select(block.dim, block.index.to(base.device))
    dtype = torch.promote_types(base.dtype, torch.float32)
    return (block.values.to(old.device, dtype) - old.to(dtype)).cpu()


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
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
