"""How to train: what proxy runs, arms and full fine-tuning are told alike."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """How to train; the same fields serve proxy runs, arms and full fine-tuning."""

    epochs: float
    """Passes over the samples."""
    learning_rate: float
    """Peak of AdamW's learning rate."""
    batch_size: int
    """Samples in a step."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; then it falls as a cosine to 0."""
    seed: int = 0
    group_by_length: bool = False
    """Samples of like length share a step."""

    @property
    def identity(self) -> dict[str, Any]:
        """What of it can change a result; how steps are made up is named where it is not usual."""
        unsaid = set() if self.group_by_length else {"group_by_length"}
        return {k: v for k, v in asdict(self).items() if k not in unsaid}

    def steps(self, n_samples: int) -> int:
        """How many steps the training takes; the last of a pass may have fewer samples."""
        return max(1, math.ceil(math.ceil(n_samples / self.batch_size) * self.epochs))
