"""A DICOM file as elements (PS3.5, chapter 7; PS3.10): the wanted ones, the others passed over.

The only DICOM parser: scans (`header`), SEG and RTSTRUCT (`voxelscale.labels`) are read by it.
Hostile files hold a hundred thousand empty items as easily as one. An item costs a read here and nothing
else; pydicom, which makes an object of each, calls a hundred functions for it. Values are taken as they are
in the file: half of all scanners break some rule of the standard in an attribute that does not matter here.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import BinaryIO, NamedTuple

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"

UNDEFINED = 0xFFFFFFFF
MEDIA_CLASS, SYNTAX = 0x00020002, 0x00020010
ITEM, ITEM_END, SEQUENCE_END, DELIMITERS = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFE
BEFORE_PIXELS, PIXELS = 0x7FE00007, 0x7FE00010

LONG_VR = frozenset(
    (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
)
"""Value representations with a length of four bytes (PS3.5, 7.1.2)."""

HOLDS_ITEMS = (b"SQ", b"UN", b"")
"""What a sequence may be called: unknown by a program in between, nothing where VRs are implicit."""

LARGEST_ELEMENT = 2**24
"""Bytes; functional groups of some ten thousand frames."""

MOST_META = 2**10
"""Elements of the first group; the standard knows a dozen."""

LONGEST_UID = 64
"""Characters (PS3.5, 6.2)."""

DEEPEST = 32
"""Sequences within each other; the standard's own go to eight or so."""

LONGEST_SHOWN = 60
"""Characters of a wrong value that a message shows."""

PIECE = 2**16
"""Bytes of a deflated file that are read at a time."""


class DamagedError(Exception):
    """A file that says it is DICOM and cannot be understood; the caller, who knows its path, reports it."""


class UnreadableError(ValueError):
    """An attribute that is needed has no readable value; the text names it."""


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

    def items(self, tag: int) -> list[Elements]:
        """A sequence's items; none where it is absent."""
        value = self.values.get(tag)
        return value if isinstance(value, list) else []

    def filled(self, tag: int) -> list[Elements]:
        """The items that hold something: hostile files hold a hundred thousand empty ones."""
        return [item for item in self.items(tag) if item.values]

    def raw(self, tag: int) -> bytes:
        """An element's bytes; none where it is absent."""
        value = self.values.get(tag)
        return value if isinstance(value, bytes) else b""

    def text(self, tag: int) -> str:
        """A text without its padding; "" where it is absent."""
        return self.raw(tag).strip(b"\0 ").decode("latin-1")

    def numbers(self, tag: int, count: int) -> tuple[float, ...] | None:
        """The numbers of a decimal string; None where it is absent or empty.

        Raises:
            UnreadableError: there are more or fewer than `count`, or one is no finite number.
        """
        text = self.text(tag)
        if not text:
            return None
        values = tuple(number(word) for word in text.split("\\"))
        if len(values) != count or not all(map(math.isfinite, values)):
            raise self.unreadable(tag)
        return values

    def whole(self, tag: int, *default: int) -> int:
        """A whole number that is written as text, or the default where it is absent.

        Raises:
            UnreadableError: it is there and none, or absent without a default.
        """
        found = self.numbers(tag, 1) or default
        if not found or found[0] != int(found[0]):
            raise self.unreadable(tag)
        return int(found[0])

    def integer(self, tag: int, *default: int, signed: bool = False) -> int:
        """As `whole`, of a binary number."""
        data = self.raw(tag)
        if not data and default:
            return default[0]
        if len(data) not in (2, 4):
            raise self.unreadable(tag)
        return int.from_bytes(data, "little" if self.little else "big", signed=signed)

    def unreadable(self, tag: int) -> UnreadableError:
        """The error that names an attribute and shows its value."""
        raw = self.raw(tag)
        if not raw.strip(b"\0 "):
            return UnreadableError(f"{label_of(tag)} is {'empty' if tag in self.values else 'missing'}")
        text = self.text(tag)
        shown = repr(text[:LONGEST_SHOWN]) if text.isprintable() else f"{len(raw)} bytes"
        return UnreadableError(f"{label_of(tag)} is {shown}, which cannot be read as a number")


Values = dict[int, bytes | list[Elements]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DicomObject:
    """What was read of a file.

    Attributes:
        media_class: UID of what the file says that it holds; "": not said.
        syntax: the transfer syntax's UID.
        data: the wanted elements in front of the pixels.
        pixels: offset and length of the pixels' value, if any; in a deflated file after inflating.
        deflated_from: where the deflated part begins in the file; 0 where it is not deflated.
    """

    path: Path
    media_class: str
    syntax: str
    data: Elements
    pixels: tuple[int, int] | None
    deflated_from: int


def is_dicom(head: bytes) -> bool:
    """Whether a file's first bytes are DICOM's preamble, or an element of group 2 or 8 without one."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00")


def read_object(
    path: Path,
    *,
    wanted: Collection[int],
    nested: Collection[int] = (),
    inflated: int,
    most: float = math.inf,
    last: int = BEFORE_PIXELS,
) -> DicomObject | None:
    """The wanted elements of a file in front of its pixels; None where it is no DICOM.

    Args:
        wanted: tags; in the items of sequences the same.
        nested: those of them that are sequences to be looked into.
        inflated: bytes to which a deflated file is unpacked at most; the rest is not looked at.
        most: elements, items and delimiters that may be passed.
        last: tag after which nothing is read.

    Raises:
        DamagedError: an element ends beyond the file, a sequence holds something other than items, or
            there are more than `most`; or the file is deflated and garbled.
    """
    try:
        with BufferedReader(FileIO(path)) as handle:
            size = os.fstat(handle.fileno()).st_size
            if not is_dicom(handle.read(132)):
                return None
            media_class, syntax, start = _meta(handle, size)
            source: BinaryIO = handle
            place = start
            if syntax == DEFLATED:
                plain = inflate(handle, start, inflated)
                source, place, size = BytesIO(plain), 0, len(plain)
            data, pixels = _read_elements(
                _Cursor(source, place, little=syntax != BIG_ENDIAN, wanted=wanted, most=most),
                frozenset(nested),
                size,
                last,
            )
    except (StructError, zlib.error) as error:
        raise DamagedError(str(error)) from None
    return DicomObject(
        path=path,
        media_class=media_class,
        syntax=syntax,
        data=data,
        pixels=pixels,
        deflated_from=start if syntax == DEFLATED else 0,
    )


def inflated_size(path: Path, limit: int) -> int:
    """Bytes of a deflated file's data set once inflated, counted up to `limit`, with hardly any memory.

    Other files have 0.

    Raises:
        DamagedError: its first group or its code is garbled.
    """
    try:
        with BufferedReader(FileIO(path)) as handle:
            _, syntax, start = _meta(handle, os.fstat(handle.fileno()).st_size)
            return sum(map(len, _inflated(handle, start, limit))) if syntax == DEFLATED else 0
    except (StructError, zlib.error) as error:
        raise DamagedError(str(error)) from None


def inflate(handle: BinaryIO, start: int, limit: int) -> bytes:
    """At most `limit` bytes of a deflated data set (PS3.5, A.5)."""
    return b"".join(_inflated(handle, start, limit))


def _inflated(handle: BinaryIO, start: int, limit: int) -> Iterator[bytes]:
    handle.seek(start)
    engine, left = zlib.decompressobj(-zlib.MAX_WBITS), limit
    data = handle.read(PIECE)
    while data and left > 0 and not engine.eof:
        part = engine.decompress(data, min(left, LARGEST_ELEMENT))
        left -= len(part)
        data = engine.unconsumed_tail or handle.read(PIECE)
        yield part


def label_of(tag: int) -> str:
    """An attribute as messages call it: ``RescaleIntercept (0028,1052)``."""
    from pydicom.datadict import keyword_for_tag

    return f"{keyword_for_tag(tag)} ({tag >> 16:04x},{tag & 0xFFFF:04x})"


def number(word: str) -> float:
    """A number as text (PS3.5, 6.2: DS, IS), a decimal comma read as the point; NaN where it is none.

    A comma before just three digits may have been meant for thousands: 1,250 is no number.
    """
    word = word.strip(" \0")
    thousands = re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", word)
    if re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", word) and not thousands:
        return float(word.replace(",", "."))
    return math.nan


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


def _meta(handle: BinaryIO, size: int) -> tuple[str, str, int]:
    """Media class, transfer syntax, and where the data set begins (PS3.10: explicit little endian)."""
    handle.seek(128)
    start = 132 if handle.read(4) == b"DICM" else 0
    cursor = _Cursor(handle, start, little=True, wanted=(MEDIA_CLASS, SYNTAX), most=MOST_META)
    values: dict[int, str] = {}
    while (head := cursor.head(True)) is not None and head[0] >> 16 == 2:
        tag, _, length = head
        start = cursor.place + length
        if start > size:
            raise DamagedError("it ends in its first group")
        if tag in cursor.wanted:
            values[tag] = cursor.take(min(length, LONGEST_UID)).strip(b"\0 ").decode("latin-1")
        cursor.jump_to(start)
    return values.get(MEDIA_CLASS, ""), values.get(SYNTAX, "") or EXPLICIT, start


def _read_elements(
    cursor: _Cursor, nested: frozenset[int], size: int, last: int
) -> tuple[Elements, tuple[int, int] | None]:
    """The wanted elements up to the tag `last`; offset and length of the pixels' value, if they follow."""
    # Some files are explicit where they say implicit, and the other way round: the first element shows it.
    explicit = _is_vr(cursor.handle.read(6)[4:])
    cursor.handle.seek(cursor.place)
    values: Values = {}
    pixels = None
    while (head := cursor.head(explicit)) is not None:
        tag, _, length = head
        if tag > last:
            pixels = (cursor.place, length) if tag == PIXELS else None
            break
        _value(cursor, values, head, nested, explicit, size)
    return Elements(values=values, little=cursor.little), pixels


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
    """Keep a wanted value or pass over it; it must end at `limit`, where what holds it ends.

    A value says its length, or is a sequence that ends by a delimiter: such a one has to be walked through
    even if nobody wants it, since nothing else says where it ends.
    """
    tag, vr, length = head
    wanted, closed = tag in cursor.wanted, length != UNDEFINED
    end = cursor.place + length if closed else limit
    if end > limit:
        raise DamagedError("an element is longer than what holds it")
    if tag in nested and vr in HOLDS_ITEMS:
        values[tag] = [
            _item(cursor, item, nested, explicit, depth + 1) for item in _items(cursor, end, closed=closed)
        ]
    elif not closed:
        for item in _items(cursor, end, closed=False):
            _pass_over(cursor, item, explicit, depth + 1)
        if wanted:
            values[tag] = b""
    elif wanted:
        if length > LARGEST_ELEMENT:
            raise DamagedError(f"an element of {length} bytes")
        values[tag] = cursor.take(length)
    if closed:
        cursor.jump_to(end)


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


def _pass_over(cursor: _Cursor, item: _Item, explicit: bool, depth: int) -> None:
    """Leave an item that nobody wants; one that does not say its length is walked through."""
    if item.closed:
        cursor.jump_to(item.end)
    else:
        _item(cursor, item, frozenset(), explicit, depth)


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
