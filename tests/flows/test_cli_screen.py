"""The last screen says what happened, fits the terminal, and claims nothing that is not so."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from flows.cli.finish import finish
from flows.cli.progress import StageProgress, duration, pace
from flows.cli.screen import show_summary
from flows.cli.ui import ui
from p2d_core.errors import InputError
from p2d_core.store import Store
from tasks.planned import Plan, PlannedStage
from tasks.summary import AgreementSummary
from tasks.verdict import gain
from tests.small_store import fill, summary

PICTURE = Text("layer 0  ·░█▓\nlayer 1  ·░▒▓")


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    return fill(Store(tmp_path_factory.mktemp("screen") / "artifacts"))


def screen(done, width: int = 100, picture: Text | None = PICTURE) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    show_summary(done, picture, console)
    return console.file.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_everything_a_newcomer_wants_is_there(refs):
    text = flat(screen(summary(refs)))
    assert "proxy 0.1 reused 2.0" in text
    assert "model 0.1 computed 4.0" in text
    assert "1 of 4 query heads (25.0%) by spad: 6,144 parameters move" in text
    assert "layer 0 ·░█▓" in text
    assert f"picture: {refs['heads'].location}/heads.png" in text
    assert "sums 3 30 10.0% 75.0%" in text
    assert "wrong 1 25.0%" in text
    assert "P2D task heads, 10.0% of the corpus 0.750 0.850" in text
    assert "AER 0.210 0.010" in text
    assert "speedup 4.8x 100.0x" in text
    assert "p2d ui" in text
    assert "p2d artifacts ls" in text
    assert "p2d config" not in text


def test_the_demo_says_how_to_do_the_same_with_ones_own_files(refs):
    done = summary(refs)
    done.name = "demo"
    for command in ("p2d ui", "p2d config -o my.yaml", "p2d adapt my.yaml", "p2d artifacts ls"):
        assert command in flat(screen(done))


def test_what_was_drawn_as_replay_is_said_beside_what_affinity_chose(refs):
    done = summary(refs)
    done.selection.replayed, done.selection.cut_off = 2, 0.25
    assert "down to affinity 0.25, 2 of them replay." in flat(screen(done))


def test_what_was_planned_stands_beside_what_was_computed(refs):
    done = summary(refs)
    stages = {"proxy": 1.5, "heads": 0.3, "model": 0.2}
    done.planned = Plan.model_construct(
        stages=[
            PlannedStage(name=name, state="new", seconds=s, cold_seconds=s, spread_seconds=0)
            for name, s in stages.items()
        ]
    )
    text = flat(screen(done))
    assert "proxy 0.1 reused 2.0 heads 0.1 computed 1.0 0.3 scores 0.1 computed 3.0 subset" in text
    assert "model 0.1 computed 4.0 0.2" in text
    assert "Planned: 0.5 s for what was computed, it took 0.2 s (40%)." in text
    assert "lanned" not in screen(summary(refs))


def test_how_far_draws_of_the_proxy_set_agree_stands_beside_their_heads(refs):
    done = summary(refs)
    assert "draws of the proxy set" not in screen(done)
    done.heads.agreement = AgreementSummary(
        draws=3, spearman=0.81, spearman_by_luck=0.17, jaccard=0.5, jaccard_by_chance=0.06
    )
    told = "Over 3 draws of the proxy set: rank correlation 0.81 (above 0.17 is rare by chance), "
    assert told + "task heads in common 0.50 (Jaccard; 0.06 by chance)." in flat(screen(done))


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_but_a_path_or_a_command_is_wider_than_the_screen(refs, width):
    for line in screen(summary(refs), width).splitlines():
        to_copy = line.strip().startswith(("picture:", "p2d "))
        assert to_copy or len(line.rstrip()) <= min(width, 100), line


def test_p2d_that_is_better_is_said_to_be(refs):
    text = flat(screen(summary(refs)))
    assert (
        "P2D is better than a random subset of the same size with the same heads by 0.550" in text
    )
    assert "P2D is better than full fine-tuning on the whole corpus by 0.250" in text


def test_p2d_that_is_not_better_is_said_not_to_be(refs):
    done = summary(refs, quality__p2d=0.04, quality__random=0.2, quality__full=0.04)
    text = flat(screen(done))
    assert "P2D is WORSE than the base model, by 0.010" in text
    assert "P2D is NOT better than a random subset" in text
    assert "worse by 0.160" in text
    assert "P2D is NOT better than full fine-tuning on the whole corpus: the same" in text


def test_for_a_loss_lower_is_better(refs):
    done = summary(
        refs,
        quality__metric="loss",
        quality__higher_is_better=False,
        quality__p2d=1.5,
        quality__random=2.0,
        quality__base=1.0,
    )
    assert gain(done.quality, "random") == pytest.approx(0.5)
    text = flat(screen(done))
    assert "Quality (lower is better" in text
    assert (
        "P2D is better than a random subset of the same size with the same heads by 0.500" in text
    )
    assert "P2D is WORSE than the base model, by 0.500" in text


def test_an_arm_that_was_not_run_is_left_out(refs):
    text = screen(summary(refs, quality__full=None, quality__random=None, quality__retention={}))
    assert "random subset" not in text
    assert "full fine-tuning on" not in text
    assert "retention" not in text


def test_selecting_that_costs_more_than_it_saves_is_said(refs):
    assert "took LONGER than full" in flat(screen(summary(refs, aer__cold=1.2)))
    assert "took LONGER" not in screen(summary(refs))


@pytest.mark.parametrize(
    ("adaptation", "p2d", "random", "form"),
    [
        ("heads", "task heads, 10.0%", "same heads, 10.0%", "lora"),
        ("lora", "LoRA, 10.0%", "LoRA, 10.0%", "lora"),
        ("full", "all parameters, 10.0%", "all parameters, 10.0%", "merged"),
        ("attention", "all attention, 10.0%", "all attention, 10.0%", "merged"),
    ],
)
def test_what_moved_is_said_of_every_adaptation(refs, adaptation, p2d, random, form):
    done = summary(refs, trainable__adaptation=adaptation, quality__proxy=0.3)
    text = flat(screen(done))
    assert f"P2D {p2d} of the corpus" in text
    assert f"random subset {random} of the corpus" in text
    of_heads = adaptation == "heads"
    assert f"{'same' if of_heads else 'task'} heads, none of the corpus" in text
    assert ("same size with the same heads" in text) == of_heads
    assert ("same size with the same adaptation" in text) != of_heads
    assert f"p2d export {done.run_id} --as {form} --to adapted" in text


def test_labels_are_counted_to_a_dozen_lines_and_obey_no_terminal(refs):
    labels = {f"label {i}": 40 - i for i in range(20)} | {"\x1b[31mred": 1}
    text = screen(summary(refs, selection__by_label=labels))
    assert "label 10 " in text
    assert "label 11 " not in text
    # 29 + 28 + ... + 21 and the one of the last
    assert "10 others 226" in flat(text)
    assert "\x1b" not in screen(summary(refs, selection__by_label={"\x1b[31mred": 1}))


def test_runs_that_a_server_has_are_looked_at_there(refs):
    server = {"tracking_uri": "http://mlflow.team:5000", "run_id": "1", "experiment": "p2d"}
    text = screen(summary(refs, mlflow=server))
    assert "charts, pictures and the adapter, in MLflow at http://mlflow.team:5000" in text
    assert "p2d ui" not in text
    assert "p2d explain 3" in text
    other = {"tracking_uri": "sqlite:////somewhere/else.db", "run_id": "1", "experiment": "p2d"}
    assert "p2d ui" not in screen(summary(refs, mlflow=other))


def test_the_summary_is_written_though_nobody_reads_the_screen(refs, tmp_path, monkeypatch):
    """As in `p2d adapt my.yaml --summary summary.json | head -1`."""

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("flows.cli.finish.show_summary", closed)
    with pytest.raises(BrokenPipeError):
        finish(summary(refs), tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"


def test_a_store_without_runs_of_its_own_names_the_server_that_may_have_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow.team:5000")
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI names http://mlflow\.team:5000"):
        ui(store=tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match=r"`p2d demo` records one"):
        ui(store=tmp_path)


def test_a_store_with_a_space_in_its_name_is_quoted(refs):
    done = summary(refs, artifacts={"model": "my store/model/abc"})
    assert "p2d ui --store 'my store'" in screen(done)


def test_a_picture_too_wide_for_the_screen_is_left_to_the_file(refs):
    assert "layer 0" not in screen(summary(refs), 80, Text("layer 0 " + "▓" * 80))


def test_the_store_stands_in_the_commands_unless_it_is_the_usual_one(refs):
    assert f"p2d ui --store {Path(refs['heads'].location).parents[1]}" in screen(summary(refs))
    usual = summary(refs, artifacts={"heads": "artifacts/heads/abc"})
    assert "--store" not in screen(usual)


def test_names_with_brackets_are_shown_as_they_are(refs):
    done = summary(refs, name="[bold]x", selection__corpus_by_source={"[red]y": 40})
    text = screen(done)
    assert "[bold]x" in text
    assert "[red]y" in text


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    monkeypatch.setattr("flows.cli.progress.SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr("flows.cli.progress.SECONDS_WORTH_A_LINE", 0)
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    with StageProgress(console) as progress, progress.stage("measurements") as tell:
        tell(0, 40)
        tell(20, 40)
    lines = [line.split(" ", 1)[1] for line in console.file.getvalue().splitlines()]
    assert lines[0] == "measurements: 0 of 40"
    assert lines[1].startswith("measurements: 20 of 40, ")
    assert lines[1].endswith(" left")
    assert lines[2].startswith("measurements: done in ")


def test_the_pace_is_not_that_of_what_a_killed_run_had_done(monkeypatch):
    """Worked by hand: 6 of 16 steps were there; two of the rest took 20 s."""
    now = [100.0]
    monkeypatch.setattr("flows.cli.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    with StageProgress(console) as progress, progress.stage("model") as tell:
        now[0] += 5  # until the model is loaded
        tell(6, 16)
        now[0] += 20
        tell(8, 16)
    assert "model: 8 of 16, 10.0 s each, 1 min 20 s left\n" in console.file.getvalue()


def test_progress_in_a_terminal_leaves_nothing_behind():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with StageProgress(console) as progress, progress.stage("proxy") as tell:
        tell(1, 2)
    assert "done in" not in console.file.getvalue()


def test_an_error_in_a_stage_goes_through():
    with (
        pytest.raises(ValueError, match="boom"),
        StageProgress(Console(file=io.StringIO())) as progress,
        progress.stage("proxy"),
    ):
        raise ValueError("boom")


def test_times_and_rates_are_worked_by_hand():
    assert [duration(s) for s in (0.44, 12.2, 200, 7500)] == [
        "0.4 s",
        "12 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert pace(4.0, 40) == ", 4.0/s, 10 s left"
    assert pace(0.5, 2) == ", 2.0 s each, 4.0 s left"
    assert pace(0, 2) == ""
