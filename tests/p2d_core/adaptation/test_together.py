"""Two processes of torchrun train together what one process trains alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from p2d_core.adaptation.adaptations import adapted
from tests.p2d_core.adaptation.together import AT_STEP, CASES, STOPPED, encoded, trained
from tests.tiny import tiny_llama

pytestmark = pytest.mark.slow  # most of a minute, in which both cores are taken

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes made of every case."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [*LAUNCH, "-m", "tests.p2d_core.adaptation.together", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def curve_of(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "curve.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, two, tmp_path):
    """The same batches and learning rates, the mean over the response tokens of the whole batch.

    Responses have 1 to 13 tokens, and of the last batch of a pass one process has no sample.
    """
    case = CASES[name]
    alone, result = trained(case, tmp_path)
    together = load_file(two / name / "moved.safetensors")
    assert together.keys() == alone.keys()
    # AdamW's first steps are as long for a gradient of 1e-8 as for one of 1
    tolerance = 3e-2 if case.precision == "bfloat16" else 5e-4
    for moved, values in alone.items():
        torch.testing.assert_close(together[moved], values, rtol=0, atol=tolerance)
    for seen, expected in zip(curve_of(two / name), result.curve, strict=True):
        assert seen["learning_rate"] == expected["learning_rate"]
        assert seen["step"] == expected["step"]
        assert seen["loss"] == pytest.approx(expected["loss"], abs=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_what_two_processes_keep_is_the_model_that_they_trained(name, two):
    """From shares, where each has one; written by the first process alone."""
    case = CASES[name]
    dtype = getattr(torch, case.precision)
    attached = load_file(two / name / "moved.safetensors")
    again = adapted(tiny_llama().to(dtype), two / name)
    ids = torch.tensor([encoded(1)[0].input_ids * 3])
    with torch.inference_mode():
        differs = (again(input_ids=ids).logits - tiny_llama().to(dtype)(input_ids=ids).logits).abs()
    assert differs.max() > 1e-2
    if case.adaptation in ("full", "attention"):
        weights = again.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in attached.items())
    if case.adaptation == "heads":
        kept = load_file(two / name / "adapter/adapter_model.safetensors").values()
        deltas = sum(float(value.float().abs().sum()) for value in attached.values())
        rounding = 0.05 if case.precision == "bfloat16" else 1e-4
        ones = sum(int((value == 1).sum()) for value in kept)
        total = sum(float(value.float().abs().sum()) for value in kept) - ones
        assert total == pytest.approx(deltas, rel=rounding)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_training_goes_on_and_ends_the_same(name, two, tmp_path):
    """With two processes, and with one that goes on from the checkpoint of two."""
    undisturbed = load_file(two / name / "moved.safetensors")
    again = load_file(two / name / "again.safetensors")
    steps = json.loads((two / name / "again.json").read_text())
    assert steps == [*range(AT_STEP, 9)]  # where it goes on from, and each step after it
    assert all(torch.equal(again[each], value) for each, value in undisturbed.items())
    seen: list[int] = []
    one, _ = trained(
        CASES[name], two / f"{name} for one", progress=lambda done, _: seen.append(done)
    )
    assert seen == steps
    for each, value in undisturbed.items():
        torch.testing.assert_close(one[each], value, rtol=0, atol=3e-4)
