"""Why a sample is in a subset, or is not, in every way that there is."""

from pathlib import Path

from p2d_core.selection.reason import Reason, reasons
from p2d_core.selection.spec import SelectionSpec
from tests.small_selection import GATES, Corpus


def all_reasons(corpus: Corpus, gates=(), proxy_lengths=(3,), **spec) -> dict[int, Reason]:
    """Of every sample, by its row; and that they agree with the subset."""
    chosen = corpus.choose(proxy_lengths, **spec)
    ids = {sample.sample_id: sample.row for sample in corpus.samples}
    found = reasons(
        Path(corpus.folder / "scores.parquet"),
        list(proxy_lengths),
        SelectionSpec(**spec),
        gates,
        {corpus.samples[row].sample_id: by for row, by in chosen.items()},
        list(ids),
    )
    assert {ids[sample_id] for sample_id, why in found.items() if why.chosen} == set(chosen)
    return {ids[sample_id]: why for sample_id, why in found.items()}


def test_without_gates_it_is_the_best_and_what_is_below_them(tmp_path):
    why = all_reasons(Corpus(tmp_path, [0.1, 0.9, 0.3, 0.8, 0.2]), fraction=0.4)
    assert why[1].why == "drawn"
    assert why[1].words == "One of the 2 best samples: all of them were taken."
    assert why[2].why == "below"
    assert why[2].words == "Its affinity 0.3 is below 0.8, the lowest of the 2 best samples."
    assert why[2].stopped_at is None


def test_only_what_is_asked_for_is_told(tmp_path):
    corpus = Corpus(tmp_path, [0.1, 0.9, 0.3])
    corpus.choose(fraction=0.4)
    asked = [corpus.samples[0].sample_id]
    spec = SelectionSpec(fraction=0.4)
    assert [*reasons(corpus.folder / "scores.parquet", [3], spec, (), {}, asked)] == asked


def test_from_a_larger_pool_some_are_drawn_and_others_not(tmp_path):
    why = all_reasons(Corpus(tmp_path, [float(i) for i in range(20)]), fraction=0.2, pool=2.0)
    drawn = {row: each.why for row, each in why.items() if row >= 12}
    assert sorted(drawn.values()) == ["drawn"] * 4 + ["not drawn"] * 4
    assert {why[row].why for row in range(12)} == {"below"}
    words = "the 8 best samples are the pool, for 4 places; from there on it is chance, with"
    assert all(words in why[row].words for row in drawn)


def test_a_gate_that_stops_is_named_and_what_passed_all_is_drawn_from(tmp_path):
    passed = [2] * 6 + [1] * 2 + [0] * 2
    why = all_reasons(Corpus(tmp_path, [1.0] * 10, passed, gates=2), GATES[:2], fraction=0.3)
    assert (why[6].why, why[6].stopped_at) == ("stopped", "consistency")
    assert why[6].words == "Stopped at consistency, gate 2 of 2."
    assert (why[9].stopped_at, why[9].words) == ("domain", "Stopped at domain, gate 1 of 2.")
    assert sorted(why[row].why for row in range(6)) == ["drawn"] * 3 + ["not drawn"] * 3
    assert why[0].words.startswith(("Drawn: ", "Not drawn: "))
    assert "6 samples passed every gate, for 3 places" in why[0].words


def test_what_the_last_gate_was_not_tried_on_is_told_from_what_it_stopped(tmp_path):
    passed = [2] * 4 + [1] * 4 + [0] * 2
    corpus = Corpus(tmp_path, [1.0] * 10, passed, gates=2, untried=(6, 7))
    why = all_reasons(corpus, GATES[:2], fraction=0.3)
    assert [why[row].why for row in range(4, 10)] == [
        *("stopped", "stopped", "not tried", "not tried", "stopped", "stopped")
    ]
    assert why[6].words == (
        "Not tried at consistency: of a random share of those that reached it enough passed "
        "(scoring.enough)."
    )


def test_of_three_gates_the_middle_one_may_be_untried_too(tmp_path):
    passed = [3] * 4 + [2] * 2 + [1] * 4
    corpus = Corpus(tmp_path, [1.0] * 10, passed, gates=3, untried=(8, 9))
    why = all_reasons(corpus, GATES, fraction=0.3)
    assert [why[row].why for row in range(4, 10)] == ["stopped"] * 4 + ["not tried"] * 2
    assert why[5].words == "Stopped at shift, gate 3 of 3."
    assert why[8].words.startswith("Not tried at consistency: ")


def test_what_fills_up_from_the_pool_is_not_said_to_be_drawn(tmp_path):
    """Of source b too few are left; all of the pool passed its one gate, for fewer places."""
    corpus = Corpus(tmp_path, [float(i) for i in range(20)], [1] * 17 + [0] * 3, 1)
    why = all_reasons(corpus, GATES[:1], fraction=1.0, replay=0.9)
    (places,) = {
        int(each.words.split("for ")[1].split(" ")[0])
        for each in why.values()
        if each.why == "drawn"
    }
    assert places == [each.why for each in why.values()].count("drawn") == 2
    assert {why[row].why for row in range(17)} == {"drawn", "filled"}


def test_a_relaxed_gate_is_told_apart_from_one_that_was_passed(tmp_path):
    passed = [2, 2, 1, 1, 1, 0, 0, 0, 0, 0]
    margins = [1.0, 1.0, -0.9, -0.1, -0.5, -0.01, -1, -2, -3, -4]
    why = all_reasons(Corpus(tmp_path, margins, passed, gates=2), GATES[:2], fraction=0.4)
    assert [why[row].why for row in range(6)] == [
        *("drawn", "drawn", "stopped", "relaxed", "relaxed", "stopped")
    ]
    assert why[3].stopped_at == "consistency"
    assert why[3].words.startswith("It did not pass consistency, but fewer samples passed every")


def test_replay_and_what_fills_it_up(tmp_path):
    why = all_reasons(
        Corpus(tmp_path, [1.0 if i < 50 else 0.0 for i in range(100)]), fraction=0.2, replay=0.25
    )
    assert [each.why for each in why.values() if each.chosen].count("replay") == 5
    assert {why[row].why for row in range(50, 100) if why[row].chosen} == {"replay"}
    # of source b, which is behind with 1 of 4, only 4 are left for a replay of 6
    affinities = [10.0, 9.0, 8.0, 1.0, 0.5, 7.0, 2.0, 2.0, 2.0, 2.0]
    why = all_reasons(Corpus(tmp_path, affinities), fraction=1.0, replay=0.6)
    told = [why[row].why for row in range(10)]
    assert told == ["drawn"] * 3 + ["filled"] * 2 + ["drawn"] + ["replay"] * 4


def test_a_condition_that_is_not_met(tmp_path):
    where = "affinity < 8"
    why = all_reasons(Corpus(tmp_path, [float(i) for i in range(10)]), fraction=0.2, where=where)
    assert (why[9].why, why[9].chosen) == ("not met", False)
    assert why[9].words == "It does not meet selection.where: affinity < 8."
    assert [why[row].why for row in (7, 6, 5)] == ["drawn", "drawn", "below"]


def test_a_quota_has_samples_compete_within_their_source(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(100)])
    why = all_reasons(corpus, fraction=0.2, quotas=(("a", 0.25),))
    assert why[44].words == "Its affinity 44 is below 45, the lowest of the 5 best samples of a."
    assert why[45].words == "One of the 5 best samples of a: all of them were taken."
    assert why[84].words == "Its affinity 84 is below 85, the lowest of the 15 best samples."
    why = all_reasons(corpus, fraction=0.2, quotas=(("a", 1.0),))
    assert why[99].words == "The quotas of other sources left no place for it."


def test_at_random_no_affinity_has_a_say(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(20)], [i % 2 for i in range(20)], 1)
    why = all_reasons(corpus, ("domain",), fraction=0.2, at_random=True, where="affinity > 5")
    assert {each.why for each in why.values() if each.chosen} == {"at random"}
    assert {each.why for each in why.values() if not each.chosen} == {"not at random"}
