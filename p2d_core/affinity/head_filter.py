"""The default filter: of the domain by head activation, right and learnt by head-tuned loss."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from p2d_core.affinity.head_activation import HeadActivation
from p2d_core.affinity.losses import HeadProxyLoss, LossShift
from p2d_core.affinity.protocol import Step, scorers


@scorers.register("head-filter")
@dataclass(frozen=True)
class HeadFilter:
    """Gates that the target's own samples set; what passes is drawn from without favour.

    Domain: the head-activation affinity is as high as the proxy samples have it to each other
    (each left out of its own neighbours). Consistency: the response's loss under the base with
    the task heads tuned on the proxy set is as low as on held-out target samples; only what is
    of the domain is measured for it. Shift: tuning took as much off the loss as off theirs, which
    what the base knew already does not show. With few proxy samples it is this gate that keeps
    out what only looks like the target.
    Costs a forward pass a sample to the deepest task head, a whole one of what passed domain, and
    another of what passed consistency.

    Source: ours.
    """

    domain_quantile: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Quantile, in [0, 1], of the proxy samples' own affinities that a sample has to reach."""
    consistency_quantile: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Quantile, in [0, 1], of minus the held-out samples' losses that a sample has to reach."""
    shift_quantile: Annotated[float, Field(ge=0, le=1)] | None = 0.05
    """Quantile, in [0, 1], of the held-out samples' shifts that a sample has to reach; no such gate
    if null. docs/evidence.md (gates, few-proxies) holds values against each other."""
    neighbours: Annotated[int, Field(ge=1)] = 5
    """As in head-activation."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.1
    """As in head-activation."""
    depth: Literal["heads"] | float = "heads"
    """As in head-activation."""

    @property
    def version(self) -> str:
        """Of the chain and of every step."""
        return "-".join(["2", *(step.scorer.version for step in self.steps)])

    def __post_init__(self) -> None:
        assert self.steps  # a setting that head-activation refuses is refused at once

    @property
    def steps(self) -> tuple[Step, ...]:
        """Domain, then consistency, then shift if it is not null."""
        activation = HeadActivation(self.neighbours, self.shrinkage, self.depth)
        steps = (
            Step("domain", activation, self.domain_quantile),
            Step("consistency", HeadProxyLoss(), self.consistency_quantile),
        )
        if self.shift_quantile is None:
            return steps
        return (*steps, Step("shift", LossShift(), self.shift_quantile))
