"""`p2d export` over the store of a small real run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flows.cli.export import advice
from p2d_core.adaptation.adaptations import adapted
from p2d_core.export.exporting import Exported
from p2d_core.export.rounding import Rounding
from p2d_core.models import load_model
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tests.demo_run import P2D
from tests.job import Job, quick_job
from tests.stock import run_stock

FORMS = ("lora", "merged", "delta")
RUN_CARDS = """
import os
from safetensors.torch import save_file
for form, lines in cards.items():
    os.chdir(form)
    names = {}
    exec(lines, names)
    model = names["model"]
    model = model.merge_and_unload() if form == "lora" else model
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    os.chdir("..")
    save_file(weights, form + ".safetensors")
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """One run, whose base lies in the job's folder."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(BASE_FOLDER, folder / "tiny-base")
    job = quick_job(folder)
    job.values["base"] = "tiny-base"
    job.summary = job.run(arms=job.values["arms"] | {"random": True})
    job.key = Path(job.summary.artifacts["model"]).name
    return job


@pytest.fixture
def p2d(job, monkeypatch, command, tmp_path):
    """Runs a command in a folder of its own over the store; gives its exit code and its words."""
    monkeypatch.setenv("P2D_STORE", str(job.store))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture
def exported(job, p2d):
    """Exports the run as a form; gives what was said."""

    def call(form: str, to: str, *words: str, run: str = "") -> str:
        code, out, err = p2d("export", run or job.summary.run_id, "--as", form, "--to", to, *words)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def copied(job, p2d, tmp_path, monkeypatch) -> Store:
    """The store, for a test to spoil."""
    kept = ("mlflow", "prefect")
    shutil.copytree(job.store, tmp_path / "copied", ignore=shutil.ignore_patterns(*kept))
    monkeypatch.setenv("P2D_STORE", str(tmp_path / "copied"))
    return Store(tmp_path / "copied")


def artifact(job, stage: str, name: str) -> Path:
    """Its folder; the summary's paths are those from where the run was started."""
    return Store(job.store).path(stage, Path(job.summary.artifacts[name]).name)


def weights_of(job, name: str = "model") -> dict[str, torch.Tensor]:
    """The adapted model's."""
    base = load_model(job.folder / "tiny-base", "float32", torch.device("cpu"))
    return dict(adapted(base, artifact(job, "model", name)).merge_and_unload().named_parameters())


def front_and_body(card: str) -> tuple[dict, str]:
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), body


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


# -- what is written ---------------------------------------------------------------------------


@pytest.mark.slow  # processes of their own that import torch: a third of a minute
def test_the_lines_of_every_card_load_the_adapted_model_where_p2d_is_not_installed(
    job, exported, tmp_path
):
    cards = {}
    for form in FORMS:
        exported(form, form)
        cards[form] = code_of((tmp_path / form / "README.md").read_text())
        assert len(cards[form].splitlines()) <= 5
    run_stock(RUN_CARDS, tmp_path, cards=cards)
    expected = weights_of(job)
    base = load_model(job.folder / "tiny-base", "float32", torch.device("cpu"))
    assert any(not torch.equal(p, expected[name]) for name, p in base.named_parameters())
    for form in FORMS:
        found = load_file(tmp_path / f"{form}.safetensors")
        assert set(found) == set(expected)
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), (form, name)


def test_the_card_says_what_it_is_what_from_how_good_and_at_what_cost(job, exported, tmp_path):
    exported("lora", "out", "--license", "apache-2.0", "--base-name", "someone/tiny")
    front, body = front_and_body((tmp_path / "out/README.md").read_text())
    assert front == {
        "base_model": "someone/tiny",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["p2d", "lora"],
    }
    summary = job.summary
    manifest = Store(job.store).resolve(job.key).manifest
    assert manifest.inputs["base"]["sha256"] in body
    assert "# someone/tiny adapted to target" in body
    assert "| corpus | 120 samples of drills, ledgers |" in body
    assert "| data | 12 of 120 (10.0%) by tfidf |" in body
    assert "![every query head with its rank](heads.png)" in body
    for layer, head in summary.heads.ids:
        assert f"layer {layer} head {head}" in body
    quality = body.split("## Quality")[1].split("##")[0]
    for name, arm in {"base model": "base", "**P2D**": "p2d", "random subset": "random"}.items():
        (row,) = [line for line in quality.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {getattr(summary.quality, arm):.3f} |" in row
        assert f"| {summary.quality.losses[arm]:.3f} |" in row
    assert f"Alignment Efficiency Ratio {summary.aer.cold:.3f} cold" in body
    assert "calibrated" in body
    assert 'from_pretrained("someone/tiny"' in body
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    picture = artifact(job, "heads", "heads") / "heads.png"
    assert (tmp_path / "out/heads.png").read_bytes() == picture.read_bytes()


def test_the_license_is_that_of_the_bases_card_else_unknown(job, exported, tmp_path):
    exported("delta", "one")
    assert front_and_body((tmp_path / "one/README.md").read_text())[0]["license"] == "unknown"
    shutil.copytree(job.folder / "tiny-base", tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    exported("delta", "two", "--base", "base")
    assert front_and_body((tmp_path / "two/README.md").read_text())[0]["license"] == "mit"


def test_the_command_says_every_size_advises_and_counts_what_was_written(exported, tmp_path):
    out = exported("delta", "out")
    sizes = {}
    for form in FORMS:
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [form]]
        number, unit = line.split()[1:3]
        sizes[form] = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert sizes["delta"] == pytest.approx(
        sum(t.numel() * 4 for t in load_file(tmp_path / "out/delta.safetensors").values()), rel=0.01
    )
    assert sizes["delta"] < sizes["lora"] < sizes["merged"]
    said = re.search(r"Advised: lora, ([\d.]+)% of the whole model", out)
    assert float(said[1]) == pytest.approx(100 * sizes["lora"] / sizes["merged"], rel=0.05)
    assert "It was adapted in float32 and is exported in it." in out
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert f"Wrote out ({n_bytes / 1e3:.1f} kB)" in out


def test_rounding_is_said_in_figures_that_are_those_of_the_files(job, exported, tmp_path):
    out = exported("merged", "out", "--dtype", "bfloat16")
    base = load_model(job.folder / "tiny-base", "float32", torch.device("cpu"))
    expected, found = weights_of(job), load_file(tmp_path / "out/model.safetensors")
    moved = lost = 0
    for name, before in base.named_parameters():
        differs = expected[name] != before
        moved += int(differs.sum())
        lost += int((differs & (found[name] == before.to(torch.bfloat16))).sum())
        assert torch.equal(found[name], expected[name].to(torch.bfloat16))
    assert 0 < lost < moved
    said = (
        f"Of {moved:,} numbers that moved, rounding gives {lost:,} ({lost / moved:.1%}) the base's "
        "value back."
    )
    assert said in out
    assert re.search(r"as loaded: at most [\d.e-]+ and on average [\d.e-]+ from", out)
    assert said in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    out = exported("lora", "lora", "--dtype", "bfloat16")
    assert "keeps its changes in float32" in out
    assert "merged: at most" in out


def test_all_files_can_be_read_by_whoever_reads_the_card(exported, tmp_path):
    exported("merged", "out")
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


# -- which model is meant ----------------------------------------------------------------------


def test_a_model_is_named_by_run_or_key_or_the_beginning_of_one(job, exported, tmp_path):
    names = [job.summary.run_id[:10], job.key, job.key[:9], f"model/{job.key[:9]}"]
    outs = [exported("delta", f"out-{n}", run=name) for n, name in enumerate(names)]
    assert all(f"model {job.key[:12]} of run {job.summary.run_id}" in out for out in outs)
    files = {(tmp_path / f"out-{n}/delta.safetensors").read_bytes() for n in range(len(names))}
    assert len(files) == 1


def test_the_model_of_another_arm_says_which_it_is(job, exported, tmp_path):
    exported("merged", "out", run=Path(job.summary.artifacts["model_random"]).name)
    body = (tmp_path / "out/README.md").read_text()
    assert "compared with: random subset." in body
    assert "| **random subset** |" in body
    # nor are P2D's data said to be its own
    assert "| trained | same heads, 10.0% of the corpus |" in body
    assert "## Data" not in body
    found = load_file(tmp_path / "out/model.safetensors")
    for name, weight in weights_of(job, "model_random").items():
        assert torch.equal(found[name], weight)


def test_a_model_that_no_run_names_any_more_is_exported_without_its_quality(
    job, copied, exported, tmp_path
):
    for file in (copied.root / "runs").glob("*.json"):
        file.unlink()
    out = exported("delta", "out", run=job.key)
    assert "of run" not in out
    assert "its quality is not known" in (tmp_path / "out/README.md").read_text()


def test_what_is_not_there_or_not_one_is_refused_and_nothing_is_made(job, p2d, copied, tmp_path):
    code, _, err = p2d("export", "nothing", "--as", "lora", "--to", "new/out")
    assert code == 2
    assert "there is no model artifact 'nothing'" in err
    assert f"Nor is it a run; the newest here: {job.summary.run_id}." in err
    summary = copied.root / "runs" / f"{job.summary.run_id}.json"
    shutil.copy(summary, summary.with_name(f"{job.summary.run_id[:9]}other.json"))
    code, _, err = p2d("export", job.summary.run_id[:8], "--as", "lora", "--to", "out")
    assert code == 2
    assert f"2 begin with '{job.summary.run_id[:8]}': run " in err
    assert p2d("export", "x", "--as", "gguf", "--to", "out")[0] == 2
    assert sorted(os.listdir(tmp_path)) == ["copied"]


def test_a_damaged_or_missing_model_is_not_exported(job, p2d, copied, tmp_path):
    file = copied.path("model", job.key) / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, _, err = p2d("export", job.key, "--as", "lora", "--to", "out")
    assert code == 1
    assert "adapter_model.safetensors has other content" in err
    shutil.rmtree(copied.path("model", job.key))
    code, _, err = p2d("export", job.summary.run_id, "--as", "lora", "--to", "out")
    assert code == 1
    assert "is gone from" in err
    assert "p2d adapt" in err
    assert not (tmp_path / "out").exists()


def test_a_base_that_was_moved_or_changed_is_asked_for(job, p2d, exported, tmp_path):
    here = job.folder / "tiny-base"
    shutil.move(here, tmp_path / "moved")
    try:
        code, _, err = p2d("export", job.key, "--as", "delta", "--to", "out")
        assert code == 2
        assert f"{here}: there is no such folder" in err
        assert "Give --base FOLDER." in err
        exported("delta", "out", "--base", "moved")
        about = json.loads((tmp_path / "out/delta.json").read_text())
        assert about["base"] == str(tmp_path / "moved")
    finally:
        shutil.move(tmp_path / "moved", here)
    shutil.copytree(here, tmp_path / "other")
    (tmp_path / "other/generation_config.json").write_text('{"do_sample": true}')
    code, _, err = p2d("export", job.key, "--as", "delta", "--to", "out2", "--base", "other")
    assert code == 2
    assert "has other content" in err
    assert not (tmp_path / "out2").exists()


# -- where it goes -----------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_looked_at(p2d, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    code, out, err = p2d("export", "no-such-run", "--as", "merged", "--to", "out")
    assert (code, out) == (2, "")
    assert "out is not empty, and nothing is written over. Name another folder with --to" in err
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_a_killed_export_leaves_no_half_folder_and_the_next_one_works(job, exported, tmp_path):
    words = ["export", job.summary.run_id, "--as", "merged", "--to", "out"]
    killed = subprocess.Popen([str(P2D), *words], cwd=tmp_path, env=os.environ | {
        "P2D_STORE": str(job.store)
    })  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.exporting").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert os.listdir(tmp_path) == [".out.exporting"]
    exported("merged", "out")
    assert os.listdir(tmp_path) == ["out"]


def test_the_help_teaches(p2d):
    code, out, _ = p2d("export", "--help")
    assert code == 0
    assert "Example: p2d export" in out
    for words in ("--as", "--dtype", "--base-name", "--license", "compared, bit for bit"):
        assert words in " ".join(out.split())


# -- what is advised ---------------------------------------------------------------------------


DONE = Exported(
    "lora", "float32", "float32", {"lora": 100, "merged": 1000, "delta": 60}, "", 24, (),
    Rounding(10, 0), None, None, True,
)  # fmt: skip


def test_the_smaller_of_the_forms_that_need_no_code_is_advised():
    first, rank = advice(DONE)
    assert first.startswith("Advised: lora, 10.0% of the whole model")
    assert "delta is 60% of it" in first
    assert rank == "A server that limits the rank of adapters has to allow 24."
    (larger,) = advice(
        replace(DONE, form="merged", sizes={"lora": 2000, "merged": 1000, "delta": 950})
    )
    assert larger == "Advised: merged, because the LoRA is larger."
    (none,) = advice(
        replace(DONE, form="delta", sizes={"merged": 10, "delta": 9.9}, no_lora="a moved.")
    )
    assert none == "Advised: merged, because a moved."
    assert "2 modules are replaced whole" in advice(replace(DONE, whole=("a", "b")))[-1]
