"""How much worse the proxy-tuned model does on its samples without a head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2d_core.attention.capture import silenced
from p2d_core.attention.layout import all_heads
from p2d_core.attention.replay import recorded, replayed
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.heads.response_loss import batches, summed_loss


@rankers.register("ablation")
@dataclass(frozen=True, slots=True)
class Ablation:
    """Rise of the mean loss on the proxy samples' response tokens when a head is silenced.

    Silenced is: its output is zero before the output projection. The loss is that of the model
    with the proxy run's slices.

    Costs a forward pass over all samples for each head, from the head's layer on: the layers below
    run once for all heads, and what they gave on a batch is held meanwhile. Several heads' silenced
    copies in one pass take as long together, so each has its own.

    Source: Michel et al. 2019, arXiv 1905.10650 (one head at a time), here on the tuned model.
    """

    version: ClassVar[str] = "1"
    needs_proxy_run: ClassVar[bool] = True

    @torch.inference_mode()
    def rank(self, evidence: RankingEvidence) -> Tensor:
        """In nats a token; below 0 where the model does better without the head."""
        model, layers, samples = evidence.model, evidence.layers, evidence.checked_samples()
        without = evidence.empty_scores()
        whole, n_tokens = 0.0, 0
        heads = all_heads(layers)
        parts = list(batches(samples, evidence.batch_size))
        was_training = model.training
        model.eval()
        try:
            with evidence.tuned().applied(model):
                for n_before, batch in enumerate(parts):
                    with recorded(model, layers) as outputs:
                        loss, n = summed_loss(model, batch, evidence.pad_id)
                    whole, n_tokens = whole + float(loss), n_tokens + n
                    for done, (layer, head) in enumerate(heads, start=1):
                        below = replayed(model, layers, outputs[:layer])
                        with below, silenced(model, layers, [(layer, head)]):
                            loss, _ = summed_loss(model, batch, evidence.pad_id)
                        without[layer, head] += float(loss)  # it may stand on another device
                        evidence.progress(n_before * len(heads) + done, len(parts) * len(heads))
        finally:
            model.train(was_training)
        return (without - whole) / n_tokens
