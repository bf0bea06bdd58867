"""RDS+ against hidden states of one sample at a time, and turns worked by hand."""

import numpy as np
import pyarrow as pa
import torch

from p2d_core.affinity import scorers
from tests.small_scoring import TARGET, affinities, samples


def test_rds_plus_weighs_last_hidden_states_by_their_place(model, heads):
    def pooled(chosen):
        rows = []
        for each in model.encode(chosen):
            with torch.inference_mode():
                output = model.model(torch.tensor([each.input_ids]), output_hidden_states=True)
            states = output.hidden_states[-1][0].double().numpy()
            place = np.arange(1, len(states) + 1)
            mean = (place[:, None] * states).sum(axis=0) / place.sum()
            rows.append(mean / np.linalg.norm(mean))
        return np.stack(rows)

    corpus = samples(20)
    similarity = pooled(corpus) @ pooled(TARGET.proxy).T
    got = affinities("rds-plus", model, heads, [corpus], choose="mean")
    np.testing.assert_allclose(got, similarity.mean(axis=1), atol=1e-5)
    turns = affinities("rds-plus", model, heads, [corpus[:3], corpus[3:]])
    rounds = np.argsort(np.argsort(-similarity, axis=0), axis=0).min(axis=1)
    likeness = (1 + similarity.max(axis=1)) / 2
    np.testing.assert_allclose(turns, likeness - rounds, atol=1e-5)


def test_targets_take_turns():
    """Two targets at right angles: the first has four near samples, the second but one."""
    angles = np.deg2rad([0, 5, 10, 15, 60])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    flat = pa.array(vectors.reshape(-1))
    table = pa.table({"hidden": pa.FixedSizeListArray.from_arrays(flat, 2)})
    state = {"proxy": torch.eye(2)}
    (mean,) = scorers.make("rds-plus", {"choose": "mean"}).affinity(state, [table])
    assert np.argmin(mean) == 0
    (turns,) = scorers.make("rds-plus", {}).affinity(state, [table])
    # round 1: 0 degrees for the first, 60 for the second; round 2: 5 and 15; round 3: 10 twice
    assert np.ceil(turns).tolist() == [1, 0, -1, 0, 1]
    assert np.argsort(turns).tolist() == [2, 3, 1, 4, 0]
