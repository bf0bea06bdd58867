"""A corpus with scores that a test writes, and subsets chosen from it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from p2d_core.samples.schema import Sample, sample_id_of, to_table
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import select_subset

GATES = ("domain", "consistency", "shift")


class Corpus:
    """A corpus with its scores: n samples, the first half of source a, the rest of source b."""

    def __init__(
        self, folder: Path, affinities: list[float], gates_passed: list[int] | None = None,
        gates: int = 0, lengths: list[int] | None = None, untried: tuple[int, ...] = (),
        untried_at: int = 1, sources: str = "ab",
    ) -> None:  # fmt: skip
        """``untried``: rows that a gate, ``untried_at``, was not tried on."""
        n = len(affinities)
        self.folder = folder
        self.samples = [
            Sample(sample_id_of(f"p{i}", "r"), sources[0 if i < n / 2 else -1], f"p{i}", "r", i)
            for i in range(n)
        ]
        pq.write_table(to_table(self.samples), folder / "corpus.parquet")
        scores = pa.table(
            {
                "sample_id": pa.array([s.sample_id for s in self.samples], pa.string()),
                "source": pa.array([s.source for s in self.samples], pa.string()),
                "affinity": pa.array(affinities, pa.float64()),
                "n_tokens": pa.array([9] * n, pa.int32()),
                "n_response_tokens": pa.array(lengths or [3] * n, pa.int32()),
                "gates_passed": pa.array(gates_passed or [0] * n, pa.int32()),
            }
        ).replace_schema_metadata({"gates": str(gates)})
        for number, gate in enumerate(GATES[:gates]):
            reached = [passed >= number for passed in gates_passed or [0] * n]
            if number == untried_at:
                reached = [yes and row not in untried for row, yes in enumerate(reached)]
            margins = [m if yes else None for m, yes in zip(affinities, reached, strict=True)]
            scores = scores.append_column(gate, pa.array(margins, pa.float64()))
        pq.write_table(scores, folder / "scores.parquet")

    def choose(self, proxy_lengths=(3,), **spec):
        self.chosen = select_subset(
            self.folder / "scores.parquet",
            [self.folder / "corpus.parquet"],
            list(proxy_lengths),
            SelectionSpec(**spec),
            self.folder,
        )
        table = pq.read_table(self.folder / "subset.parquet").to_pylist()
        return {row["row"]: row["chosen_by"] for row in table}
