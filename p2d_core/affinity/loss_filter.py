"""A filter that looks at no activations: right by the tuned heads, and more so than by the base."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from p2d_core.affinity.losses import HeadProxyLoss, LossShift
from p2d_core.affinity.protocol import Step, scorers


@scorers.register("loss-filter")
@dataclass(frozen=True)
class LossFilter:
    """Two gates that held-out target samples set; what passes is drawn from without favour.

    Consistency: the response's loss under the base with the task heads tuned on the proxy set is
    as low as on held-out target samples. Shift: tuning took as much off it as off theirs, which
    what the base knew already does not show. It finds the target under surfaces that the proxy
    samples do not have, where activations are no guide.

    Costs a whole forward pass a sample, and another of what passes the first gate.

    Source: ours.
    """

    consistency_quantile: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Quantile, in [0, 1], of minus the held-out samples' losses that a sample has to reach."""
    shift_quantile: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Quantile, in [0, 1], of the held-out samples' shifts that a sample has to reach."""

    @property
    def version(self) -> str:
        """Of the chain and of every step."""
        return "-".join(["1", *(step.scorer.version for step in self.steps)])

    @property
    def steps(self) -> tuple[Step, ...]:
        """Consistency, then shift."""
        return (
            Step("consistency", HeadProxyLoss(), self.consistency_quantile),
            Step("shift", LossShift(), self.shift_quantile),
        )
