"""The page of evidence is made of tables that studies leave, at a size of seconds."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence import jobs, page, selection, training, tuning
from benchmarks.evidence.draws import DRAWS, Passed
from benchmarks.evidence.selection import Choice
from benchmarks.evidence.studies import STUDIES, Study
from benchmarks.evidence.tuning import Trained
from benchmarks.evidence.variants import EVERYTHING, Variant
from benchmarks.evidence.worlds import hard, plain
from flows.settings import RunSettings
from flows.settings_compare import CompareSettings


def choice(scorer: str, ranker: str, clean: int, seed: int = 0, world: str = "renamed") -> Choice:
    return Choice(world, seed, scorer, ranker, "0.1", 10, clean, 0, 0, 10 - clean, 0.5, 0.5, 0.5, 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[list[Choice], Path]:
    """One seed, scorers that are quick."""
    folder = tmp_path_factory.mktemp("evidence")
    grid = {"rankers": ("random",), "scorers": ("head-activation", "tfidf", "random")}
    worlds = {"renamed": hard("renamed"), "rare-1%": hard("rare-1%")}
    study = Study("Small.", worlds, {**grid, "adaptations": ("full",)})
    kept = folder / "docs" / "evidence" / "hard"
    return selection.run(study, range(1), folder / "store", kept), kept


def test_a_study_says_of_every_scorer_whom_it_chose(found):
    choices, kept = found
    assert {(each.scorer, each.ranker) for each in choices} == {
        ("head-activation", "random"), ("tfidf", "-"), ("random", "-"),
    }  # fmt: skip
    for each in choices:
        assert each.selected == each.clean + each.wrong + each.near + each.other
        # as many as there are of the target: with more no precision could be 1
        assert each.selected == {"renamed": 300, "rare-1%": 30}[each.world]
        assert 0 <= each.auc_wrong <= 1
    assert selection.read(kept) == choices


def test_words_do_not_tell_the_target_of_a_renamed_world(found):
    (tfidf,) = [e for e in found[0] if (e.scorer, e.world) == ("tfidf", "renamed")]
    assert tfidf.precision < 0.25
    assert tfidf.auc_near == pytest.approx(0.5, abs=0.1)


def test_the_page_has_the_tables_the_chart_and_the_command(found):
    written = page.write(found[1].parent).read_text()
    assert "python -m benchmarks.evidence --study hard --seeds 1" in written
    assert "| tfidf | - | 0." in written
    assert (found[1] / "precision.png").read_bytes().startswith(b"\x89PNG")


def test_task_heads_are_held_against_the_mean_of_random_ones_seed_by_seed(tmp_path):
    """Worked by hand: gains of 0.4, 0.4 and 0.5 over the mean of the draws."""
    rows = []
    for seed, clean in enumerate((8, 8, 9)):
        rows += [
            choice("loss-shift", "frobenius", clean, seed),
            choice("loss-shift", "random-0", 3, seed),
            choice("loss-shift", "random-1", 5, seed),
            choice("tfidf", "-", 1, seed),
        ]
    selection.write(rows, tmp_path / "evidence" / "hard")
    written = page.write(tmp_path / "evidence").read_text()
    said = "loss-shift with frobenius heads: better than TF-IDF by +0.733 (+0.590 to +0.877); "
    assert said + "better than random heads by +0.433 (+0.290 to +0.577)." in written


def test_the_bar_is_far_above_tfidf_and_two_standard_errors_above_random_heads(tmp_path):
    """Worked by hand: +0.1 each; +0.1 with a standard error of 0.115; 0.1 over TF-IDF."""
    rows = [
        choice(scorer, ranker, clean, seed)
        for seed in range(3)
        for scorer, ranker, clean in (
            ("loss-shift", "frobenius", 5),
            ("loss-shift", "random", 4),
            ("head-activation", "frobenius", (4, 5, 6)[seed]),
            ("head-activation", "random", (5, 4, 3)[seed]),
            ("head-gradient", "frobenius", 2),
            ("head-gradient", "random", 1),
            ("tfidf", "-", 1),
        )
    ]
    selection.write(rows, tmp_path / "evidence" / "hard")
    written = page.write(tmp_path / "evidence").read_text()
    assert "by more than two standard errors: loss-shift with frobenius heads.\n" in written


def test_one_seed_shows_nothing(tmp_path):
    rows = [choice("loss-shift", "spad", 9), choice("tfidf", "-", 1)]
    selection.write(rows, tmp_path / "evidence" / "hard")
    assert "one seed shows nothing" in page.write(tmp_path / "evidence").read_text()


def test_the_page_names_the_machine_of_a_study(tmp_path):
    folder = tmp_path / "evidence" / "hard"
    selection.write([choice("tfidf", "-", 1)], folder)
    (folder / page.MACHINE).write_text('{"machine": "Abacus 3000"}')
    assert "and no more. Abacus 3000.\n" in page.write(tmp_path / "evidence").read_text()


def hasty(folder: Path, seed: int) -> RunSettings:
    """The demo with a part of its corpus and hardly any training."""
    values = plain(folder, seed).model_dump(mode="json")
    for source in values["corpus"]["sources"]:
        source["limit"] = 300
    values["proxy"] |= {"epochs": 1}
    values["heads"] |= {"proxy_epochs": 1}
    values["training"] |= {"epochs": 1}
    values["arms"] |= {"full": "calibrated"}
    return RunSettings.model_validate(values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[dict[str, Trained], Path]:
    folder = tmp_path_factory.mktemp("tuning")
    variants = (
        Variant("heads", {"training": {"epochs": 4}}, rates=(1e-6, 8e-3)),
        Variant("drawn", data="facility-location"),
        Variant("no replay", selection={"replay": 0.0}),
    )
    kept = folder / "docs" / "evidence" / "tuning"
    study = Study("Small.", {"plain": hasty}, variants=variants)
    found = tuning.run(study, range(1), folder / "store", kept)
    assert list(tuning.read(kept)) == found
    return {each.variant: each for each in found}, kept


@pytest.mark.slow
def test_the_learning_rate_is_the_best_on_the_validation_split(trained):
    heads = trained[0]["heads"]
    assert heads.learning_rate == 8e-3, "with the other one nothing moves"
    assert heads.validation > 0
    assert heads.search_seconds > 0 == trained[0]["drawn"].search_seconds


@pytest.mark.slow
def test_what_variants_train_on_differs_and_the_page_shows_what_came_of_it(trained):
    by_variant, kept = trained
    assert len({each.retention for each in by_variant.values()}) > 1
    assert all(each.aer > 0 for each in by_variant.values())
    written = page.write(kept.parent).read_text()
    assert "| no replay | " in written
    assert (kept / "trained.png").read_bytes().startswith(b"\x89PNG")


def test_the_cheapest_that_is_about_as_good_as_the_best_is_named(tmp_path):
    """Worked by hand: 0.95 is too far below 0.98, and 0.97 costs less than 0.98."""
    rows = [
        Trained(name, 0, quality, 1.0, quality, 4e-3, 100, 10.0, seconds, 0.0, 100.0)
        for name, quality, seconds in (("best", 0.98, 40), ("near", 0.97, 30), ("far", 0.95, 5))
    ]
    tuning.write(rows, tmp_path / "evidence" / "tuning")
    written = page.write(tmp_path / "evidence").read_text()
    assert "Cheapest within 0.02 of the best mean (0.980): near, 0.970 at AER 0.40." in written


def test_what_reaches_the_papers_gain_and_forgets_little_is_named(tmp_path):
    """Worked by hand: 0.71 is .08 over 0.63, 0.70 is not, and 0.89 is not 0.9."""
    rows = [
        Trained(name, 0, quality, retention, quality, 4e-3, 100, 10.0, 30.0, 0.0, 100.0)
        for name, quality, retention in (
            ("both", 0.71, 0.9), ("no gain", 0.70, 1.0), ("forgets", 0.9, 0.89),
            (EVERYTHING, 0.63, 1.0),
        )
    ]  # fmt: skip
    tuning.write(rows, tmp_path / "evidence" / "tuning")
    written = page.write(tmp_path / "evidence").read_text()
    said = f"With 0.08 over {EVERYTHING} on the target and 0.9 on the old skills: both.\n"
    assert said in written


@pytest.mark.slow
def test_what_training_on_each_choice_gives_is_compared_and_shown(tmp_path):
    grid = {"rankers": ("random",), "scorers": ("tfidf", "random"), "adaptations": ("full",)}
    study = Study("Small.", {"plain": hasty}, grid, trained=True)
    kept = tmp_path / "docs" / "evidence" / "synthetic"
    runs = training.run(study, range(1), tmp_path / "store", kept)
    assert {run.arm.scorer for run in runs} >= {"tfidf", "random"}
    assert all(run.quality is not None for run in runs)
    written = page.write(kept.parent).read_text()
    assert "| tfidf" in written
    assert (kept / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_whole_jobs_are_run_by_name_and_shown(tmp_path):
    study = Study("Small.", {"plain": hasty}, jobs={"default": {}, "cheap": {"preset": "cheap"}})
    kept = tmp_path / "docs" / "evidence" / "presets"
    found = jobs.run(study, range(1), tmp_path / "store", kept)
    assert list(jobs.read(kept)) == found
    assert [job.name for job in found] == ["default", "cheap"]
    for job in found:
        assert 0 < job.selection_share < 1
        assert job.clean <= job.selected == 90
    written = page.write(kept.parent).read_text()
    assert "| cheap | " in written
    assert "python -m benchmarks.evidence --study presets --seeds 1" in written


@pytest.fixture
def passed() -> Passed:
    """Forty alike, and one by itself in another direction."""
    angles = np.append(np.linspace(0.0, 0.1, 40), 2.0)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Passed(affinity=np.linspace(0, 1, 41), vectors=vectors)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_takes_as_many_as_are_wanted_each_once(passed, name):
    drawn = DRAWS[name](passed, 20, np.random.default_rng(0))
    assert len(drawn) == len(set(drawn)) == 20
    assert set(drawn) <= set(range(41))


def test_draws_for_diversity_take_the_one_that_is_unlike_the_others(passed):
    for name in ("clusters", "facility-location"):
        assert 40 in DRAWS[name](passed, 15, np.random.default_rng(0))
    assert list(DRAWS["top"](passed, 2, np.random.default_rng(0))) == [40, 39]


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_the_grid_of_a_study_is_one_that_compare_takes(name):
    CompareSettings.model_validate({**STUDIES[name].compare, "seeds": [0]})
