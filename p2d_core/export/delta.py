"""What moved as bare numbers in safetensors, and JSON that says where they go."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from p2d_core.adaptation.slices import Block
from p2d_core.export.moved import Moved, n_values, write_moved

VALUES, PLACES = "delta.safetensors", "delta.json"
FORMAT = 1


def write_delta(
    moved: Moved,
    dtype: torch.dtype,
    folder: Path,
    base_name: str,
    sha: str,
    base_revision: str = "",
) -> None:
    """Writes ``delta.safetensors`` (parameter name -> new values) and ``delta.json``.

    The JSON has for each parameter ``dim`` and ``index``: the values are what
    ``parameter.index_select(dim, index)`` is to give.

    Args:
        sha: hash of the base, by which a reader can tell that it is the right one.
        base_revision: commit of the base on a hub; empty: none is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: block.values.to(dtype).contiguous() for name, block in moved.items()}
    save_file(values, folder / VALUES, metadata={"format": "pt"})
    about = {
        "format": FORMAT,
        "base": base_name,
        **({"base_revision": base_revision} if base_revision else {}),
        "base_sha256": sha,
        "dtype": str(dtype).removeprefix("torch."),
        "slices": {
            name: {"dim": block.dim, "index": block.index.tolist()}
            for name, block in sorted(moved.items())
        },
    }
    text = json.dumps(about, separators=(",", ":")) + "\n"
    (folder / PLACES).write_text(text, encoding="utf-8")


def apply_delta(folder: Path, model: nn.Module) -> None:
    """Writes an exported delta into its base."""
    values = load_file(folder / VALUES)
    places = json.loads((folder / PLACES).read_text(encoding="utf-8"))["slices"]
    moved = {
        name: Block(place["dim"], torch.tensor(place["index"]), values[name])
        for name, place in places.items()
    }
    write_moved(moved, model)


def delta_bytes(moved: Moved, dtype: torch.dtype) -> int:
    """Of the numbers; the JSON comes on top."""
    return n_values(moved) * dtype.itemsize
