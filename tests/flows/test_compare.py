"""`p2d compare` on a small job: shared stages, failed arms, the tables."""

import json
import os
import time
from collections import Counter
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import FlowFilter, TaskRunFilter

from flows.cli.compare import _as_json, refuse_if_all_failed, show
from flows.compare import attempt, checked_arms, grid_of, run_compare
from flows.inputs import check_inputs
from flows.settings import RunSettings, load_settings, parse_settings
from p2d_core.comparison.arms import BASE, EVERYTHING, NONE, Arm, ArmRun, read
from p2d_core.comparison.picture import PICTURE
from p2d_core.comparison.statistics import plain
from p2d_core.comparison.verdict import arm_lines
from p2d_core.errors import InputError, P2DError, SettingsError
from p2d_core.heads.head_map import HEADS, read_head_map
from p2d_core.selection.subset import SUBSET
from p2d_core.store import Store
from p2d_core.store.manifest import MANIFEST
from p2d_core.store.query import open_reader
from tasks.tracking.database import mlflow_uri
from tests.job import Job

ROWS = {
    "target.jsonl": 60, "evaluation.jsonl": 12, "corpus/ledgers.jsonl": 100,
    "corpus/drills.jsonl": 300,
}  # fmt: skip
GRID = {
    "rankers": ["frobenius", "random"],
    "scorers": ["head-activation", "random"],
    "adaptations": [
        "heads",
        {"name": "full", "learning_rate": 0.001},
        {"name": "full", "label": "diverging", "learning_rate": 1e30},
    ],
    "seeds": [0, 1],
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("compare"), ROWS)
    file = job.folder / "compare.yaml"
    evaluation = job.values["evaluation"] | {"also": ["perplexity"]}
    file.write_text(yaml.safe_dump(job.values | {"compare": GRID, "evaluation": evaluation}))
    made = run_compare(load_settings(file), store=job.store)
    return job, file, made


def test_every_combination_that_differs_in_what_it_looks_at_is_an_arm(compared):
    _, file, _ = compared
    arms = {(a.scorer, a.ranker, a.adaptation) for a in grid_of(load_settings(file)).arms}
    assert ("random", "frobenius", "heads") in arms
    assert ("random", NONE, "full") in arms
    assert ("random", "frobenius", "full") not in arms


def test_a_ranker_may_have_a_share_of_the_heads_of_its_own(compared):
    _, file, _ = compared
    settings = load_settings(file)
    wide = {"name": "frobenius", "label": "wide", "fraction": 0.5}
    compare = settings.compare.model_validate(GRID | {"rankers": ["frobenius", wide]})
    arms = grid_of(settings.model_copy(update={"compare": compare})).arms
    shares = {arm.ranker: its.heads.fraction for arm, its in arms.items() if arm.ranker != NONE}
    assert shares == {"frobenius": settings.heads.fraction, "wide": 0.5}
    assert {arm.ranker: arm.of.head_fraction for arm in arms} == shares | {NONE: None}


def test_what_the_run_would_take_has_the_options_of_the_run(compared):
    _, file, _ = compared
    own = {
        "heads": {"ranker": "taylor", "options": {"normalise_layers": True}},
        "scoring": {"scorer": "head-activation", "options": {"whiten": False}},
        "training": {"adaptation": "lora", "options": {"rank": 2}},
    }
    bare = {"name": "head-activation", "label": "as it comes", "options": {}}
    grid = {
        "rankers": ["taylor", "random"],
        "scorers": ["head-activation", bare],
        "adaptations": ["lora", "full"],
    }
    values = yaml.safe_load(file.read_text()) | own | {"compare": grid}
    arms = grid_of(parse_settings(values, file)).arms
    assert {
        (arm.scorer, its.scoring.options.get("whiten")) for arm, its in arms.items()
    } == {("head-activation", False), ("as it comes", None)}  # fmt: skip
    rankers = {arm.ranker: its.heads.options for arm, its in arms.items()}
    assert rankers == {"taylor": {"normalise_layers": True}, "random": {}}
    ranks = {arm.adaptation: its.training.options for arm, its in arms.items()}
    assert ranks == {"lora": {"rank": 2}, "full": {}}


def test_depth_is_for_the_scorers_that_run_the_model_to_its_heads(compared):
    _, file, _ = compared
    grid = {"scorers": ["head-activation", "tfidf"], "adaptations": ["full"]}
    values = yaml.safe_load(file.read_text()) | {"scoring": {"depth": 0.5}, "compare": grid}
    arms = grid_of(parse_settings(values, file))
    depths = {arm.scorer: its.scoring.depth for arm, its in arms.arms.items()}
    assert depths == {"head-activation": 0.5, "tfidf": "heads"}
    # what is not for a scorer is refused where it is asked for
    assert {arm.scorer for arm, _ in checked_arms(arms, set())} == {*depths}


@pytest.mark.parametrize(
    ("kind", "field", "of"),
    [
        ("scorers", "fraction", "rankers"),
        ("adaptations", "fraction", "rankers"),
        ("rankers", "learning_rate", "adaptations"),
        ("scorers", "learning_rate", "adaptations"),
    ],
)
def test_what_would_not_be_looked_at_is_refused(compared, kind, field, of):
    job, _, _ = compared
    values = job.values | {"compare": {kind: [{"name": "random", field: 0.2}]}}
    with pytest.raises(SettingsError, match=f"'random' has a {field}, which is of {of} alone"):
        parse_settings(values, job.folder / "x.yaml")


def test_a_comparison_of_which_every_arm_failed_has_failed():
    arm = Arm("random", NONE, "full", 0.1)
    of_base = ArmRun(Arm(BASE, NONE, NONE, 0.0), 0, quality=0.1)
    broken = [ArmRun(arm, seed, error="no memory") for seed in (0, 1)]
    with pytest.raises(P2DError, match="all 2 runs of arms failed, for the reasons above"):
        refuse_if_all_failed([of_base, *broken])
    refuse_if_all_failed([of_base, broken[0], ArmRun(arm, 1, quality=0.2)])


def test_every_share_of_the_corpus_is_an_arm(compared):
    _, file, _ = compared
    settings = load_settings(file)
    compare = settings.compare.model_validate(GRID | {"fractions": [0.05, 0.2]})
    arms = grid_of(settings.model_copy(update={"compare": compare})).arms
    assert {(arm.fraction, its.selection.fraction) for arm, its in arms.items()} == {
        (0.05, 0.05), (0.2, 0.2),
    }  # fmt: skip
    assert len(arms) == 2 * len(grid_of(settings).arms)


def test_without_shares_of_its_own_a_comparison_has_that_of_the_run(compared):
    job, file, _ = compared
    settings = parse_settings(job.values | {"selection": {"fraction": 0.3}}, file)
    assert {arm.fraction for arm in grid_of(settings).arms} == {0.3}


@pytest.mark.parametrize("label", ["base", "everything", "-"])
def test_no_arm_may_be_called_what_another_is(compared, label):
    job, file, _ = compared
    values = job.values | {"compare": {"scorers": [{"name": "tfidf", "label": label}]}}
    with pytest.raises(SettingsError, match=f"one of them is called '{label}', which is another"):
        parse_settings(values, file)


def test_every_arm_and_seed_is_a_task_of_prefect(compared):
    _, _, made = compared
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": ["compare"]}}),
            task_run_filter=TaskRunFilter.model_validate({"name": {"like_": ", seed "}}),
        )
        flow_runs = client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": ["compare"]}})
        )
    assert all(len(flow_run.tags) == 1 for flow_run in flow_runs), "the run's id"
    assert not any(task.tags for task in tasks), "each would be asked for at the server"
    runs, _, _ = read(made.path)
    assert {task.name for task in tasks} >= {f"{run.arm.label}, seed {run.seed}" for run in runs}


def test_what_nobody_foresaw_fails_its_arm_alone():
    def broken() -> ArmRun:
        raise ZeroDivisionError("division by zero")

    arm = Arm("random", "random", "heads", 0.1)
    assert attempt(arm, 3, broken) == ArmRun(arm, 3, error="ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("scorer", "random", {}),
        ("ranker", "random", {}),
        ("scorer", "icl-attention", {}),
        ("scorer", "sum", {"parts": {"random": 1.0}}),
        ("adaptation", "lora", {}),
    ],
)
def test_another_seed_draws_everything_anew(compared, kind, name, options):
    """Else the error bars of a control would be of one draw, counted once a seed."""
    _, file, _ = compared
    settings = load_settings(file)
    section = {"scorer": "scoring", "ranker": "heads", "adaptation": "training"}[kind]

    def plugin(of_run: int, **own):
        values = settings.model_dump(mode="json")
        values[section] |= {kind: name, "options": options | own}
        inputs = check_inputs(RunSettings.model_validate(values | {"seed": of_run}))
        return dict(getattr(inputs, kind).options)

    assert (plugin(0)["seed"], plugin(1)["seed"]) == (0, 1)
    assert plugin(1, seed=7)["seed"] == 7


def test_stages_that_arms_share_are_computed_once(compared):
    job, _, _ = compared
    store = Store(job.store)
    made = {stage: len(list(store.refs(stage))) for stage in ("proxy", "heads", "scores")}
    # one proxy run and one frobenius map a seed; random heads need no proxy run
    assert made == {"proxy": 2, "heads": 4, "scores": 2 * (2 + 1)}


def test_the_controls_of_two_seeds_are_two_draws(compared):
    job, _, made = compared
    store = Store(job.store)
    drawn: dict[str, set[tuple]] = {"heads": set(), "subset": set()}
    for run in read(made.path)[0]:
        if (run.arm.scorer, run.arm.ranker, run.arm.adaptation) == ("random", "random", "heads"):
            heads = read_head_map(store.path("heads", run.artifacts["heads"]) / HEADS)
            drawn["heads"].add(heads.task_heads)
            subset = store.path("subset", run.artifacts["subset"]) / SUBSET
            drawn["subset"].add(tuple(pq.read_table(subset)["sample_id"].to_pylist()))
    assert {name: len(draws) for name, draws in drawn.items()} == {"heads": 2, "subset": 2}


def test_the_arms_are_siblings_in_mlflow_and_the_verdict_is_a_note(compared):
    job, _, made = compared
    client = MlflowClient(mlflow_uri(job.store))
    (experiment,) = client.search_experiments(filter_string="name = 'p2d'")
    group = f"tags.`p2d.group` = '{made.key[:12]}'"
    runs = client.search_runs([experiment.experiment_id], group)
    kinds = Counter(run.data.tags["p2d.kind"] for run in runs)
    labels = {run.arm.label for run in read(made.path)[0]}
    assert kinds == {"compared": len(labels), "comparison": 1}
    by_name = {run.info.run_name.removesuffix(", small"): run for run in runs}
    for label in labels:
        failed = "diverging" in label
        assert by_name[label].info.status == ("FAILED" if failed else "FINISHED")
        assert ("quality" in by_name[label].data.metrics) != failed
        assert ("quality/perplexity" in by_name[label].data.metrics) != failed
    (verdict,) = [run for run in runs if run.data.tags["p2d.kind"] == "comparison"]
    note = verdict.data.tags["mlflow.note.content"]
    assert "Does head-activation choose better data than random?" in note
    assert "2 of 2 failed" in note
    assert " perplexity" in note
    assert "comparison.png" in {file.path for file in client.list_artifacts(verdict.info.run_id)}


def test_a_failed_arm_is_a_row_and_takes_no_other_with_it(compared):
    runs, _, _ = read(compared[2].path)
    failed = {(run.arm.adaptation, run.seed) for run in runs if run.failed}
    assert failed == {("diverging", 0), ("diverging", 1)}
    assert all("Lower the learning rate" in run.error for run in runs if run.failed)
    assert {run.seed for run in runs if run.arm.adaptation == "full" and not run.failed} == {0, 1}


def test_a_row_has_what_a_reader_asks_for(compared):
    runs, metric, higher_is_better = read(compared[2].path)
    assert (metric, higher_is_better) == ("loss", False)
    done = [run for run in runs if not run.failed]
    assert {run.arm.scorer for run in done} == {BASE, EVERYTHING, "head-activation", "random"}
    for run in done:
        assert len(run.values) == 12
        assert run.quality == pytest.approx(sum(run.values.values()) / 12)
        if run.arm.scorer not in (BASE, EVERYTHING):
            assert run.selected == 40
            assert sum(run.labels.values()) == 40
            assert run.aer == pytest.approx(sum(run.seconds.values()) / run.full_seconds)
            assert run.peak_memory_bytes > 0
            assert run.metrics["loss"] == pytest.approx(run.quality)
            assert run.metrics["perplexity"] > 1
    moved = {run.arm.of.adaptation: run.parameters for run in done if run.arm.scorer != BASE}
    assert 0 < moved["heads"] < moved["full"]


def test_a_learning_rate_of_its_own_reaches_the_adaptation(compared):
    _, file, _ = compared
    arms = grid_of(load_settings(file)).arms
    rates = {arm.adaptation: its.training.learning_rate for arm, its in arms.items()}
    default = load_settings(file).training.learning_rate
    assert rates == {"heads": default, "full": 0.001, "diverging": 1e30}


def test_a_second_run_computes_nothing(compared):
    job, file, made = compared
    before = {ref.key for ref in Store(job.store).refs()}
    again = run_compare(load_settings(file), store=job.store)
    assert again.key == made.key
    assert {ref.key for ref in Store(job.store).refs()} == before


def test_garbage_collection_keeps_all_that_the_newest_comparison_found(compared):
    """Not what it made alone: it may have found most of it, and is then as new as its last run."""
    job, file, made = compared
    store = Store(job.store)
    named = {key for run in read(made.path)[0] for key in run.artifacts.values()}
    needed = {ref.key for key in named for ref in store.lineage(store.resolve(key))}
    assert {ref.stage for ref in store.refs() if ref.key not in needed} == {"comparison"}
    manifest = made.path / MANIFEST
    os.utime(manifest, (0, 0))
    run_compare(load_settings(file), store=job.store)
    assert time.time() - manifest.stat().st_mtime < 60


def test_the_summary_is_json_that_any_parser_reads(compared):
    """Of one seed there is no interval."""
    _, _, made = compared
    runs, metric, higher_is_better = read(made.path)
    assert json.loads(_as_json(made), parse_constant=pytest.fail)["metric"] == metric
    (line, *_) = arm_lines([run for run in runs if run.seed == 0], higher_is_better)
    assert plain(asdict(line))["quality"]["low"] is None


def test_sql_reads_the_rows(compared):
    job, _, made = compared
    with open_reader(Store(job.store)) as ask:
        rows = ask.run(
            "SELECT label, avg(quality) AS quality FROM comparison WHERE error IS NULL GROUP BY ALL"
        ).read_all()
        of_samples = ask.run("SELECT metric, count(*) AS n FROM comparison_samples GROUP BY metric")
        per_metric = {row["metric"]: row["n"] for row in of_samples.read_all().to_pylist()}
    runs, _, _ = read(made.path)
    done = [run for run in runs if not run.failed]
    assert set(rows["label"].to_pylist()) == {run.arm.label for run in done}
    assert per_metric == {"loss": 12 * len(done), "perplexity": 12 * len(done)}


def test_the_screen_shows_arms_verdict_and_picture(compared, capsys):
    from rich.console import Console

    show(compared[2], Console(width=120))
    shown = capsys.readouterr().out
    assert "head-activation, frobenius, heads, 10%" in shown
    assert "2 of 2 failed" in shown
    assert "Does head-activation choose better data than random?" in shown
    assert PICTURE in shown
    assert " perplexity " in shown


def test_an_unknown_scorer_in_the_grid_is_refused_before_anything_starts(tmp_path, compared):
    job, _, _ = compared
    values = job.values | {"compare": GRID | {"scorers": ["bm42"]}}
    settings = parse_settings(values, job.folder / "x.yaml")
    with pytest.raises(InputError, match="there is no scorer 'bm42'"):
        run_compare(settings, store=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_grid_without_seeds_is_refused(compared):
    job, _, _ = compared
    with pytest.raises(SettingsError, match=r"`compare.seeds` was \(?\[?\]?\)?"):
        parse_settings(job.values | {"compare": {"seeds": []}}, job.folder / "x.yaml")
