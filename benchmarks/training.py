"""A training step that moves the task heads alone, against full fine-tuning and LoRA."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counted import backward_operations, forward_operations
from benchmarks.figures import RUNS, Figure, alternate, figure
from benchmarks.generated import captured, random_model, samples
from benchmarks.memory import Made, peak_megabytes
from benchmarks.sizes import Shape, Size
from p2d_core.adaptation.masked import attach_head_deltas
from p2d_core.attention.layout import attention_layers
from p2d_core.response_loss import batch_loss
from p2d_core.samples.tokens import collate

Heads = Sequence[tuple[int, int]]
Figures = Callable[["_Bench"], Iterator[Figure]]
Moving = tuple[list[nn.Parameter], bool]
"""What moves, and whether it is the network's own weights."""
NOT_COUNTED = "operations of the products; AdamW and norms are not counted"
LossOf = Callable[[Any, dict[str, Tensor]], Tensor]


def loss_as_it_is(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As transformers makes it: logits at every position."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def measure(size: Size) -> Iterator[Figure]:
    """`masked_vs_full_step`, its upper half, both of LoRA, and `masked_vs_full_memory`."""
    for shape in size.trained_shapes:
        yield from _with_rows_that_fit(size, shape, _Bench.steps)
    for shape in size.kept_shapes:
        yield from _with_rows_that_fit(size, shape, _Bench.memory)


def _with_rows_that_fit(size: Size, shape: Shape, figures: Figures) -> Iterator[Figure]:
    rows = size.train_rows
    while rows and (made := _fitting(replace(size, train_rows=rows), shape, figures)) is None:
        print(f"{shape.name}: a full fine-tuning step of {rows} samples does not fit")
        # outside of `except`: there the error would still hold the tensors of what failed
        gc.collect()
        torch.cuda.empty_cache()
        rows //= 2
    yield from made if rows and made else ()


def _fitting(size: Size, shape: Shape, figures: Figures) -> list[Figure] | None:
    """None where memory runs out."""
    try:
        return list(figures(_Bench(size, shape)))
    except torch.OutOfMemoryError:
        return None


class _Bench:
    """One model, one batch; the arms take turns in the same weights."""

    def __init__(self, size: Size, shape: Shape) -> None:
        self.size, self.shape = size, shape
        self.network = random_model(shape, size)
        model = captured(self.network, size)
        rows = model.encode(samples(size.train_rows, seed=4))
        self.batch = {k: v.to(model.device) for k, v in collate(rows, model.pad_id).items()}
        self.tokens = int(self.batch["attention_mask"].sum())
        self.mean = sum(len(row) ** 2 for row in rows) / self.tokens
        longest = self.batch["input_ids"].shape[1]
        self.where = f"{size.train_rows} samples, {self.tokens:,} tokens, padded to {longest}"

    def arms(self) -> dict[str, Arm]:
        """Full fine-tuning, task heads in every layer, and in the upper half."""
        n_layers = self.shape.layers
        return {
            "full": full(self.network),
            "masked": masked(self.network, spread(self.shape, 0, n_layers)),
            "upper": masked(self.network, spread(self.shape, n_layers // 2, n_layers)),
        }

    def steps(self) -> Iterator[Figure]:
        """Seconds of a step."""
        n_layers, arms = self.shape.layers, self.arms()
        arms["lora"] = lora(self.network, arms["masked"].n_moving)
        steps = {name: self.step(arm) for name, arm in arms.items()}
        steps["lora as it is"] = self.step(arms["lora"], loss_as_it_is)
        seconds = dict(zip(steps, alternate(*steps.values()), strict=True))
        worst, where = _worst(arms["masked"]), self.where
        of_lora = f"{arms['lora'].n_moving:,} parameters of LoRA on q, k, v move"
        others = {
            "full": "step of all parameters",
            "lora": "step of PEFT LoRA on q, k, v, with the loss of P2D",
            "lora as it is": "step of PEFT LoRA on q, k, v, with the loss of transformers",
        }
        for name, arm, other, goal, what, floor, note in (
            ("masked_vs_full_step", "masked", "full", 0.67, worst, self.floor(0), where),
            (
                "masked_upper_half_vs_full_step", "upper", "full", 0.6,
                f"lowest task head in layer {n_layers // 2}", self.floor(n_layers // 2), where,
            ),
            ("masked_vs_lora_step", "masked", "lora as it is", 0.95, worst, None, of_lora),
            (
                "masked_vs_lora_step_same_loss", "masked", "lora", 1.0, worst,
                self.floor_of_lora(arms["masked"].n_moving, arms["lora"].n_moving), of_lora,
            ),
        ):  # fmt: skip
            yield figure(
                name,
                f"step of head deltas ({what})",
                others[other],
                (seconds[arm], seconds[other]),
                goal=goal,
                model=self.shape.name,
                floor=floor,
                floor_of=NOT_COUNTED,
                note=note,
            )

    def memory(self) -> Iterator[Figure]:
        """Bytes beyond the weights, and seconds of a step of a shape of which none are timed."""
        arms = {name: arm for name, arm in self.arms().items() if name != "upper"}
        kept: dict[str, Kept] = {}

        def first(name: str) -> None:
            kept[name] = self.first_step(arms[name])

        peaks = {name: peak_megabytes(partial(first, name)) for name in arms}
        is_timed = self.shape in self.size.trained_shapes
        runs = 1 if is_timed else RUNS
        steps = [self.step(arm) for arm in arms.values()]
        times = alternate(*steps, runs=runs, warm_up=0)
        seconds = dict(zip(arms, times, strict=True))
        what, full = f"({_worst(arms['masked'])})", "step of all parameters"
        if not is_timed:
            yield figure(
                "masked_vs_full_step",
                f"step of head deltas {what}",
                full,
                (seconds["masked"], seconds["full"]),
                goal=0.67,
                model=self.shape.name,
                floor=self.floor(0),
                floor_of=NOT_COUNTED,
                note=self.where,
            )
        yield figure(
            "masked_vs_full_memory",
            f"bytes beyond the weights {what}",
            "bytes beyond the weights, all parameters",
            (seconds["masked"], seconds["full"]),
            ratios=[kept["masked"].total / kept["full"].total],
            goal=0.2,
            model=self.shape.name,
            floor=kept["masked"].state / kept["full"].state,
            floor_of="gradients and optimizer state alone, no activation kept",
            note=(
                f"{kept['masked']} against {kept['full']}; peak of the first step, its state "
                f"included, {peaks['masked']:.0f} against {peaks['full']:.0f} MB; {self.where}"
            ),
        )

    def step(self, arm: Arm, loss_of: LossOf = batch_loss) -> Callable[[], None]:
        """Forward, backward, clipping, AdamW."""

        def run() -> None:
            arm.ready()
            arm.model.train()
            loss_of(arm.model, self.batch).backward()
            torch.nn.utils.clip_grad_norm_(arm.parameters, 1.0)
            arm.optimizer.step()
            arm.optimizer.zero_grad(set_to_none=True)

        return run

    def first_step(self, arm: Arm) -> Kept:
        """What lies in memory between forward and backward, and after it; weights not counted."""
        weights = {p.untyped_storage().data_ptr() for p in arm.model.parameters()}
        arm.ready()
        arm.model.train()
        with Made(but=weights) as made:
            loss = batch_loss(arm.model, self.batch)
        activations = made.still_there()
        loss.backward()
        gradients = sum(p.grad.nbytes for p in arm.parameters if p.grad is not None)
        arm.optimizer.step()
        arm.optimizer.zero_grad(set_to_none=True)
        state = sum(
            value.nbytes
            for each in arm.optimizer.state.values()
            for value in each.values()
            if isinstance(value, Tensor)
        )
        return Kept(gradients + state, activations)

    def floor(self, lowest: int) -> float:
        """Of a full step's products: forward, and the inputs' gradients down to ``lowest``.

        A full step has the weights' gradients too: as many products as forward, but attention's.
        """
        shape, tokens = self.shape, self.mean
        forward = forward_operations(shape, tokens)
        of_weights = forward_operations(shape, 0)
        full = forward + backward_operations(shape, tokens) + of_weights
        return (forward + backward_operations(shape, tokens, lowest)) / full

    def floor_of_lora(self, n_slices: int, n_lora: int) -> float:
        """Of a LoRA step's products, where slices need their gradients alone, and LoRA passes too.

        Both run the frozen products forward, and back for the inputs' gradients.
        """
        shape, tokens = self.shape, self.mean
        frozen = forward_operations(shape, tokens) + backward_operations(shape, tokens)
        return (frozen + 2 * n_slices) / (frozen + 6 * n_lora)


def _worst(masked: Arm) -> str:
    return f"task heads in every layer, {masked.n_moving:,} parameters move"


@dataclass
class Kept:
    """Bytes beyond the weights."""

    state: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.activations

    def __str__(self) -> str:
        return f"{self.state / 2**20:.0f} MB state + {self.activations / 2**20:.0f} MB activations"


class Arm:
    """A way to train the network's weights; every arm has modules of its own around them."""

    def __init__(self, model: Any, weights: Sequence[nn.Parameter], moving: Moving) -> None:
        self.model, self.weights = model, weights
        self.parameters, self.moves_weights = moving
        self.n_moving = sum(p.numel() for p in self.parameters)
        # fused, as the Trainer has it
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def ready(self) -> None:
        """The weights are shared: another arm may have left them the other way."""
        for weight in self.weights:
            weight.requires_grad_(self.moves_weights)


def full(network: Any) -> Arm:
    """All parameters."""
    weights = list(network.parameters())
    return Arm(network, weights, (weights, True))


def masked(network: Any, heads: Heads) -> Arm:
    """The task heads' slices."""
    model = around(network)
    deltas = attach_head_deltas(model, attention_layers(model), heads)
    return Arm(model, list(network.parameters()), (list(deltas.parameters()), False))


def lora(network: Any, n_wanted: int) -> Arm:
    """PEFT LoRA on q, k and v of all layers, of the rank nearest to that many parameters."""
    from peft import LoraConfig, get_peft_model

    layers = attention_layers(network)
    targets = [path for layer in layers for path in (layer.q, layer.k, layer.v)]
    shapes = [network.get_submodule(path).weight.shape for path in targets]
    rank = max(1, round(n_wanted / sum(sum(shape) for shape in shapes)))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
    weights = list(network.parameters())
    model = get_peft_model(around(network), config)
    added = [p for name, p in model.named_parameters() if "lora_" in name]
    return Arm(model, weights, (added, False))


def around(network: Any) -> Any:
    """Modules of their own around the same weights."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def spread(shape: Shape, first: int, stop: int) -> Heads:
    """A tenth of all heads, evenly over the layers first..stop-1, both ends among them."""
    count = max(2, math.ceil(0.1 * shape.layers * shape.query_heads))
    layers = [first + round(i * (stop - 1 - first) / (count - 1)) for i in range(count)]
    return [(layer, (5 * i) % shape.query_heads) for i, layer in enumerate(layers)]
