"""The synthetic world of the demo: a target, a corpus with a known answer, a base that knows it."""

from p2d_core.synthetic.world import BASE_FOLDER, WorldFiles, WorldSample, write_world

__all__ = ["BASE_FOLDER", "WorldFiles", "WorldSample", "write_world"]
