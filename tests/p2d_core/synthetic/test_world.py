"""What the synthetic world promises: known counts, right and wrong answers, no shared samples."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from p2d_core.synthetic import BASE_FOLDER, WorldFiles, write_world
from p2d_core.synthetic.skills import SKILLS, VOCABULARY

ROOT = Path(__file__).parents[3]
Row = dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write_world(tmp_path_factory.mktemp("world"), seed=0)


def read(*paths: Path) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def every_file(world: WorldFiles) -> tuple[Path, ...]:
    return (world.target, *world.corpus, world.evaluation, world.skills)


def ledger_amounts(prompt: str) -> list[str]:
    """The ledger rule, worked out of the prompt alone: last name asked, first amount given."""
    body, question = prompt.removeprefix("ledger ").removesuffix(" gives").split(" ask ")
    words = body.split()
    amount_of = dict(zip(words[::2], words[1::2], strict=True))
    return [amount_of[name] for name in reversed(question.split())]


def test_the_corpus_has_the_counts_that_precision_is_measured_against(world: WorldFiles) -> None:
    labels = {path.name: Counter(row["label"] for row in read(path)) for path in world.corpus}
    assert labels == {
        "ledgers.jsonl": {"clean": 450, "wrong": 300},
        "lookups.jsonl": {"near": 450},
        "drills.jsonl": {"other": 1800},
    }


def test_targets_and_test_sets_have_their_sizes(world: WorldFiles) -> None:
    sizes = [len(read(path)) for path in (world.target, world.evaluation, world.skills)]
    assert sizes == [200, 300, 300]


def test_the_old_skills_are_tested_equally_often(world: WorldFiles) -> None:
    asked = Counter(row["prompt"].split()[0] for row in read(world.skills))
    assert asked == dict.fromkeys(SKILLS, 30)


def test_no_prompt_stands_twice_in_the_world(world: WorldFiles) -> None:
    prompts = Counter(row["prompt"] for row in read(*every_file(world)))
    assert prompts.most_common(1)[0][1] == 1


def test_the_same_seed_writes_the_same_bytes(world: WorldFiles, tmp_path: Path) -> None:
    again = write_world(tmp_path, seed=0)
    for first, second in zip(every_file(world), every_file(again), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_draws_other_samples(world: WorldFiles, tmp_path: Path) -> None:
    other = write_world(tmp_path, seed=1)
    assert not {r["prompt"] for r in read(world.target)} & {r["prompt"] for r in read(other.target)}


def test_clean_ledgers_obey_the_rule(world: WorldFiles) -> None:
    rows = read(world.target, world.evaluation, world.ledgers)
    clean = [row for row in rows if row["label"] == "clean"]
    assert len(clean) == 200 + 300 + 450
    assert all(row["response"].split() == ledger_amounts(row["prompt"]) for row in clean)


def test_wrong_ledgers_are_wrong_at_both_places(world: WorldFiles) -> None:
    for row in read(world.ledgers):
        if row["label"] == "wrong":
            given, right = row["response"].split(), ledger_amounts(row["prompt"])
            assert len(given) == len(right)
            assert all(a != b for a, b in zip(given, right, strict=True))


def test_every_word_of_the_world_is_one_token_and_none_is_unknown(world: WorldFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    for row in read(*every_file(world)):
        for text in (row["prompt"], row["response"]):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids


def test_the_base_fits_its_hash_and_has_at_least_32_grouped_query_heads() -> None:
    digest, name = (BASE_FOLDER / "base.sha256").read_text().split()
    assert hashlib.sha256((BASE_FOLDER / name).read_bytes()).hexdigest() == digest
    config = AutoConfig.from_pretrained(BASE_FOLDER)
    assert config.num_hidden_layers * config.num_attention_heads >= 32
    assert config.num_key_value_heads < config.num_attention_heads
    assert sum(path.stat().st_size for path in BASE_FOLDER.iterdir()) <= 4_000_000


def test_the_base_has_no_start_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    assert tokenizer.bos_token_id is None
    assert (
        tokenizer("ledger anna one").input_ids
        == tokenizer("ledger anna one", add_special_tokens=False).input_ids
    )
    assert set(VOCABULARY) < set(tokenizer.get_vocab())


def test_the_base_knows_its_skills_and_not_the_target() -> None:
    quality = json.loads((BASE_FOLDER / "quality.json").read_text())
    assert min(quality[skill] for skill in SKILLS) >= 0.95
    assert quality["ledger"] <= 0.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_still_trains_a_base_of_the_same_quality(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "examples" / "synthetic_base.py", "--out", tmp_path],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    trained = json.loads((tmp_path / "quality.json").read_text())
    shipped = json.loads((BASE_FOLDER / "quality.json").read_text())
    # other kernels round otherwise, and training magnifies that: quality is compared, not bytes
    for skill in (*SKILLS, "ledger"):
        assert trained[skill] == pytest.approx(shipped[skill], abs=0.05), skill
