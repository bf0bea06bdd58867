"""Only the task heads' slices move: each is a small trainable delta of its frozen weight."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from p2d_core.adaptation.slices import Block, TunedSlices, merged
from p2d_core.attention.layout import ROLES, AttentionLayer, Role, slices_of
from p2d_core.errors import TrainingError


class Sliced(nn.Module):
    """A frozen projection with a trainable delta on some of its weight's rows or columns.

    ``weight`` and ``bias`` are the very parameters of the projection that it stands for, so that
    state dicts keep their names. The delta is kept in the weight: when ``delta`` may have moved,
    the next pass writes ``base + delta`` to ``weight[index]`` (``dim`` 0) or ``weight[:, index]``
    (``dim`` 1), so that a pass is one matrix product each way. ``delta`` starts at zero; it is
    float32 where the weight is of lower precision.
    """

    weight: Any
    bias: Any
    base: Tensor
    index: Tensor

    def _stand_for(self, linear: Any, dim: int, index: Tensor) -> None:
        nn.Module.__init__(self)  # not that of the projection: it would make a second weight
        self.weight, self.bias = linear.weight, linear.bias
        self.dim = dim
        where = index.to(linear.weight.device)
        self.register_buffer("index", where, persistent=False)
        base = linear.weight.detach().index_select(dim, where)
        self.register_buffer("base", base, persistent=False)
        dtype = torch.promote_types(base.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros_like(base, dtype=dtype))
        self.written: int | None = self.delta._version
        """The version of ``delta`` that stands in the weight; None once a gradient came, because
        fused optimizers do not count versions."""
        self.weight_is_gathered = False
        """Processes hold shares of it (FSDP2): each pass, either way, begins with the base's."""
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        self._write()
        device = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        flat = input.reshape(-1, input.shape[-1]).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            output: Tensor = _SliceGradient.apply(  # type: ignore[no-untyped-call]
                flat, self.weight.to(dtype), bias, self.delta, self
            )
        return output.view(*input.shape[:-1], -1)

    @property
    def outputs_along(self) -> int:
        """The dimension of the weight in which its outputs stand."""
        return 0

    @torch.no_grad()
    def _write(self) -> None:
        if self.weight_is_gathered or self.written != self.delta._version:
            self.weight.index_copy_(self.dim, self.index, self._values())
            self.written = self.delta._version

    def _values(self) -> Tensor:
        return (self.base.to(self.delta.dtype) + self.delta.detach()).to(self.weight.dtype)

    @torch.no_grad()
    def reset(self) -> None:
        """Gives the weight its base values back."""
        self.weight.index_copy_(self.dim, self.index, self.base)

    def tuned_block(self) -> Block:
        """The new values of the slices, in the weight's precision; on the CPU."""
        return Block(self.dim, self.index.cpu(), self._values().cpu())

    def extra_repr(self) -> str:
        kind = "rows" if self.dim == 0 else "columns"
        return f"{super().extra_repr()}, tuned_{kind}={len(self.index)}"


class SlicedLinear(Sliced, nn.Linear):
    """With a weight ``[outputs, inputs]``."""

    def __init__(self, linear: nn.Linear, dim: int, index: Tensor) -> None:
        self._stand_for(linear, dim, index)
        self.in_features, self.out_features = linear.in_features, linear.out_features


class SlicedConv1D(Sliced, Conv1D):
    """With a weight ``[inputs, outputs]``."""

    def __init__(self, conv: Conv1D, dim: int, index: Tensor) -> None:
        self._stand_for(conv, dim, index)
        self.nx, self.nf = conv.weight.shape

    @property
    def outputs_along(self) -> int:
        return 1


def sliced(projection: nn.Module, dim: int, index: Tensor) -> Sliced:
    """What stands for a projection while some of its rows or columns move."""
    kind = SlicedConv1D if isinstance(projection, Conv1D) else SlicedLinear
    return kind(projection, dim, index)  # type: ignore[arg-type]


@dataclass(eq=False)
class HeadDeltas:
    """A model whose task heads are being tuned; what `attach_head_deltas` put into it."""

    model: nn.Module
    modules: dict[str, Sliced]
    _linears: dict[str, Any] = field(repr=False)
    _moved: dict[str, bool] = field(repr=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The deltas: all that an optimizer needs to see."""
        for module in self.modules.values():
            yield module.delta

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
            module.reset()
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
    roles: Sequence[Role] = ROLES,
) -> HeadDeltas:
    """Freezes the model and puts trainable deltas on the slices of these heads.

    A head's slices are those of its q and o and of the k and v of its KV group, as far as
    ``roles`` has them; a group's come once however many of the heads read them. Biases stay as they
    are.

    Raises:
        HeadMapError: a head is not in the model.
        TrainingError: there are no heads to tune.
    """
    blocks = merged(slices_of(layers, heads, roles))
    if not blocks:
        raise TrainingError("no heads were given to tune, so that nothing could learn.")
    moved = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    linears, modules = {}, {}
    for path, (dim, index) in blocks.items():
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear | Conv1D) or isinstance(linear, Sliced):
            raise ValueError(f"{path} is {type(linear).__name__}, not a plain linear projection")
        linears[path] = linear
        modules[path] = sliced(linear, dim, index)
    for path, module in modules.items():
        model.set_submodule(path, module)
    return HeadDeltas(model, modules, linears, moved)


class _SliceGradient(torch.autograd.Function):
    """``inputs @ weight.T + bias``, with a gradient for a slice of the weight and not for the rest.

    With a transposed weight it is ``inputs @ weight + bias``.
    ``delta`` stands for the slice; what it adds is in the weight already. Of the inputs no more is
    kept for the backward pass than the slice's gradient needs: all for a slice of its outputs, the
    slice for one of its inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        module: Sliced,
    ) -> Tensor:
        ctx.module = module
        of_outputs = module.dim == module.outputs_along
        seen = inputs if of_outputs else inputs.index_select(1, module.index)
        weight = weight if module.outputs_along == 0 else weight.t()
        ctx.save_for_backward(seen, weight)
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight = ctx.saved_tensors
        module: Sliced = ctx.module
        if module.weight_is_gathered:
            module._write()
        grad_inputs = grad_delta = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_inputs = grad @ weight
            if ctx.needs_input_grad[3]:
                of_outputs = module.dim == module.outputs_along
                of_slice = grad.index_select(1, module.index) if of_outputs else grad
                product = of_slice.t() @ seen if module.outputs_along == 0 else seen.t() @ of_slice
                grad_delta = product.to(module.delta.dtype)
                module.written = None
        return grad_inputs, None, None, grad_delta, None
