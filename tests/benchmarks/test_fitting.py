"""A training bench takes as many samples as fit into memory."""

from dataclasses import replace

import torch

from benchmarks import training
from benchmarks.sizes import SIZES


def test_the_batch_is_halved_until_a_step_fits(monkeypatch, capsys):
    tried = []

    class Bench:
        def __init__(self, size, shape):
            tried.append(size.train_rows)

        def steps(self):
            if tried[-1] > 16:
                raise torch.OutOfMemoryError("no room")
            return iter(["a figure"])

        def memory(self):
            return iter(["another"])

    monkeypatch.setattr(training, "_Bench", Bench)
    one = SIZES["gpu"].trained_shapes[:1]
    size = replace(SIZES["gpu"], trained_shapes=one, kept_shapes=one)
    assert list(training.measure(size)) == ["a figure", "another"]
    assert tried == [64, 32, 16, 64]
    assert "a full fine-tuning step of 64 samples does not fit" in capsys.readouterr().out
