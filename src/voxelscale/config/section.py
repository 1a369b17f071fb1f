"""What every section of the config has: frozen keys with types, and rules that no type can state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Triple = tuple[float, float, float]
IntTriple = tuple[int, int, int]

Rule = tuple[str, bool, str]
"""A key of the section, whether its value is allowed, and what it must be."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of keys; the docstring under each key is its documentation (`voxelscale config`)."""

    def rules(self) -> Sequence[Rule]:
        """The ranges of the section's values."""
        return ()

    def at_least_0(self, *keys: str) -> list[Rule]:
        """Rules of numbers, and of tuples of them; null is allowed."""
        return [(key, all(n >= 0 for n in self._numbers(key)), "at least 0") for key in keys]

    def shares(self, *keys: str) -> list[Rule]:
        """Rules of probabilities and other shares."""
        return [(key, all(0 <= n <= 1 for n in self._numbers(key)), "between 0 and 1") for key in keys]

    def ranges(self, *keys: str) -> list[Rule]:
        """Rules of a minimum and a maximum above 0."""
        rules: list[Rule] = []
        for key in keys:
            low, high = self._numbers(key)
            rules.append((key, 0 < low <= high, "minimum and maximum above 0, in this order"))
        return rules

    def each_once(self, *keys: str) -> list[Rule]:
        """Rules of lists: what stood there twice would count twice."""
        lists = {key: getattr(self, key) for key in keys}
        return [(key, 1 <= len(v) == len(set(v)), "one or more, each once") for key, v in lists.items()]

    def _numbers(self, key: str) -> Sequence[float]:
        value = getattr(self, key)
        if value is None:
            return ()
        return value if isinstance(value, tuple) else (value,)
