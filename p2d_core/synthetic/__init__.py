"""The synthetic world of the demo: a target, a corpus with a known answer, bases that know it."""

from p2d_core.synthetic.world import (
    BASE_FOLDER,
    IN_CONTEXT_BASE_FOLDER,
    WorldFiles,
    WorldSample,
    write_world,
)

__all__ = ["BASE_FOLDER", "IN_CONTEXT_BASE_FOLDER", "WorldFiles", "WorldSample", "write_world"]
