"""How tables are written as Parquet."""

from typing import Any

import pyarrow as pa

REPEATED = "source"
"""The one column of samples and scores whose values repeat."""


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """For ``write_table`` and ``ParquetWriter``: what is made of a table of samples, or of numbers.

    By default every column has a dictionary until that is found to be too long: of numbers and ids
    it is made for nothing, and stays in the file beside the values.
    """
    vectors = [
        f"{field.name}.list.element"
        for field in schema
        if pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]
    return {
        "compression": "zstd",
        "use_dictionary": [REPEATED],
        "column_encoding": {name: "BYTE_STREAM_SPLIT" for name in vectors} or None,
    }
