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
