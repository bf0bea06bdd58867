"""What hard worlds promise: the answer alone, or no word at all, tells the target."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from p2d_core.synthetic import IN_CONTEXT_BASE_FOLDER
from p2d_core.synthetic.disguise import (
    FUNCTIONS,
    INVENTED,
    TWO_ASKED,
    Surface,
    draw_disguised,
    draw_surface,
    wrong_disguised,
)
from p2d_core.synthetic.hard_worlds import N_CORPUS, WORLDS, write_hard_world
from p2d_core.synthetic.skills import CONTENT_WORDS

ROOT = Path(__file__).parents[3]
PLAIN = Surface("dax", "wug", "blick", "fep")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words_of(rows: list[dict[str, str]]) -> set[str]:
    return {word for row in rows for word in row["prompt"].split()} & set(CONTENT_WORDS)


@pytest.mark.parametrize("kind", sorted(WORLDS))
def test_a_world_has_its_counts_and_no_prompt_twice(kind, tmp_path):
    files = write_hard_world(tmp_path, kind, seed=0)
    corpus = read(files.corpus)
    counts = Counter(row["label"] for row in corpus)
    assert (counts["clean"], counts["wrong"], counts["near"]) == WORLDS[kind].counts
    assert len(corpus) == N_CORPUS
    prompts = [row["prompt"] for path in vars_of(files) for row in read(path)]
    assert len(prompts) == len(set(prompts))


def vars_of(files) -> tuple[Path, ...]:
    return (files.target, files.corpus, files.evaluation)


def test_in_a_renamed_world_only_the_answer_tells_what_is_done(tmp_path):
    rows = read(write_hard_world(tmp_path, "renamed", seed=0).corpus)
    frames = {(row["prompt"].split()[0], row["prompt"].split()[-4]) for row in rows}
    assert frames == {("ledger", "ask")}
    assert {len(row["response"].split()) for row in rows} == {2}
    by_label = {
        label: words_of([row for row in rows if row["label"] == label])
        for label in ("clean", "near", "other")
    }
    assert by_label["clean"] == by_label["near"] == by_label["other"]


@pytest.mark.parametrize("invented", [False, True])
def test_a_hidden_target_shares_no_word_with_the_corpus(invented, tmp_path):
    files = write_hard_world(tmp_path, "hidden", seed=0, invented=invented)
    target, corpus = read(files.target), read(files.corpus)
    assert not words_of(target) & words_of(corpus)
    if invented:
        frames = [{row["prompt"].split()[0] for row in rows} for rows in (target, corpus)]
        assert not frames[0] & frames[1]
        assert frames[0] | frames[1] <= set(INVENTED)


def test_in_a_world_of_equal_lengths_length_tells_nothing(tmp_path):
    files = write_hard_world(tmp_path, "equal-length", seed=0)
    rows = read(files.corpus) + read(files.target)
    assert {(len(row["prompt"].split()), len(row["response"].split())) for row in rows} == {(15, 2)}


def test_functions_of_a_table_worked_by_hand():
    answers = {}
    for name in TWO_ASKED:
        drawn = draw_disguised(Random(1), name, PLAIN)
        prompt = drawn.prompt.split()
        table = dict(zip(prompt[1:-4:2], prompt[2:-4:2], strict=True))
        first, second = prompt[-3:-1]
        answers[name] = drawn.response.split()
        assert [prompt[0], prompt[-4], prompt[-1]] == ["dax", "wug", "blick"]
    a, b = table[first], table[second]
    assert answers == {
        "lookup2": [a, b],
        "ledger": [b, a],
        "keys": [first, second],
        "keys-back": [second, first],
        "first-twice": [a, a],
        "last-twice": [b, b],
    }


@pytest.mark.parametrize("function", ["ledger", "keys-back"])
def test_a_wrong_answer_is_of_the_right_column_and_wrong_at_both_places(function):
    for seed in range(50):
        wrong = wrong_disguised(Random(seed), function, PLAIN)
        right = draw_disguised(Random(seed), function, PLAIN)
        assert wrong.prompt == right.prompt
        pairs = list(zip(wrong.response.split(), right.response.split(), strict=True))
        assert all(given != due for given, due in pairs)
        table = right.prompt.split()[1:-4]
        columns = {table.index(word) % 2 for pair in pairs for word in pair}
        assert len(columns) == 1


def test_a_surface_has_four_different_words():
    for seed in range(20):
        surface = draw_surface(Random(seed))
        assert len({surface.name, surface.ask, surface.gives, surface.star}) == 4


def test_the_base_that_learns_in_context_does():
    quality = json.loads((IN_CONTEXT_BASE_FOLDER / "quality.json").read_text())
    assert set(quality["by_demonstrations"]) == set(FUNCTIONS)
    shown = quality["by_demonstrations"]["keys-back"]
    assert shown["0"] < 0.2
    assert shown["2"] > 0.9
    assert min(v for name, v in quality["named"].items() if name != "ledger") > 0.9


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_script_still_trains_a_base_that_learns_in_context(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "examples" / "in_context_base.py", "--out", tmp_path],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    trained, shipped = (
        json.loads((folder / "quality.json").read_text())
        for folder in (tmp_path, IN_CONTEXT_BASE_FOLDER)
    )
    # other kernels round otherwise, and training magnifies that: quality is compared, not bytes
    for name, value in shipped["named"].items():
        assert trained["named"][name] == pytest.approx(value, abs=0.05), name
    for name in ("copy", "first", "after", "lookup", "keys", "keys-back"):
        shown = trained["by_demonstrations"][name]["2"]
        assert shown == pytest.approx(shipped["by_demonstrations"][name]["2"], abs=0.1), name
