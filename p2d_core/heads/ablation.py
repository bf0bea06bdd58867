"""How much worse the proxy-tuned model does on its samples without a head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2d_core.attention.capture import silenced
from p2d_core.attention.layout import all_heads
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.heads.response_loss import mean_loss


@rankers.register("ablation")
@dataclass(frozen=True, slots=True)
class Ablation:
    """Rise of the mean loss on the proxy samples' response tokens when a head is silenced.

    Silenced is: its output is zero before the output projection. The loss is that of the model
    with the proxy run's slices.

    Costs a forward pass over all samples for each head. Several heads' silenced copies in one pass
    take as long together on a CPU, so each has its own.

    Source: Michel et al. 2019, arXiv 1905.10650 (one head at a time), here on the tuned model.
    """

    version: ClassVar[str] = "1"
    needs_proxy_run: ClassVar[bool] = True

    @torch.inference_mode()
    def rank(self, evidence: RankingEvidence) -> Tensor:
        """In nats a token; below 0 where the model does better without the head."""
        model, layers, samples = evidence.model, evidence.layers, evidence.checked_samples()
        scores = evidence.empty_scores()
        heads = all_heads(layers)
        was_training = model.training
        model.eval()
        try:
            with evidence.tuned().applied(model):
                whole = mean_loss(model, samples, evidence.pad_id, evidence.batch_size)
                for done, (layer, head) in enumerate(heads, start=1):
                    with silenced(model, layers, [(layer, head)]):
                        loss = mean_loss(model, samples, evidence.pad_id, evidence.batch_size)
                    scores[layer, head] = loss - whole
                    evidence.progress(done, len(heads))
        finally:
            model.train(was_training)
        return scores
