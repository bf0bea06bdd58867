"""Work that the processes of torchrun do together in a test, and ways in which it fails.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.tasks.together FOLDER``
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import tasks.together
from p2d_core.errors import ModelError, P2DError
from p2d_core.processes import dismiss, here, join
from p2d_core.store import Making
from tasks.together import helped, serve, shared, together


def added(making: Making, numbers: tuple[tuple[int, float], ...], fails: str) -> None:
    """The sum over the processes, of the rank and what it was given."""
    rank = together().rank
    if fails == f"{rank} before":
        raise ModelError("no model. Look for it.")
    total = torch.tensor([rank + numbers[0][1]])
    torch.distributed.all_reduce(total)
    if fails == f"{rank} after":
        raise OSError("no disk")
    if fails == "hangs":
        if rank:
            raise ModelError("no model. Look for it.")
        time.sleep(60)
    torch.distributed.all_reduce(total)
    making.facts["total"] = total.item()


def main(folder: Path) -> None:
    """The first process asks for the same work again and again, whatever failed before."""
    tasks.together.SECONDS_TO_END = 5.0
    shared("added", added)
    if not join().first:
        serve()
        return
    said = {}
    for fails in ("", "1 before", "1 after", "0 before", "0 after", "never"):
        making = Making(folder, folder)
        inputs = {"numbers": ((0, 0.5),), "fails": fails}
        try:
            with helped("added", making, inputs):
                added(making, **inputs)
            said[fails] = f"{making.facts['total']} by {making.processes}"
        except (P2DError, OSError) as error:
            said[fails] = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))
    assert here().size == 2
    if (folder / "hangs").exists():
        inputs = {"numbers": ((0, 0.5),), "fails": "hangs"}
        with helped("added", Making(folder, folder), inputs):
            added(Making(folder, folder), **inputs)
    dismiss()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
