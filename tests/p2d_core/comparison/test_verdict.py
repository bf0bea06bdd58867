"""What a comparison says of arms whose answer is known."""

import numpy as np
import pytest

from p2d_core.comparison.arms import BASE, EVERYTHING, NONE, Arm, ArmRun, read, write
from p2d_core.comparison.picture import draw
from p2d_core.comparison.verdict import answers, arm_lines


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
    failed = ArmRun(Arm("loss", NONE, "full", 0.1), 0, error="out of luck")
    write([*WORLD, failed], "exact_match", True, tmp_path)
    again, metric, higher_is_better = read(tmp_path)
    assert again == [*WORLD, failed]
    assert (metric, higher_is_better) == ("exact_match", True)


def test_the_chart_is_drawn_with_failed_arms_and_single_seeds_too(tmp_path):
    single = runs(Arm("loss", NONE, "full", 0.1), 0.1, seeds=1)
    failed = ArmRun(Arm("ifd", NONE, "full", 0.1), 0, error="out of luck")
    draw(arm_lines([*WORLD, *single, failed], True), "exact_match", True, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000
