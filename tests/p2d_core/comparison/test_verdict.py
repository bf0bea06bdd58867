"""What a comparison says of arms whose answer is known."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from p2d_core.comparison.arms import (
    BASE,
    COMPARISON,
    EVERYTHING,
    NONE,
    Arm,
    ArmRun,
    Plugins,
    read,
    write,
)
from p2d_core.comparison.picture import draw, figure_of
from p2d_core.comparison.verdict import answers, arm_lines, front


def runs(arm: Arm, quality: float, aer: float | None = 0.3, seeds: int = 3) -> list[ArmRun]:
    made = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)  # the same samples are hard for every arm
        values = {f"s{i}": quality + float(v) for i, v in enumerate(rng.normal(0, 0.05, 40))}
        made.append(
            ArmRun(
                arm, seed, quality=float(np.mean(list(values.values()))), values=values, aer=aer,
                metrics={"loss": 1.0}, seconds={"model": 2.0}, labels={"clean": 3},
            )
        )  # fmt: skip
    return made


P2D = Arm("head-filter", "frobenius", "heads", 0.1)
RANDOM_DATA = Arm("random", "frobenius", "heads", 0.1)
TFIDF_FULL = Arm("tfidf", NONE, "full", 0.1)
FILTER_FULL = Arm("head-filter", "frobenius", "full", 0.1)
FILTER_FULL_RANDOM = Arm("head-filter", "random", "full", 0.1)
RANDOM_HEADS = Arm("random", "random", "heads", 0.1)
ALL = Arm(EVERYTHING, NONE, "full", 1.0)
WORLD = [
    *runs(P2D, 0.9, 0.3), *runs(RANDOM_DATA, 0.2, 0.2), *runs(TFIDF_FULL, 0.5, 0.2),
    *runs(FILTER_FULL, 0.5, 0.4), *runs(FILTER_FULL_RANDOM, 0.5, 0.4),
    *runs(RANDOM_HEADS, 0.4, 0.2), *runs(ALL, 0.7, 1.0), *runs(Arm(BASE, NONE, NONE, 0), 0.0, None),
]  # fmt: skip


def said(question: str) -> dict[tuple[str, str], str]:
    return {
        (answer.a.label, answer.b.label): answer.words.split(" (")[0]
        for answer in answers(WORLD, higher_is_better=True)
        if answer.question == question
    }


def test_data_chosen_by_heads_against_random_data_with_all_else_equal():
    assert said("Does head-filter choose better data than random?") == {
        (P2D.label, RANDOM_DATA.label): "yes"
    }


def test_a_baseline_that_looks_at_no_heads_has_no_ranker():
    assert said("Does head-filter choose better data than tfidf?") == {
        (FILTER_FULL.label, TFIDF_FULL.label): "not shown"
    }


def test_heads_against_random_heads_for_choosing_and_for_tuning():
    assert said("Do frobenius heads beat random heads for choosing data?") == {
        (FILTER_FULL.label, FILTER_FULL_RANDOM.label): "not shown"
    }
    assert said("Do frobenius heads beat random heads for tuning?") == {
        (RANDOM_DATA.label, RANDOM_HEADS.label): "no, it is worse"
    }


def test_what_arms_are_called_changes_no_question():
    """Two labels of each plug-in, as a grid with other options has them."""
    named = Arm("mine", "wide", "slow", 0.1, Plugins("head-filter", "frobenius", "heads", True))
    chance = Arm("luck", "wide", "slow", 0.1, Plugins("random", "frobenius", "heads", False))
    control = Arm("mine", "dice", "slow", 0.1, Plugins("head-filter", "random", "heads", True))
    worst = Arm("mine", "worst", "slow", 0.1, Plugins("head-filter", "bottom", "heads", True))
    world = [
        *runs(named, 0.9), *runs(chance, 0.2), *runs(control, 0.5), *runs(worst, 0.3),
        *runs(ALL, 0.7, 1.0),
    ]  # fmt: skip
    found = {(a.question, a.a.label, a.b.label): a.gain.shows for a in answers(world, True)}
    assert found == {
        ("Does mine choose better data than random?", named.label, chance.label): 1,
        ("Do wide heads beat random heads for both?", named.label, control.label): 1,
        ("Is it better than full fine-tuning on everything?", named.label, ALL.label): 1,
    }
    over_random = {line.arm: line.over_random for line in arm_lines(world, True)}
    assert over_random[named].mean == pytest.approx(0.7)


def test_heads_of_a_scorer_that_looks_at_none_are_asked_about_for_tuning_alone():
    of = ("ifd", "frobenius", "heads", 0.1)
    ranked = Arm(*of, Plugins(*of[:3], scores_by_heads=False))
    by_chance = Arm("ifd", "random", "heads", 0.1, Plugins("ifd", "random", "heads", False))
    (answer,) = answers([*runs(ranked, 0.5), *runs(by_chance, 0.4)], True)
    assert answer.question == "Do frobenius heads beat random heads for tuning?"


def test_random_heads_are_as_many_as_those_that_they_are_held_against():
    def arm(ranker: str, name: str, share: float) -> Arm:
        plugins = Plugins("random", name, "heads", False, head_fraction=share)
        return Arm("random", ranker, "heads", 0.1, plugins)

    few, many = arm("f10", "frobenius", 0.1), arm("f40", "frobenius", 0.4)
    few_random, many_random = arm("r10", "random", 0.1), arm("r40", "random", 0.4)
    world = [*runs(few_random, 0.2), *runs(few, 0.3), *runs(many, 0.5), *runs(many_random, 0.5)]
    found = {a.a.ranker: (a.b.ranker, a.gain.shows) for a in answers(world, True)}
    assert found == {"f10": ("r10", 1), "f40": ("r40", 0)}
    alone = [run for run in world if run.arm != many_random]
    assert {a.a.ranker for a in answers(alone, True)} == {"f10"}


def test_one_seed_is_said_to_be_one():
    one = answers([*runs(P2D, 0.9, seeds=1), *runs(RANDOM_DATA, 0.2, seeds=1)], True)[0]
    assert one.words.startswith("yes (+0.700, +0.700 to +0.700, one seed; ")


def test_the_front_in_words_goes_from_the_cheapest_and_says_whether_ranked_heads_are_on_it():
    assert front(arm_lines(WORLD, True)) == (
        "tfidf, full, 10% (0.499 at AER 0.20); head-filter, frobenius, heads, 10% "
        "(0.899 at AER 0.30)"
    )
    others = [run for run in WORLD if run.arm != P2D]
    assert front(arm_lines(others, True)).endswith("; none that chooses by ranked task heads")


def test_against_everything():
    assert said("Is it better than full fine-tuning on everything?") == {
        (P2D.label, ALL.label): "yes"
    }


def test_where_lower_is_better_the_answers_turn():
    turned = {answer.question: answer.gain.shows for answer in answers(WORLD, False)}
    assert turned["Is it better than full fine-tuning on everything?"] == -1


def test_the_front_is_what_nobody_beats_at_its_price():
    front = {line.arm for line in arm_lines(WORLD, True) if line.on_front}
    assert front == {P2D, TFIDF_FULL, Arm(BASE, NONE, NONE, 0)}


def test_the_best_arm_comes_first_and_the_others_are_held_against_it():
    lines = arm_lines(WORLD, True)
    assert lines[0].arm == P2D
    assert lines[0].over_best is None
    assert all(line.over_best.shows == -1 for line in lines[1:])
    assert lines[0].over_random.mean == pytest.approx(0.7)


def test_a_failed_arm_is_last_and_counted():
    broken = [
        ArmRun(Arm("icl-attention", "frobenius", "heads", 0.1), s, error="no") for s in (0, 1)
    ]
    lines = arm_lines([*WORLD, *broken], True)
    assert (lines[-1].arm.scorer, lines[-1].failed, lines[-1].runs) == ("icl-attention", 2, 2)
    assert lines[-1].quality is None


def test_the_tables_give_the_runs_again(tmp_path):
    plugins = Plugins("loss", NONE, "full", scores_by_heads=False)
    failed = ArmRun(Arm("loss", NONE, "full", 0.1, plugins), 0, error="out of luck")
    of_two_metrics = replace(
        WORLD[0], seed=9, also={"rouge_l": {"s0": 0.5, "s1": 0.25}}, selected=4,
        labels={"clean": 3, "wrong": 1},
    )  # fmt: skip
    write([*WORLD, of_two_metrics, failed], "exact_match", True, tmp_path)
    again, metric, higher_is_better = read(tmp_path)
    assert again == [*WORLD, of_two_metrics, failed]
    assert [run.arm.plugins for run in again[-2:]] == [None, plugins]
    (precision,) = pq.read_table(
        tmp_path / COMPARISON, filters=[("seed", "=", 9)], columns=["precision"]
    )["precision"].to_pylist()
    assert json.loads(precision) == {"clean": 0.75, "wrong": 0.25}
    assert (metric, higher_is_better) == ("exact_match", True)


def test_the_chart_has_a_colour_a_selection_and_joins_its_adaptations():
    axes = figure_of(arm_lines(WORLD, True), "exact_match", True).axes[0]
    points = {}
    for bar in axes.containers:
        ((x, y),) = bar[0].get_xydata().round(1)
        points[x, y] = (bar[0].get_color(), bar[0].get_markerfacecolor() == "white")
        assert len(bar[1]) == 2, "it has an error bar"
    p2d, full, random_full = points[0.3, 0.9], points[0.4, 0.5], points[0.2, 0.5]
    assert p2d == (p2d[0], False)
    assert len({p2d[0], random_full[0], points[0.2, 0.2][0], full[0]}) == 4
    assert points[0.2, 0.4] == (points[0.2, 0.2][0], True), "one selection, tuned by random heads"
    joined = [
        (line.get_color(), [round(float(x), 1) for x in line.get_xdata()])
        for line in axes.lines
        if line.get_linestyle() == "--"
    ]
    assert (p2d[0], [0.3, 0.4]) in joined
    across = {
        round(float(line.get_ydata()[0]), 1) for line in axes.lines if len(line.get_xdata()) == 2
    }
    assert {0.0, 0.7} <= across
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"head-filter, frobenius heads", "head-filter, random heads", "tfidf"} <= legend


def test_the_chart_is_drawn_with_failed_arms_and_single_seeds_too(tmp_path):
    single = runs(Arm("loss", NONE, "full", 0.1), 0.1, seeds=1)
    failed = ArmRun(Arm("ifd", NONE, "full", 0.1), 0, error="out of luck")
    draw(arm_lines([*WORLD, *single, failed], True), "exact_match", True, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000
