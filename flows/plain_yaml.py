"""YAML of plain values: no tags that make objects, no aliases that blow up, no key given twice."""

from __future__ import annotations

import reprlib
from collections import Counter
from typing import Any

import yaml

MOST_NODES = 20_000
"""Values in a file, with everything that an alias stands for."""
MOST_DEEP = 50

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


class NotPlain(Exception):
    """What cannot be read although its grammar may be right; says where."""


def plain_yaml(text: str) -> Any:
    """Strings, numbers, lists and mappings.

    Raises:
        yaml.YAMLError: it is not YAML, or has a tag that would make something else.
        NotPlain: it is too large or too deep with its aliases written out, has a key twice, or a
            value that cannot be.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    except RecursionError:
        raise NotPlain(f"it is nested more than {MOST_DEEP} deep") from None
    except ValueError as error:
        # a date such as 2026-99-99, a number of thousands of digits
        raise NotPlain(f"a value cannot be read: {error}") from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def shortened(value: Any) -> str:
    """A value in the words of an error message, short however large it is."""
    return _REPR.repr(value)


def _check(root: yaml.Node) -> None:
    """Walks the nodes as if every alias were written out, and no further than is allowed."""
    waiting = [(root, 1)]
    met = 0
    while waiting:
        node, depth = waiting.pop()
        met += 1
        where = f"line {node.start_mark.line + 1}"
        if met > MOST_NODES:
            raise NotPlain(f"it has more than {MOST_NODES:,} values with its aliases written out")
        if depth > MOST_DEEP:
            raise NotPlain(f"{where}: it is nested more than {MOST_DEEP} deep")
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, count in keys.items():
                if count > 1:
                    raise NotPlain(f"{where}: the key {shortened(key)} stands twice in a mapping")
            for pair in node.value:
                waiting += [(part, depth + 1) for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]
