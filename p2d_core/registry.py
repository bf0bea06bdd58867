"""Names for plug-ins: rankers, scorers, adaptations, metrics."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from p2d_core.errors import SettingsError, UnknownNameError

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

    def name_of(self, entry: T) -> str:
        """The name that a plug-in is registered under."""
        return next(name for name, known in self._entries.items() if known is entry)

    def make(self, name: str, options: Mapping[str, Any], *, seed: int | None = None) -> Any:
        """The plug-in of that name, a dataclass, with its settings checked.

        Args:
            seed: of a plug-in that draws by chance and whose options give it none.

        Raises:
            UnknownNameError: there is none of that name.
            SettingsError: it has no such setting, or not with such a value.
        """
        plugin: Any = self.get(name)
        known = [f.name for f in fields(plugin) if f.init] if is_dataclass(plugin) else []
        if seed is not None and "seed" in known:
            options = {"seed": seed, **options}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise SettingsError(
                f"{self.kind} {name!r} has no setting {', '.join(unknown)}. "
                f"Known: {', '.join(known) if known else 'none'}."
            )
        try:
            return TypeAdapter(plugin).validate_python(dict(options))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise SettingsError(
                f"{self.kind} {name!r}: setting `{key}` was {problem['input']!r}. {problem['msg']}."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
