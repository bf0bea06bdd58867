"""Training: what it learns from and keeps; a killed run ends as an undisturbed one does."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerControl, TrainerState

from p2d_core.adaptation import training
from p2d_core.adaptation.adaptations import adaptations, adapted, n_trainable
from p2d_core.adaptation.calibration import calibrate_full
from p2d_core.adaptation.slices import merged as merged_slices
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.training import _last_checkpoint, _seal, train
from p2d_core.attention.layout import attention_layers, slices_of
from p2d_core.errors import TrainingError
from p2d_core.heads.head_map import HeadMap
from p2d_core.processes import ALONE
from p2d_core.samples.tokens import EncodedSample
from tests.tiny import tiny_llama

SPEC = TrainingSpec(epochs=2, learning_rate=1e-2, batch_size=4, seed=1)


def encoded(n: int = 12, seed: int = 0) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedSample(str(i), torch.randint(3, 50, (9,), generator=generator).tolist(), 5)
        for i in range(n)
    ]


def head_map() -> HeadMap:
    scores = torch.zeros(3, 8, dtype=torch.float64)
    scores[0, 5], scores[2, 1] = 2, 1
    return HeadMap.from_scores(scores, n_kv_groups=4, fraction=2 / 24)


def attach(name: str, model):
    return adaptations.make(name, {}).attach(model, attention_layers(model), head_map(), "base")


def test_the_loss_falls_and_its_curve_is_kept(tmp_path):
    model = tiny_llama()
    attached = attach("full", model)
    spec = TrainingSpec(epochs=10, learning_rate=1e-2, batch_size=4)
    result = train(attached.model, encoded(), spec, pad_id=0, scratch=tmp_path)
    assert result.steps == 30
    assert result.tokens == 10 * 12 * 9
    assert result.curve[-1]["loss"] < 0.5 * result.curve[0]["loss"]
    assert result.curve[-1]["step"] == 30


def test_only_the_response_is_learnt(tmp_path):
    """Gradients of a batch are those of the loss on response tokens, worked out here."""
    model = tiny_llama()
    attach("full", model)
    samples = encoded(4)
    ids = torch.tensor([sample.input_ids for sample in samples])
    logits = model(input_ids=ids).logits[:, 4:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten())
    one = TrainingSpec(epochs=1, learning_rate=1e-9, batch_size=4)
    result = train(model, samples, one, pad_id=0, scratch=tmp_path)
    assert result.curve[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("adaptation", ["heads", "lora"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(adaptation, tmp_path):
    def weights(seed: int, name: str) -> torch.Tensor:
        attached = attach(adaptation, tiny_llama())
        model = attached.model
        spec = TrainingSpec(epochs=2, learning_rate=1e-2, batch_size=4, seed=seed)
        train(attached.model, encoded(), spec, pad_id=0, scratch=tmp_path / name)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(weights(1, "a"), weights(1, "b"))
    assert not torch.equal(weights(1, "c"), weights(2, "d"))


@pytest.mark.parametrize("name", ["heads", "attention", "full", "lora"])
def test_what_an_adaptation_keeps_gives_the_trained_model_again(name, tmp_path):
    model = tiny_llama()
    attached = attach(name, model)
    train(attached.model, encoded(), SPEC, pad_id=0, scratch=tmp_path / "scratch")
    ids = torch.tensor([encoded(1, seed=9)[0].input_ids])
    with torch.inference_mode():
        trained = attached.model.eval()(input_ids=ids).logits
        untouched = tiny_llama()(input_ids=ids).logits
    attached.keep(tmp_path)
    with torch.inference_mode():
        again = adapted(tiny_llama(), tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(again, trained, rtol=0, atol=2e-5)
    assert not torch.allclose(again, untouched, atol=1e-2)
    files = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert not files & {".bin", ".pt", ".pkl"}


def test_how_much_each_adaptation_moves():
    counts = {}
    for name in adaptations:
        attached = attach(name, tiny_llama())
        counts[name] = n_trainable(attached.model)
    # two heads, each 8 q rows and 8 o columns of 64, and the 16 k and v rows of their groups
    assert counts["heads"] == 2 * (8 + 8 + 16) * 64
    # q and o are 64 x 64, k and v 32 x 64
    assert counts["attention"] == 3 * (2 * 64 + 2 * 32) * 64
    assert counts["heads"] < counts["attention"] < counts["full"]
    assert counts["lora"] == 3 * 8 * (2 * (64 + 64) + 2 * (64 + 32))


def test_heads_without_kv_leave_k_and_v_alone():
    model = tiny_llama()
    adaptations.make("heads", {"slices": ("q", "o")}).attach(
        model, attention_layers(model), head_map(), "base"
    )
    assert n_trainable(model) == 2 * (8 + 8) * 64


def test_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="there are no samples to train on"):
        train(tiny_llama(), [], SPEC, pad_id=0, scratch=tmp_path)


def test_nothing_to_train_is_refused(tmp_path):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(TrainingError, match="leaves no parameter to train"):
        train(model, encoded(), SPEC, pad_id=0, scratch=tmp_path)


def test_a_loss_that_is_no_number_ends_training(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1 of 6. Lower the learning"):
        train(attach("full", model).model, encoded(), SPEC, pad_id=0, scratch=tmp_path)


KILLED_IN_THE_MIDDLE = """
import sys, time
from pathlib import Path
from tests.p2d_core.adaptation.test_training import long_run
def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.02)
long_run(Path(sys.argv[1]), slowly)
"""


def long_run(scratch: Path, progress=None) -> torch.Tensor:
    torch.set_num_threads(1)  # in the killed process and in this one: sums depend on it
    model = tiny_llama()
    attached = attach("heads", model)
    spec = TrainingSpec(epochs=20, learning_rate=1e-2, batch_size=4, seed=3)
    train(
        attached.model, encoded(), spec,
        pad_id=0, scratch=scratch, checkpoint_seconds=0.05, progress=progress,
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(tmp_path):
    """Same machine, same thread count: equal to the last bit."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(tmp_path / "killed")],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 35:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    state = next((tmp_path / "killed").glob("checkpoint-*/trainer_state.json"))
    assert 0 < json.loads(state.read_text())["global_step"] <= 36
    seen: list[int] = []
    resumed = long_run(tmp_path / "killed", lambda done, total: seen.append(done))
    assert seen[0] > 1
    assert torch.equal(resumed, long_run(tmp_path / "undisturbed"))


def test_a_checkpoint_cut_short_is_not_gone_on_from(tmp_path):
    undisturbed = long_run(tmp_path / "undisturbed")
    long_run(tmp_path / "cut", lambda done, total: time.sleep(0.01))
    for file in (tmp_path / "cut").glob("checkpoint-*/*"):
        if file.name in ("trainer_state.json", "seal.json"):
            file.unlink()
    assert torch.equal(long_run(tmp_path / "cut"), undisturbed)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "seal.json"])
def test_a_checkpoint_with_a_flipped_bit_is_not_gone_on_from(name, tmp_path, caplog):
    long_run(tmp_path, lambda done, total: time.sleep(0.01))
    newest = Path(_last_checkpoint(tmp_path)[0])
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    older, _ = _last_checkpoint(tmp_path)
    assert int(older.rpartition("-")[2]) < int(newest.name.rpartition("-")[2])
    assert not newest.exists()
    assert f"{newest.name} of {tmp_path.name} is not gone on from" in caplog.text


def test_what_a_stopped_run_spent_still_counts(tmp_path):
    attached = attach("heads", tiny_llama())
    (tmp_path / "checkpoint-9").mkdir()
    save_file({"moved": torch.zeros(1)}, tmp_path / "checkpoint-9/trainable.safetensors")
    (tmp_path / "checkpoint-9/trainer_state.json").write_text("{}")
    _seal(tmp_path / "checkpoint-9", 12.5)
    found, seconds = _last_checkpoint(tmp_path)
    assert (Path(found).name, seconds) == ("checkpoint-9", 12.5)
    fresh = train(attached.model, encoded(), SPEC, pad_id=0, scratch=tmp_path / "none")
    assert fresh.seconds_before == 0


def test_checkpoints_hold_only_what_moves(tmp_path):
    long_run(tmp_path, lambda done, total: time.sleep(0.01))
    folder = next(tmp_path.glob("checkpoint-*"))
    names = set(load_file(folder / "trainable.safetensors"))
    assert names
    assert all(name.endswith(".delta") for name in names)
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "training_args.bin").exists()


def test_a_training_that_was_done_when_it_was_killed_takes_no_further_step(tmp_path):
    """Killed before its adapter was kept. With a part of an epoch, one more step would fit."""
    spec = TrainingSpec(epochs=2.5, learning_rate=1e-2, batch_size=4, seed=1)

    def trained(folder: Path) -> tuple[Tensor, list[dict[str, float]]]:
        model = tiny_llama()
        attached = attach("heads", model)
        made = train(
            attached.model, encoded(), spec, pad_id=0, scratch=folder, checkpoint_seconds=0
        )  # fmt: skip
        moving = [p.detach().flatten() for p in attached.model.parameters() if p.requires_grad]
        return torch.cat(moving), made.curve

    weights, curve = trained(tmp_path)
    assert curve[-1]["step"] == spec.steps(12)
    for _ in range(2):
        again, seen = trained(tmp_path)
        assert torch.equal(again, weights)
        assert seen == curve


def test_calibration_scales_a_step_to_the_whole_corpus():
    spec = TrainingSpec(epochs=3, learning_rate=1e-3, batch_size=4)
    ten = calibrate_full(tiny_llama(), encoded(), spec, pad_id=0, n_samples=1000, steps=10)
    assert ten.kind == "calibrated"
    assert ten.seconds > 0
    assert ten.spread_seconds > 0
    # 1000 samples are 250 steps an epoch: 750 in all, and a step takes between 1 ms and 1 s
    assert 0.75 < ten.seconds < 750


def long_samples(n: int = 8) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    return [
        EncodedSample(str(i), torch.randint(3, 50, (120,), generator=generator).tolist(), 5)
        for i in range(n)
    ]


def gradients(adaptation: str, folder: Path, **saving: Any) -> tuple[Tensor, int]:
    """After one step of training, all in a row; and the most bytes that were allocated at once."""
    model = attach(adaptation, tiny_llama()).model
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept: dict[int, Tensor] = {}
    for place, parameter in enumerate(moving):
        # after each part of a step there is more in it
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, place=place: kept.update({place: parameter.grad.flatten().clone()})
        )
    one = TrainingSpec(epochs=1, learning_rate=0.0, batch_size=8)
    with torch.profiler.profile(profile_memory=True) as profile:
        train(model, long_samples(), one, pad_id=0, scratch=folder, **saving)
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return torch.cat([kept[place] for place in sorted(kept)]), max(itertools.accumulate(sizes))


@pytest.mark.parametrize("saving", [{"gradient_checkpointing": True}, {"micro_batch_tokens": 240}])
@pytest.mark.parametrize("adaptation", ["heads", "full", "lora"])
def test_what_saves_memory_gives_the_same_gradients(adaptation, saving, tmp_path):
    kept, most = gradients(adaptation, tmp_path / "kept")
    again, less = gradients(adaptation, tmp_path / "again", **saving)
    torch.testing.assert_close(again, kept, rtol=0, atol=1e-6)
    assert kept.abs().max() > 1e-3
    assert less < 0.7 * most


def test_heads_are_tuned_in_bfloat16(tmp_path):
    """The loss falls; the deltas are float32; what is no slice of a task head stays bit by bit."""
    base = tiny_llama().to(torch.bfloat16)
    attached = attach("heads", copy.deepcopy(base))
    spec = TrainingSpec(epochs=10, learning_rate=1e-2, batch_size=4)
    trained = train(
        attached.model, encoded(), spec, pad_id=0, scratch=tmp_path / "scratch",
        mixed_precision=True, gradient_checkpointing=True,
    )  # fmt: skip
    assert trained.curve[-1]["loss"] < 0.9 * trained.curve[0]["loss"]
    moving = [p for p in attached.model.parameters() if p.requires_grad]
    assert {parameter.dtype for parameter in moving} == {torch.float32}
    attached.keep(tmp_path)
    kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    merged = adapted(copy.deepcopy(base), tmp_path).merge_and_unload()
    may_move = merged_slices(slices_of(attention_layers(base), head_map().task_heads))
    for name, weight in base.state_dict().items():
        moved = (merged.state_dict()[name] != weight).nonzero()
        dim, index = may_move.get(name.removesuffix(".weight"), (0, torch.empty(0)))
        assert set(moved[:, dim].tolist()) <= set(index.tolist())
        assert bool(len(moved)) == bool(len(index)), name


def test_losses_before_and_after_are_of_the_same_arithmetic(tmp_path):
    """bfloat16 is for the passes of training: what did not move has the same logits to the bit."""
    model = tiny_llama()
    ids = torch.tensor([encoded()[0].input_ids])
    before = model.eval()(ids).logits
    spec = TrainingSpec(epochs=1, learning_rate=0.0, batch_size=4)
    train(model, encoded(), spec, pad_id=0, scratch=tmp_path, mixed_precision=True)
    assert torch.equal(model(ids).logits, before)


def test_a_calibrated_step_has_the_optimizer_of_training(monkeypatch, tmp_path):
    """The plain one takes several times as long on a CPU, and the AER would be too good."""
    made = []
    usual = torch.optim.AdamW.__init__

    def seen(self, *given, **named):
        usual(self, *given, **named)
        made.append([group["fused"] for group in self.param_groups])

    monkeypatch.setattr(torch.optim.AdamW, "__init__", seen)
    model = tiny_llama()
    spec = TrainingSpec(epochs=1, learning_rate=1e-3, batch_size=4, seed=0)
    calibrate_full(model, encoded(), spec, pad_id=0, n_samples=8, steps=1)
    train(model, encoded(), spec, pad_id=0, scratch=tmp_path)
    of_calibration, of_training = made
    assert set(of_calibration) == set(of_training) == {True}


def test_checkpoints_take_a_twentieth_of_the_time_at_most(monkeypatch):
    """Worked by hand: a save of 9 s is followed by 180 s without one, whatever was asked for."""
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training, "_seal", lambda folder, seconds: now.__setitem__(0, now[0] + 9))
    watch = training._Watch(None, 60, 0.0, ALONE)
    state, arguments = TrainerState(max_steps=1000), SimpleNamespace(output_dir=".")
    saved = []
    for _ in range(500):
        now[0] += 1
        control = watch.on_step_end(arguments, state, TrainerControl())
        if control.should_save:
            saved.append(now[0])
            watch.on_save(arguments, state, control)
    assert saved == [60, 249, 438]
