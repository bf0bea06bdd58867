"""Gates, and what a chain's second step does to the scores of the first."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from p2d_core.affinity.measuring import MeasuredCorpus
from p2d_core.affinity.protocol import Scorer, Step
from p2d_core.affinity.scoring import passing_ids, score_corpus
from p2d_core.errors import P2DError
from p2d_core.samples.schema import Sample, sample_id_of, to_table


@dataclass(frozen=True)
class Given(Scorer):
    """A scorer whose affinity is a column that the test has written."""

    own: tuple[float, ...]

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False

    def prepare(self, model, heads, target):
        return {}

    def measure(self, model, state, shard):
        return {}

    def affinity(self, state, measured):
        for table in measured:
            yield table["value"].combine_chunks()

    def own_affinity(self, state, measured):
        return torch.tensor(self.own, dtype=torch.float64)


def write(folder, name, values: list[dict[int, float]], n: int) -> MeasuredCorpus:
    """Shards of n samples; of each, the samples whose number has a value are measured."""
    parts = []
    for index, given in enumerate(values):
        shard = [
            Sample(sample_id_of(f"{index}/{i}", "r"), "s", f"{index}/{i}", "r", i) for i in range(n)
        ]
        pq.write_table(to_table(shard), folder / f"shard{index}.parquet")
        measured = pa.table(
            {
                "sample_id": pa.array([shard[i].sample_id for i in given], pa.string()),
                "n_tokens": pa.array([5] * len(given), pa.int32()),
                "n_response_tokens": pa.array([2] * len(given), pa.int32()),
                "value": pa.array(list(given.values()), pa.float64()),
            }
        )
        pq.write_table(measured, folder / f"{name}{index}.parquet")
        parts.append((folder / f"shard{index}.parquet", folder / f"{name}{index}.parquet"))
    return MeasuredCorpus(parts)


DOMAIN = Step("domain", Given((0.0, 1.0, 2.0, 3.0, 4.0)), 0.25)
CONSISTENCY = Step("consistency", Given((-1.0, -3.0)), 0.0)


def test_a_gate_is_a_quantile_of_the_targets_own_affinities(tmp_path):
    first = write(tmp_path, "m", [{0: 0.9, 1: 1.0, 2: 5.0}], 3)
    outcome = score_corpus(DOMAIN, {}, first, tmp_path / "scores.parquet")
    assert outcome.gate.threshold == pytest.approx(1.0)
    assert (outcome.rows, outcome.passed) == (3, 2)
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table["gates_passed"].to_pylist() == [0, 1, 1]
    spread = np.std([0, 1, 2, 3, 4])
    np.testing.assert_allclose(table["affinity"], [-0.1 / spread, 0, 4 / spread])
    assert table["domain"].to_pylist() == [0.9, 1.0, 5.0]


def test_a_second_step_measures_what_passed_and_affinity_is_the_smallest_margin(tmp_path):
    first = write(tmp_path, "a", [{0: 9.0, 1: 2.0, 2: -1.0}, {0: 0.0, 1: 0.0, 2: 0.0}], 3)
    before = tmp_path / "first.parquet"
    score_corpus(DOMAIN, {}, first, before)
    assert len(passing_ids(before, 0)) == 2
    assert passing_ids(before, 1) == set()
    second = write(tmp_path, "b", [{0: -3.0, 1: -9.0}, {}], 3)
    outcome = score_corpus(CONSISTENCY, {}, second, tmp_path / "both.parquet", previous=before)
    table = pq.read_table(tmp_path / "both.parquet")
    assert table.schema.metadata[b"gates"] == b"2"
    assert table["gates_passed"].to_pylist() == [2, 1, 0, 0, 0, 0]
    assert table["consistency"].to_pylist() == [-3.0, -9.0, None, None, None, None]
    affinity = table["affinity"].to_pylist()
    assert affinity[0] == 0
    assert affinity[1] == pytest.approx(-6)
    assert affinity[2] == pytest.approx(-2 / np.std([0, 1, 2, 3, 4]))
    assert outcome.passed == 1


def test_without_a_gate_the_affinity_is_the_scorers_own_number(tmp_path):
    measured = write(tmp_path, "m", [{0: 0.25, 1: -7.0}], 2)
    score_corpus(Step("affinity", Given(())), {}, measured, tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["affinity"].to_pylist() == [0.25, -7.0]
    assert table.schema.metadata[b"gates"] == b"0"


def test_an_affinity_that_is_no_number_names_the_sample(tmp_path):
    measured = write(tmp_path, "m", [{0: 0.25, 1: float("nan")}], 2)
    with pytest.raises(P2DError, match="'affinity' gave 1 affinities that are not numbers, the f"):
        score_corpus(Step("affinity", Given(())), {}, measured, tmp_path / "s.parquet")


def test_a_target_all_alike_sets_a_gate_that_it_passes_itself(tmp_path):
    measured = write(tmp_path, "m", [{0: 1.0, 1: 0.5}], 2)
    step = Step("domain", Given((1.0, 1.0)), 0.5)
    outcome = score_corpus(step, {}, measured, tmp_path / "s.parquet")
    assert outcome.gate.spread == 1.0
    assert outcome.passed == 1


def test_a_corpus_reads_no_other_columns_than_it_is_asked_for(tmp_path):
    corpus = write(tmp_path, "m", [{0: 9.0, 2: -1.0}], 3)
    (table,) = corpus.only("value")
    assert table.column_names == ["value"]
    (table,) = corpus.only("sample_id", "source", "value")
    assert table.column_names == ["sample_id", "source", "value"]
    assert table["value"].to_pylist() == [9.0, -1.0]
    (everything,) = corpus
    assert everything["sample_id"].to_pylist() == table["sample_id"].to_pylist()
    assert {"prompt", "response", "n_tokens"} <= set(everything.column_names)
