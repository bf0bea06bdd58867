"""Names for plug-ins: rankers, scorers, adaptations, metrics."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from p2d_core.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to one plug-in of a kind.

    Raises:
        ValueError: a name is registered twice.
        UnknownNameError: a name is looked up that nobody registered.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a plug-in under ``name``."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The plug-in of that name."""
        if name not in self._entries:
            raise UnknownNameError(
                f"there is no {self.kind} {name!r}. Known: {', '.join(sorted(self._entries))}."
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
