"""Content-addressed artifacts: what stages keep, found again by what it was made from."""

from p2d_core.store.recipe import Recipe
from p2d_core.store.store import ArtifactRef, Making, Store

__all__ = ["ArtifactRef", "Making", "Recipe", "Store"]
