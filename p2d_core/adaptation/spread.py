"""A model that several processes train together: a copy in each (DDP), or a share (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from p2d_core.adaptation.masked import Sliced
from p2d_core.processes import Processes


@dataclass(frozen=True)
class Spread:
    """What of a model is in this process."""

    model: Any
    """Has the parameters that an optimizer moves: the model itself, or with FSDP2 its shares."""
    run: Any
    """What a batch is given to: the same, or with DDP its wrapper."""


@contextmanager
def spread(model: nn.Module, processes: Processes) -> Iterator[Spread]:
    """While its block runs, gradients are the mean over the processes' own.

    When it ends, what was trained stands in ``model``; with FSDP2 in that of the first process,
    and nowhere in the others'. With one process it is the model as it is.
    """
    if processes.size == 1:
        yield Spread(model, model)
    elif processes.shards_model:
        shares = _sharded(model)
        yield Spread(shares, shares)
        _gather(shares, model, keep=processes.first)
    else:
        device = next(model.parameters()).device
        # the first process' values are sent to all; buffers are constants
        copies = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        yield Spread(model, copies)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a share, from all of them; others as they are.

    With shares all processes have to call it.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        gathered: Tensor = tensor.full_tensor()
        return gathered
    return tensor


def share_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process' share of a whole tensor, if it has one of the parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        on_device = tensor.to(parameter.device)
        # every process has the whole: none has to send it
        return distribute_tensor(
            on_device, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return tensor


def whole_states(optimizer: torch.optim.Optimizer) -> None:
    """From now on its state dict has whole tensors, and one with whole tensors can be loaded.

    A checkpoint then does not depend on the number of processes. All of them have to ask for the
    state dict.
    """

    def gather(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        states = {
            index: {name: whole(value) for name, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return {**state, "state": states}

    def scatter(of: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [p for group in of.param_groups for p in group["params"]]
        states = {
            index: {name: share_like(value, parameters[index]) for name, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return {**state, "state": states}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(scatter)


def _sharded(model: nn.Module) -> nn.Module:
    """The model's modules once more, over shares of its parameters; the model waits on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    kind = next(model.parameters()).device.type
    model.to("cpu")
    same: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    same |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    shares = copy.deepcopy(model, same)
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    # a layer of the model is gathered while it runs, the rest for a whole pass
    for module in reversed([*shares.modules()]):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(shares, mesh=mesh)
    for module in shares.modules():
        if isinstance(module, Sliced):
            module.weight_is_gathered = True
    return shares


@torch.no_grad()
def _gather(shares: nn.Module, model: nn.Module, keep: bool) -> None:
    trained = dict(shares.named_parameters())
    device = next(shares.parameters()).device
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = whole(trained[name].detach())
            if keep:
                parameter.copy_(values)
    if keep:
        model.to(device)
