"""Only the task heads' slices move: each is a small trainable delta beside its frozen weight."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from p2d_core.adaptation.slices import Block, TunedSlices, merged
from p2d_core.attention.layout import AttentionLayer, slices_of
from p2d_core.errors import TrainingError


class SlicedLinear(nn.Linear):
    """A frozen linear projection with a trainable delta on some of its rows or columns.

    ``weight`` and ``bias`` are the very parameters of the projection that it stands for, so that
    state dicts keep their names; ``delta`` is added to ``weight[index]`` (``dim`` 0) or
    ``weight[:, index]`` (``dim`` 1) and starts at zero. It is float32 where the weight is of lower
    precision.
    """

    def __init__(self, linear: nn.Linear, dim: int, index: Tensor) -> None:
        nn.Module.__init__(self)  # not Linear's: it would make a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dim, self.index = dim, index
        self.runs = _runs(index)
        shape = list(linear.weight.shape)
        shape[dim] = len(index)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros(shape, dtype=dtype, device=linear.weight.device))
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        flat = input.reshape(-1, self.in_features).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            output: Tensor = _SlicedProduct.apply(  # type: ignore[no-untyped-call]
                flat, self.weight.to(dtype), bias, self.delta.to(dtype), self.dim, self.runs
            )
        return output.view(*input.shape[:-1], self.out_features)

    def tuned_block(self) -> Block:
        """The new values of the slices, in the weight's precision; on the CPU."""
        weight = self.weight.detach()
        index = self.index.to(weight.device)
        old = weight.index_select(self.dim, index)
        values = (old.to(self.delta.dtype) + self.delta.detach()).to(weight.dtype)
        return Block(self.dim, self.index, values.cpu())

    def extra_repr(self) -> str:
        kind = "rows" if self.dim == 0 else "columns"
        return f"{super().extra_repr()}, tuned_{kind}={len(self.index)}"


@dataclass(eq=False)
class HeadDeltas:
    """A model whose task heads are being tuned; what `attach_head_deltas` put into it."""

    model: nn.Module
    modules: dict[str, SlicedLinear]
    _linears: dict[str, nn.Linear] = field(repr=False)
    _moved: dict[str, bool] = field(repr=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The deltas: all that an optimizer needs to see."""
        for module in self.modules.values():
            yield module.delta

    @property
    def n_trainable(self) -> int:
        """How many numbers move."""
        return sum(delta.numel() for delta in self.parameters())

    def tuned(self) -> TunedSlices:
        """The slices' new values, in the base weights' precision.

        Raises:
            TrainingError: one is not finite.
        """
        blocks = {path: module.tuned_block() for path, module in self.modules.items()}
        for path, block in blocks.items():
            if not bool(torch.isfinite(block.values).all()):
                raise TrainingError(
                    f"tuning {path} gave values that are not finite. Lower the learning rate."
                )
        return TunedSlices(blocks)

    def detach(self, merge: bool) -> None:
        """Puts the original projections back, with the new values in them where ``merge``.

        What may move is again what it was before the deltas came.
        """
        tuned = self.tuned() if merge else None
        for path, linear in self._linears.items():
            module = self.modules[path]
            linear.weight, linear.bias = module.weight, module.bias
            linear.train(module.training)
            self.model.set_submodule(path, linear)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._moved[name])
        if tuned is not None:
            tuned.apply_(self.model)


def attach_head_deltas(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    heads: Iterable[tuple[int, int]],
    include_kv: bool = True,
) -> HeadDeltas:
    """Freezes the model and puts trainable deltas on the slices of these heads.

    A head's slices are its q rows, its o columns and, where ``include_kv``, the k and v rows of
    its KV group, which come once however many of the heads read them. Biases stay as they are.

    Raises:
        HeadMapError: a head is not in the model.
        TrainingError: there are no heads to tune.
    """
    blocks = merged(slices_of(layers, heads, include_kv))
    if not blocks:
        raise TrainingError("no heads were given to tune, so that nothing could learn.")
    moved = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    linears, modules = {}, {}
    for path, (dim, index) in blocks.items():
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear) or isinstance(linear, SlicedLinear):
            raise ValueError(f"{path} is {type(linear).__name__}, not a plain linear projection")
        linears[path] = linear
        modules[path] = SlicedLinear(linear, dim, index)
    for path, module in modules.items():
        model.set_submodule(path, module)
    return HeadDeltas(model, modules, linears, moved)


def _runs(index: Tensor) -> tuple[tuple[int, int, int], ...]:
    """(start, stop, offset) of each stretch of neighbours; offset is its place in ``index``."""
    runs: list[tuple[int, int, int]] = []
    for offset, position in enumerate(index.tolist()):
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1, runs[-1][2])
        else:
            runs.append((position, position + 1, offset))
    return tuple(runs)


class _SlicedProduct(torch.autograd.Function):
    """``inputs @ (weight with delta in it).T + bias``, without a gradient for the weight.

    Forward and backward are the frozen projection's own matrix products, plus thin ones over the
    slices that are added in place: no weight, gradient or activation is copied whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        dim: int,
        runs: tuple[tuple[int, int, int], ...],
    ) -> Tensor:
        output = nn.functional.linear(inputs, weight, bias)
        for start, stop, at in runs:
            size = stop - start
            if dim == 0:
                output[:, start:stop].addmm_(inputs, delta.narrow(0, at, size).t())
            else:
                output.addmm_(inputs[:, start:stop], delta.narrow(1, at, size).t())
        ctx.dim, ctx.runs = dim, runs
        ctx.save_for_backward(inputs, weight, delta)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, delta = ctx.saved_tensors
        grad_inputs = grad_delta = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_inputs = grad @ weight
            if ctx.needs_input_grad[3]:
                grad_delta = torch.empty_like(delta)
            for start, stop, at in ctx.runs:
                size = stop - start
                part = delta.narrow(ctx.dim, at, size)
                if ctx.dim == 0:
                    if grad_inputs is not None:
                        grad_inputs.addmm_(grad[:, start:stop], part)
                    if grad_delta is not None:
                        grad_delta[at : at + size] = grad[:, start:stop].t() @ inputs
                else:
                    if grad_inputs is not None:
                        grad_inputs[:, start:stop].addmm_(grad, part)
                    if grad_delta is not None:
                        grad_delta[:, at : at + size] = grad.t() @ inputs[:, start:stop]
        return grad_inputs, None, None, grad_delta, None, None
