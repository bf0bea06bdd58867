"""Content-defined shards: a changed or inserted sample leaves the other shards as they are."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from p2d_core.errors import ArtifactError
from p2d_core.parquet import parquet_options
from p2d_core.samples.schema import SAMPLE_SCHEMA, Sample, from_table, to_table

TARGET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard as it was written: file name, rows, `shard_hash`."""

    file: str
    rows: int
    sha: str


def cut_into_shards(
    samples: Iterable[Sample], target_rows: int = TARGET_ROWS
) -> Iterator[list[Sample]]:
    """Cuts where a sample's id says so, so that cuts do not depend on what stands before.

    One sample in ``target_rows`` ends a shard, but no shard has fewer rows than a quarter of that
    (except the last) or more than four times that. After a change the old cuts are met again at
    the next of them that the bounds allow: nearly always at the end of the same shard. No more
    than ``target_rows`` samples are one shard: parts of them would have more padding.
    """
    samples = iter(samples)
    head = list(islice(samples, target_rows + 1))
    if head and len(head) <= target_rows:
        yield head
        return
    fewest, most = max(1, target_rows // 4), 4 * target_rows
    shard: list[Sample] = []
    for sample in chain(head, samples):
        shard.append(sample)
        ends_here = int(sample.sample_id[:8], 16) % target_rows == 0
        if (ends_here and len(shard) >= fewest) or len(shard) >= most:
            yield shard
            shard = []
    if shard:
        yield shard


def shard_hash(samples: Iterable[Sample]) -> str:
    """SHA-256 (hex) of the sample ids in order: of the texts, not of where they stood."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.sample_id.encode() + b"\n")
    return digest.hexdigest()


def write_shards(
    samples: Iterable[Sample], folder: Path, target_rows: int = TARGET_ROWS
) -> list[ShardInfo]:
    """Writes zstd Parquet files whose names sort in the samples' order; holds one shard at a time.

    The files appear one by one: write into a staged folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, shard in enumerate(cut_into_shards(samples, target_rows)):
        info = ShardInfo(f"shard-{number:06d}.parquet", len(shard), shard_hash(shard))
        pq.write_table(to_table(shard), folder / info.file, **parquet_options(SAMPLE_SCHEMA))
        shards.append(info)
    return shards


def read_shard(path: Path) -> list[Sample]:
    """The samples of one shard, in order.

    Raises:
        ArtifactError: the file is missing, cut short, or has other columns.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"{path} cannot be read as a shard ({reason}). "
            "Remove its artifact's folder; the next run makes it again."
        ) from error
    if not table.schema.equals(SAMPLE_SCHEMA):
        raise ArtifactError(
            f"{path} is no shard of samples: its columns are {', '.join(table.column_names)}, "
            f"due are {', '.join(SAMPLE_SCHEMA.names)}."
        )
    return from_table(table)
