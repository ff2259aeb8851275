"""YAML with its line numbers, whose keys are texts, and without keys given twice.

YAML 1.1 takes the words `off`, `on`, `yes` and `no` for booleans, also where they name something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml


class Trouble(NamedTuple):
    """What keeps a text from being read: its line (0 = unknown), the key, and what is wrong."""

    line: int
    key: str
    message: str


class Unreadable(Exception):
    """The text is not a YAML mapping with each key once."""

    def __init__(self, troubles: list[Trouble]) -> None:
        super().__init__(troubles)
        self.troubles = troubles


@dataclass(frozen=True, slots=True)
class Lines:
    """A YAML document's values, and the line that each stands on."""

    values: dict[str, Any]
    root: yaml.Node | None = None

    @classmethod
    def of(cls, text: str) -> Lines:
        """Raises `Unreadable`."""
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if root is None:
                return cls({})
            twice = [
                Trouble(key.start_mark.line + 1, str(key.value), "is given twice; keep one")
                for key in _duplicates(root, set())
            ]
            if twice:
                raise Unreadable(twice)
            values = _value(root)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            said = getattr(error, "problem", None) or "unreadable characters"
            trouble = Trouble(mark.line + 1 if mark else 0, "", f"is not valid YAML: {said}")
            raise Unreadable([trouble]) from None
        if not isinstance(values, dict):
            raise Unreadable([Trouble(1, "", "must be a mapping of settings")])
        return cls(values, root)

    def has(self, path: Sequence[str | int]) -> bool:
        """Whether something stands at a path of keys and indices."""
        node = self.root
        for step in path:
            found = _child(node, step)
            if found is None:
                return False
            node = found[1]
        return True

    def line(self, path: Sequence[str | int]) -> int:
        """The line of what stands at a path, or of the last thing on the way there."""
        node, line = self.root, 1
        for step in path:
            found = _child(node, step)
            if found is None:
                break
            line, node = found
        return line


def value(text: str) -> Any:
    """What a text says, its keys as texts; None where it is empty. Raises yaml.YAMLError."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if root is None else _value(root)


def _value(root: yaml.Node) -> Any:
    for key in _keys(root, set()):
        if key.tag != "tag:yaml.org,2002:merge":
            key.tag = "tag:yaml.org,2002:str"
    return yaml.SafeLoader("").construct_document(root)


def _keys(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """The keys of all mappings in it."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield from (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for _, inner in node.value:
            yield from _keys(inner, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keys(item, seen)


def _child(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    """Line and node of a mapping's key or of a sequence's item."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(step):
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item.start_mark.line + 1, item
    return None


def _duplicates(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """Keys that a mapping has more than once; YAML would keep the last and say nothing."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in names:
                    yield key
                names.add(key.value)
            yield from _duplicates(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, seen)
