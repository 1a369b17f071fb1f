"""The elements of a DICOM data set as bytes (PS3.5, chapter 7): the wanted ones, the others passed over.

Hostile files hold a hundred thousand empty items as easily as one. An item costs a read here and nothing
else; a library that makes an object of each is ten times as slow.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import BinaryIO, NamedTuple

UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END, DELIMITERS = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFE
PIXELS_BEGIN, PIXELS = 0x7FE00008, 0x7FE00010

LONG_VR = frozenset(
    (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
)
"""Value representations with a length of four bytes (PS3.5, 7.1.2)."""

HOLDS_ITEMS = (b"SQ", b"UN", b"")
"""What a sequence may be called: unknown by a program in between, nothing where VRs are implicit."""

LARGEST_ELEMENT = 2**24
"""Bytes; functional groups of some ten thousand frames."""

DEEPEST = 32
"""Sequences within each other; the standard's own go to eight or so."""


class DamagedError(Exception):
    """A file that says it is DICOM and cannot be understood; told by the caller, who knows its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Elements:
    """A data set, or an item of a sequence.

    Attributes:
        values: by tag (group * 65536 + element): an element's bytes as they are in the file, or a
            sequence's items.
        little: whether numbers are little endian.
    """

    values: Values
    little: bool


Values = dict[int, bytes | list[Elements]]


class _Item(NamedTuple):
    """Where an item ends at the latest, and whether it says so itself."""

    end: int
    closed: bool


class _Cursor:
    """Where in the file the reading stands, and what is looked for."""

    def __init__(
        self, handle: BinaryIO, place: int, *, little: bool, wanted: Collection[int], most: float
    ) -> None:
        self.handle, self.place, self.little, self.wanted = handle, place, little, frozenset(wanted)
        self.left = most
        order = "<" if little else ">"
        self.implicit, self.long, self.short = (Struct(order + code) for code in ("HHI", "I", "6xH"))
        self.empty = Elements(values={}, little=little)
        handle.seek(place)

    def take(self, count: int) -> bytes:
        data = self.handle.read(count)
        self.place += len(data)
        return data

    def jump_to(self, place: int) -> None:
        # Never back: what is read twice could be read any number of times.
        if place < self.place:
            raise DamagedError("an element reaches beyond what holds it")
        if place > self.place:
            self.place = place
            self.handle.seek(place)

    def head(self, explicit: bool) -> tuple[int, bytes, int] | None:
        """Tag, VR (empty where it is implicit) and length of the next element; None at the file's end."""
        data = self.handle.read(8)
        self.place += 8
        if len(data) < 8:
            return None
        self.left -= 1
        if self.left < 0:
            raise DamagedError("a header without an end")
        group, element, length = self.implicit.unpack(data)
        vr = b""
        # Delimiters have no VR; some writers change to implicit within a file.
        if explicit and group != DELIMITERS and _is_vr(data[4:6]):
            vr = data[4:6]
            length = self.long.unpack(self.take(4))[0] if vr in LONG_VR else self.short.unpack(data)[0]
        return group << 16 | element, vr, length


def read_elements(
    handle: BinaryIO,
    start: int,
    size: int,
    *,
    little: bool,
    wanted: Collection[int],
    nested: Collection[int],
    most: float = math.inf,
) -> tuple[Elements, tuple[int, int] | None]:
    """The wanted elements in front of the pixels; offset and length of the pixels' value, if any.

    Args:
        start, size: of the data set and of all, in bytes.
        wanted: tags; in the items of sequences the same.
        nested: those of them that are sequences to be looked into.
        most: elements, items and delimiters that may be passed.

    Raises:
        DamagedError: an element ends beyond the file, a sequence holds something other than items, or
            there are more than `most`.
    """
    handle.seek(start)
    # Some files are explicit where they say implicit, and the other way round: the first element shows it.
    explicit = _is_vr(handle.read(6)[4:])
    cursor = _Cursor(handle, start, little=little, wanted=wanted, most=most)
    values: Values = {}
    within = frozenset(nested)
    while (head := cursor.head(explicit)) is not None:
        tag, _, length = head
        if tag >= PIXELS_BEGIN:
            pixels = (cursor.place, length) if tag == PIXELS else None
            return Elements(values=values, little=little), pixels
        _value(cursor, values, head, within, explicit, size)
    return Elements(values=values, little=little), None


def _is_vr(letters: bytes) -> bool:
    return letters.isalpha() and letters.isupper()


def _value(
    cursor: _Cursor,
    values: Values,
    head: tuple[int, bytes, int],
    nested: frozenset[int],
    explicit: bool,
    limit: int,
    depth: int = 0,
) -> None:
    """Read a value and keep it, or pass over it; it must end at `limit`, where what holds it ends."""
    tag, vr, length = head
    wanted, closed = tag in cursor.wanted, length != UNDEFINED
    end = cursor.place + length if closed else limit
    if end > limit or (closed and wanted and length > LARGEST_ELEMENT):
        raise DamagedError("an element is longer than what holds it")
    if tag in nested and vr in HOLDS_ITEMS:
        values[tag] = [
            _item(cursor, of, nested, explicit, depth + 1) for of in _items(cursor, end, closed=closed)
        ]
        if closed:
            cursor.jump_to(end)
    elif closed:
        if wanted:
            values[tag] = cursor.take(length)
        else:
            cursor.jump_to(end)
    else:
        for of in _items(cursor, end, closed=False):
            if of.closed:
                cursor.jump_to(of.end)
            else:
                _item(cursor, of, frozenset(), explicit, depth + 1)
        if wanted:
            values[tag] = b""


def _items(cursor: _Cursor, end: int, *, closed: bool) -> Iterator[_Item]:
    """Each item of a sequence, with the cursor before its first element."""
    while cursor.place < end:
        head = cursor.head(False)
        if head is None or head[0] not in (ITEM, SEQUENCE_END):
            raise DamagedError("a sequence of something other than items")
        tag, _, length = head
        if tag == SEQUENCE_END:
            return
        own = length != UNDEFINED
        if own and cursor.place + length > end:
            raise DamagedError("an item is longer than its sequence")
        yield _Item(end=cursor.place + length if own else end, closed=own)
    if not closed:
        raise DamagedError("a sequence without an end")


def _item(cursor: _Cursor, item: _Item, nested: frozenset[int], explicit: bool, depth: int) -> Elements:
    if depth > DEEPEST:
        raise DamagedError("sequences within sequences without an end")
    if item.closed and item.end == cursor.place:
        return cursor.empty
    values: Values = {}
    first = True
    while cursor.place < item.end:
        head = cursor.head(explicit)
        if head is None or head[0] == ITEM_END:
            break
        # An item of an unknown sequence (VR UN) is implicit in an explicit file (PS3.5, 6.2.2).
        explicit = explicit and (bool(head[1]) or not first)
        first = False
        _value(cursor, values, head, nested, explicit, item.end, depth)
    if item.closed:
        cursor.jump_to(item.end)
    return Elements(values=values, little=cursor.little) if values else cursor.empty
