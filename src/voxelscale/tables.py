"""Tables (CSV) as programs and people write them: one reader for all that are read here.

Read are commas, semicolons or tabs; a byte order mark, UTF-8 or UTF-16; any line ends; quoted cells; a
decimal comma where the comma does not separate; and column names in any case with the usual synonyms.
What is not understood is an error that quotes the line.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxelscale.errors import VoxelscaleError

LARGEST_TABLE = 2**28
"""Bytes of a table; LUNA16's 750,000 candidates are some 80 MB."""

LONGEST_QUOTE = 80
"""Characters of a cell or line that a message shows; a series' name has 64 at most."""

SEPARATORS = (",", ";", "\t", "|")

SYNONYMS = tuple(
    tuple(group.split())
    for group in (
        "seriesuid seriesinstanceuid series seriesid seriesinstance",
        *(f"coord{a} {a} {a}mm coord{a}mm {a}coord world{a} center{a}" for a in "xyz"),
        "diametermm diameter diam diammm eqdiameter",
        "probability confidence score prob",
        "image images img scan path imagepath imagefile ct volume file filename",
        "label labels mask masks seg segmentation labelpath maskpath segpath",
        "patient patientid subject subjectid pid",
        "case caseid casename id name",
    )
)
"""Column names that mean the same, without blanks and punctuation, in small letters."""

_KNOWN = frozenset(name for group in SYNONYMS for name in group)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first line has been understood.

    Attributes:
        line: of the column names, from 1.
        places: index of each column that was asked for and is there.
        width: how many columns there are.
    """

    path: Path
    line: int
    places: Mapping[str, int]
    width: int
    separator: str
    text: str = field(repr=False)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """The rows that are not blank, each with the number of its line.

        Raises:
            VoxelscaleError: one has more or fewer cells than the first line has columns.
        """
        for number, cells in _lines(self.path, self.text, self.separator):
            if number <= self.line:
                continue
            if len(cells) != self.width:
                self._check_width(number, cells)
            yield number, cells

    def _check_width(self, number: int, cells: list[str]) -> None:
        hint = f"its first line names {self.width} columns: give each row as many cells"
        if len(cells) < self.width:
            raise VoxelscaleError(
                f"{self.path}: line {number} is cut short: {len(cells)} of {self.width} cells", hint
            )
        if any(cell.strip() for cell in cells[self.width :]):
            raise VoxelscaleError(f"{self.path}: line {number} has {len(cells)} cells", hint)

    def word(self, cells: Sequence[str], column: str) -> str:
        """The text of a cell without surrounding blanks; "" where the table lacks the column."""
        place = self.places.get(column)
        return "" if place is None else cells[place].strip()

    def numbers(self, line: int, cells: Sequence[str], columns: Sequence[str]) -> tuple[float, ...]:
        """The numbers of a row, in the order of `columns`.

        Raises:
            VoxelscaleError: one of them is no finite number.
        """
        return tuple(self._number(line, column, cells[self.places[column]]) for column in columns)

    def _number(self, line: int, column: str, text: str) -> float:
        try:
            value = float(text if self.separator == "," else text.replace(",", "."))
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or "_" in text:  # Python reads 1_000, too
            quoted = repr(text.strip()[:LONGEST_QUOTE])
            message = f"{self.path}: line {line}: {column} is {quoted}, not a finite number"
            raise VoxelscaleError(message, "correct or drop the line")
        return value


def read_table(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """A table whose first line names the columns.

    Args:
        needed: columns that must be there, each once, by these names or a synonym.
        optional: columns that may be there.

    Raises:
        VoxelscaleError: it cannot be read, or its first line is not understood.
    """
    text = text_of(path)
    separator = _separator(text, needed)
    first = next(_lines(path, text, separator), None)
    if first is None:
        raise VoxelscaleError(f"{path}: empty", f"its first line must name {','.join(needed)}")
    number, names = first
    places = {}
    for column in (*needed, *optional):
        found = _places(names, column)
        if len(found) == 1:
            places[column] = found[0]
        elif found or column in needed:
            fault = "names twice the column" if found else "names no column"
            quoted = separator.join(names).strip()[:LONGEST_QUOTE]
            hint = f"it must name {','.join(needed)}" + (
                f"; {','.join(optional)} may be there" if optional else ""
            )
            raise VoxelscaleError(f"{path}: line {number} {fault} {column}: {quoted!r}", hint)
    return Table(path=path, line=number, places=places, width=len(names), separator=separator, text=text)


def columns_of(path: Path) -> list[str]:
    """What the first line of a table calls its columns.

    Raises:
        VoxelscaleError: it cannot be read.
    """
    text = text_of(path)
    _, names = next(_lines(path, text, _separator(text, ())), (0, []))
    return [name.strip() for name in names]


def means(name: str, column: str) -> bool:
    """Whether a column's name is this one or a synonym of it."""
    return bool(_places([name], column))


def read_list(path: Path, column: str) -> list[tuple[int, str]]:
    """The cells of a column, each with its line; where there is no other column it needs no name.

    Raises:
        VoxelscaleError: it cannot be read, or which column is meant is not understood.
    """
    text = text_of(path)
    rows = list(_lines(path, text, _separator(text, [column])))
    if rows and (len(rows[0][1]) > 1 or _places(rows[0][1], column)):
        table = read_table(path, [column])
        return [(number, table.word(cells, column)) for number, cells in table.rows()]
    for number, cells in rows:
        if any(cell.strip() for cell in cells[1:]):
            raise VoxelscaleError(
                f"{path}: line {number} has {len(cells)} cells", f"give one {column} per line"
            )
    values = [(number, cells[0].strip()) for number, cells in rows]
    uids = [bool(re.fullmatch(r"[0-9.]+", value)) for _, value in values]
    if len(uids) > 1 and not uids[0] and all(uids[1:]):
        quoted = values[0][1][:LONGEST_QUOTE]
        raise VoxelscaleError(f"{path}: line 1 names no column {column}: {quoted!r}", f"call it {column}")
    return values


def is_table_of(head: bytes, columns: Sequence[str]) -> bool:
    """Whether the first bytes of a file name all these columns, by these names or synonyms."""
    codec = _codec(head)
    text = head[: len(head) // 2 * 2].decode(codec, errors="replace").lstrip()
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    names = _cells(first, _separator(first, columns))
    return all(_places(names, column) for column in columns)


def text_of(path: Path) -> str:
    """The text of a table.

    Raises:
        VoxelscaleError: it cannot be read, is too large, or is neither UTF-8 nor marked UTF-16.
    """
    content = content_of(path, LARGEST_TABLE)
    try:
        text, bad = content.decode(_codec(content)), -1
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        bad = content.index(b"\0")
    if bad >= 0:
        line = content.count(b"\n", 0, bad) + 1
        raise VoxelscaleError(f"{path}: line {line} is not UTF-8 text", "save it as UTF-8 CSV")
    return text


def content_of(path: Path, limit: int) -> bytes:
    """The bytes of a file that describes data.

    Raises:
        VoxelscaleError: it cannot be read, or has more bytes than `limit`.
    """
    try:
        if not path.is_file():  # a pipe might never end
            raise VoxelscaleError(f"{path}: no such file", "check the path")
        with path.open("rb") as handle:
            content = handle.read(limit + 1)
    except OSError as error:
        raise VoxelscaleError(
            f"{path}: cannot be read ({error.strerror})", "check its permissions"
        ) from None
    if len(content) > limit:
        raise VoxelscaleError(f"{path}: larger than {limit >> 20} MiB", "is this the right file?")
    return content


def _codec(content: bytes) -> str:
    return "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _lines(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, split into cells."""
    table = _reader(io.StringIO(_closed(text, separator), newline=""), separator)
    try:
        for cells in table:
            if any(cells) and any(cell.strip() for cell in cells):
                yield table.line_num, cells
    except csv.Error as error:
        raise VoxelscaleError(
            f"{path}: line {table.line_num} is not readable as CSV ({error})", "save it as UTF-8 CSV"
        ) from None


def _separator(text: str, columns: Sequence[str]) -> str:
    """What separates the cells of the first line: that by which most of it is understood."""
    first = next((line for line in io.StringIO(text[: 2**16]) if line.strip()), "")
    known = _KNOWN | {_plain(column) for column in columns}

    def understood(separator: str) -> tuple[int, int]:
        names = _cells(first, separator)
        return sum(_plain(name) in known for name in names), len(names)

    return max(SEPARATORS, key=understood)


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(_reader([_closed(line, separator)], separator), [])
    except csv.Error:
        return []


def _reader(lines: Iterable[str], separator: str) -> Any:
    # Strict: an open quotation mark would otherwise swallow the rows behind it.
    return csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)


def _closed(text: str, separator: str) -> str:
    """The text without blanks between a quotation mark and the end of its cell."""
    return re.sub(rf'" +(?=[{re.escape(separator)}\r\n]|$)', '"', text) if '" ' in text else text


def _places(names: Sequence[str], column: str) -> list[int]:
    """The position of a column: by its own name, or else by a synonym."""
    plain = [_plain(name) for name in names]
    own = _plain(column)
    found = [place for place, name in enumerate(plain) if name == own]
    if found:
        return found
    others = next((group for group in SYNONYMS if own in group), ())
    return [place for place, name in enumerate(plain) if name in others]


def _plain(name: str) -> str:
    """A column's name in small letters, without blanks and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())
