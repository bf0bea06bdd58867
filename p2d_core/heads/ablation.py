"""How much worse the proxy-tuned model does on its samples without a head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2d_core.attention.replay import recorded, replayed
from p2d_core.attention.silence import silenced_in_turn
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.heads.response_loss import batches, summed_losses

ROWS = 64
"""Samples in a pass at most, a batch's copies together."""


@rankers.register("ablation")
@dataclass(frozen=True, slots=True)
class Ablation:
    """Rise of the mean loss on the proxy samples' response tokens when a head is silenced.

    Silenced is: its output is zero before the output projection. The loss is that of the model
    with the proxy run's slices.

    Costs a forward pass over all samples for each head, from the head's layer on: the layers below
    run once for all heads, and what they gave on a batch is held meanwhile. A batch's copies, each
    with another head of the layer silenced, go through in one pass.

    Source: Michel et al. 2019, arXiv 1905.10650 (one head at a time), here on the tuned model.
    """

    version: ClassVar[str] = "1"
    needs_proxy_run: ClassVar[bool] = True
    runs_model: ClassVar[bool] = True

    @torch.inference_mode()
    def rank(self, evidence: RankingEvidence) -> Tensor:
        """In nats a token; below 0 where the model does better without the head."""
        model, layers, samples = evidence.model, evidence.layers, evidence.checked_samples()
        rise = evidence.empty_scores()
        n_tokens = 0
        parts = list(batches(samples, evidence.batch_size))
        together = max(1, ROWS // len(parts[0]))
        turns = [
            (layer, list(range(layer.n_query_heads))[first : first + together])
            for layer in layers
            for first in range(0, layer.n_query_heads, together)
        ]
        was_training = model.training
        model.eval()
        try:
            with evidence.tuned().applied(model):
                for n_before, batch in enumerate(parts):
                    with recorded(model, layers) as outputs:
                        whole = summed_losses(model, batch, evidence.pad_id)
                    n_tokens += sum(sample.n_learnt for sample in batch)
                    for done, (layer, heads) in enumerate(turns, start=1):
                        below = replayed(model, layers, outputs[: layer.index], len(heads))
                        with below, silenced_in_turn(model, layer, heads):
                            without = summed_losses(model, batch, evidence.pad_id, len(heads))
                        rise[layer.index, heads] += (without - whole).cpu()
                        evidence.progress(n_before * len(turns) + done, len(parts) * len(turns))
        finally:
            model.train(was_training)
        return rise / n_tokens
