import pytest
import torch

from p2d_core.heads.response_loss import batches, summed_losses
from p2d_core.samples.tokens import EncodedSample
from tests.tiny import tiny_llama

SAMPLES = [
    EncodedSample("a", [5, 6, 7, 8, 9, 10, 11], n_prompt=5),
    EncodedSample("b", [12, 13, 14], n_prompt=1),
    EncodedSample("c", [15, 16, 17, 18, 19], n_prompt=4),
]


def test_it_is_the_sum_over_response_tokens_whatever_the_batches():
    model = tiny_llama()
    losses = []
    for sample in SAMPLES:
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
        for place in range(sample.n_prompt, len(sample.input_ids)):
            losses.append(float(-logits[place - 1, sample.input_ids[place]].detach()))
    assert len(losses) == 2 + 2 + 1
    for batch_size in (1, 2, 3):
        for copies in (1, 3):
            total = torch.zeros(copies)
            for batch in batches(SAMPLES, batch_size):
                total += summed_losses(model, batch, 0, copies).detach()
            assert total.tolist() == pytest.approx([sum(losses)] * copies, rel=1e-5)
    assert sum(sample.n_learnt for sample in SAMPLES) == 5


def test_samples_of_like_length_share_a_batch():
    assert [[s.sample_id for s in batch] for batch in batches(SAMPLES, 2)] == [["b", "c"], ["a"]]
