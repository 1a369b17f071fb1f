"""A shuffle of any length that is computed, item by item, and never held in memory."""

from __future__ import annotations

import math
from functools import lru_cache

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 16
"""Half rounds, even. By a chi-square test on 12,000 orders of five items, 10 can be distinguished from
uniform ones."""


def item_of(index: int, items: int, seed: int) -> int:
    """The item that sample `index` of a run is, of a finite set of `items`.

    Every item comes once in each stretch ``[e items, (e + 1) items)`` of indices, in an order of its own
    for each stretch. A pure function of its arguments.
    """
    epoch, position = divmod(index, items)
    return permute(position, items, seed, epoch)


def permute(position: int, items: int, seed: int, epoch: int = 0) -> int:
    """Where a pseudo-random permutation of ``range(items)`` takes `position`.

    A Feistel network on pairs (row, column) of a grid that is only just large enough, walked again from
    wherever it leaves the range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): one
    to one by construction, in constant memory and in about constant time. It shuffles; it does not
    encrypt.

    Args:
        position: from 0 to below `items`.
        items: how many, at least 1.
        seed, epoch: each pair has another order.
    """
    if not 0 <= position < items:
        raise IndexError(f"{position} is not within {items} items")
    rows = math.isqrt(items - 1) + 1
    columns = -(-items // rows)
    keys = _keys(seed & _MASK, epoch & _MASK)
    while True:
        row, column = divmod(position, columns)
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            row = (row + _mix(first + column * _GOLDEN)) % rows
            column = (column + _mix(second + row * _GOLDEN)) % columns
        position = row * columns + column
        if position < items:
            return position


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    """One key a half round."""
    start = _mix(_mix(seed + _GOLDEN) ^ _mix(epoch + 2 * _GOLDEN))
    return tuple(_mix(start + number * _GOLDEN) for number in range(_ROUNDS))


def _mix(x: int) -> int:
    """A one-to-one scrambling of 64 bits: SplitMix64's (Steele, Lea and Flood 2014)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
