"""What a reader decided about a case: a journal that only grows, and the mask that follows from it.

``readers/<reader>/<case>/decisions.jsonl`` in the folder of predictions has a line for each thing done,
with who and when. The mask is these lines applied in order to an empty one, so a kill loses nothing that
was answered, and an undo is a line, too. ``decisions.json`` and ``mask.nii.gz`` beside it say the outcome;
the reader's ``dataset.csv`` lists the cases that are finished, as `voxelscale prepare` takes them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import Classes
from voxelscale.dataset.names import temporary_of, write_private
from voxelscale.dataset.source import Source, safe_name
from voxelscale.errors import VoxelscaleError
from voxelscale.files import not_written, read_json_lines, write_atomic
from voxelscale.formats import write_scan
from voxelscale.geometry import Grid
from voxelscale.tables import read_table
from voxelscale.viewer.cases import Case, as_in_file
from voxelscale.viewer.runs import filled

READERS = "readers"
"""In the folder of predictions, a folder for each reader."""

JOURNAL, OUTCOME, MASK, TABLE = "decisions.jsonl", "decisions.json", "mask.nii.gz", "dataset.csv"

LARGEST_MM = 200.0
"""Diameter of an added nodule at most."""


class Refused(ValueError):
    """What was asked for cannot be done; the message says why, for the reader."""


def reader_folder(predictions: Path, reader: str) -> Path:
    """A reader's folder.

    Raises:
        VoxelscaleError: the name is empty.
    """
    if not reader.strip():
        raise VoxelscaleError("--reader: an empty name", "name the reader, such as --reader 'A. Smith'")
    return predictions / READERS / safe_name(reader.strip())


@dataclass(kw_only=True)
class Mark:
    """A finding, or a nodule that the reader added, as judged.

    Attributes:
        verdict: ``accepted``, ``rejected`` or ``open``.
        place: x, y, z in LPS mm, where the reader moved it or added it; None: where it was found.
        diameter_mm: of an added one.
        label: its class's number, from 0.
        voxels: (n, 3) that it has in the mask.
    """

    verdict: str = "open"
    place: tuple[float, float, float] | None = None
    diameter_mm: float | None = None
    label: int = 0
    voxels: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64), repr=False)


@dataclass(kw_only=True)
class State:
    """Where the journal has led.

    Attributes:
        marks: by name: ``1``, ``2`` ... the findings, most confident first; ``a1`` ... added ones.
        mask: stored labels, LPS order.
        finished: whether the reader is done with the case.
    """

    marks: dict[str, Mark]
    mask: NDArray[Any]
    finished: bool = False


def sphere(grid: Grid, centre: Sequence[float], diameter_mm: float) -> NDArray[np.int64]:
    """The voxels (n, 3) whose centres lie within a sphere, LPS mm; the nearest one at least."""
    index = grid.mm_to_index(centre)
    reach = np.ceil(diameter_mm / 2 / np.asarray(grid.spacing)).astype(int) + 1
    low = np.maximum(np.floor(index).astype(int) - reach, 0)
    high = np.minimum(np.ceil(index).astype(int) + reach + 1, grid.shape)
    if (np.rint(index) < 0).any() or (np.rint(index) >= grid.shape).any():
        raise Refused("that place lies outside the scan")
    voxels = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), axis=-1).reshape(-1, 3)
    apart = np.linalg.norm(grid.index_to_mm(voxels) - np.asarray(centre), axis=1)
    inside = voxels[apart <= max(diameter_mm / 2, float(apart.min()))]
    return np.asarray(inside, np.int64)


def replay(case: Case, lines: Sequence[Mapping[str, Any]]) -> State:
    """Apply a journal to an empty mask.

    Raises:
        Refused: a line asks for something that cannot be done.
    """
    findings, classes = case.prediction.findings, case.classes
    labels = {name: at for at, name in enumerate(classes.names)}
    marks = {str(n): Mark(label=labels.get(f.label, 0)) for n, f in enumerate(findings, start=1)}
    kind = np.uint8 if classes.single and not classes.regions else np.int16
    state = State(marks=marks, mask=np.zeros(case.prediction.grid.shape, kind))
    for line in _kept(lines):
        apply(case, state, line)
    return state


def _kept(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines without those that were undone."""
    kept: list[Mapping[str, Any]] = []
    for line in lines:
        if line["action"] != "undo":
            kept.append(line)
        elif kept:
            kept.pop()
    return kept


def apply(case: Case, state: State, line: Mapping[str, Any]) -> None:
    """Apply one line; a refused one leaves the state as it was."""
    action = line["action"]
    if action == "brush":
        _brush(case.classes, state, line["slices"])
    elif action == "add":
        place, diameter, label = _place(line), _diameter(line), _label(case.classes, line)
        voxels = sphere(case.prediction.grid, place, diameter)
        name = f"a{1 + sum(name.startswith('a') for name in state.marks)}"
        state.marks[name] = Mark(
            verdict="accepted", place=place, diameter_mm=diameter, label=label, voxels=voxels
        )
        _put(case.classes, state.mask, voxels, label, True)
    elif action == "finish":
        left = [n for n, mark in state.marks.items() if mark.verdict == "open" and _has_mask(case, n)]
        if line["value"] is True and left:
            raise Refused(f"accept or reject first: finding {', '.join(left)}")
        state.finished = line["value"] is True
    elif action in ("accept", "reject", "move"):
        _judge(case, state, line)
    else:
        raise Refused("no such action")


def _judge(case: Case, state: State, line: Mapping[str, Any]) -> None:
    """Accept, reject or move a finding or an added nodule."""
    name, action = line["finding"], line["action"]
    mark = state.marks.get(name) if isinstance(name, str) else None
    if mark is None:
        raise Refused("no such finding")
    if action == "accept" and mark.verdict == "accepted":
        return  # what was brushed since stays
    place, voxels = mark.place, mark.voxels[:0]
    if action == "move":
        place = _place(line)
        voxels = _moved(case, mark, _shape(case, state, name), place)
    elif action == "accept":
        voxels = _own_voxels(case, name)
        voxels = voxels if place is None else _moved(case, mark, voxels, place)
    gone = [mark.voxels]
    if action == "reject" and _has_mask(case, name):  # what the brush left of it goes, too
        gone.append(_own_voxels(case, name))
    for old in gone:
        _put(case.classes, state.mask, _of_no_other(state, name, old), mark.label, False)
        _give_back(case.classes, state, name, old)
    _put(case.classes, state.mask, voxels, mark.label, True)
    mark.verdict, mark.place, mark.voxels = "rejected" if action == "reject" else "accepted", place, voxels


def _shape(case: Case, state: State, name: str) -> NDArray[np.int64]:
    """What is moved: of an accepted one what the brush left of it, if anything."""
    mark = state.marks[name]
    voxels = mark.voxels if len(mark.voxels) else _own_voxels(case, name)
    if mark.verdict != "accepted":
        return voxels
    values = state.mask[tuple(voxels.T)]
    there = values >> mark.label & 1 > 0 if case.classes.regions else values == mark.label + 1
    return voxels[there] if there.any() else voxels


def _of_no_other(state: State, name: str, voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The voxels without those of other accepted ones of the same class: they overlap at times."""
    mine, shape = state.marks[name], state.mask.shape
    others = [m.voxels for n, m in state.marks.items() if n != name and m.label == mine.label]
    flat = [np.ravel_multi_index(tuple(each.T), shape) for each in (voxels, *others)]
    alone = ~np.isin(flat[0], np.concatenate([flat[0][:0], *flat[1:]]))
    return np.asarray(voxels[alone])


def _give_back(classes: Classes, state: State, name: str, voxels: NDArray[np.int64]) -> None:
    """Where a mark lay over one of another class, which it replaced, that one is there again."""
    if classes.regions:
        return
    free = np.zeros(state.mask.shape, np.bool_)
    free[tuple(voxels.T)] = state.mask[tuple(voxels.T)] == 0
    for other, mark in state.marks.items():
        if other != name and len(mark.voxels) and mark.label != state.marks[name].label:
            _put(classes, state.mask, mark.voxels[free[tuple(mark.voxels.T)]], mark.label, True)


def _moved(case: Case, mark: Mark, voxels: NDArray[np.int64], place: Sequence[float]) -> NDArray[np.int64]:
    """Voxels shifted by whole steps so that their centre comes to a place; those that leave the scan go.

    An added nodule that has none, as it was rejected, is a sphere again.
    """
    grid = case.prediction.grid
    if not len(voxels):
        return sphere(grid, place, mark.diameter_mm or 0.0)
    shift = np.rint(grid.mm_to_index(place) - voxels.mean(axis=0)).astype(np.int64)
    there = voxels + shift
    there = there[((there >= 0) & (there < grid.shape)).all(axis=1)]
    if not len(there):
        raise Refused("that place lies outside the scan")
    return np.asarray(there)


def _own_voxels(case: Case, name: str) -> NDArray[np.int64]:
    """A finding's voxels in the predicted mask; of a candidate, which has none, a sphere of its volume."""
    if not name.isdigit():
        return np.zeros((0, 3), np.int64)
    number = int(name) - 1
    finding, voxels = case.prediction.findings[number], case.prediction.voxels[number]
    if len(voxels):
        return voxels
    return sphere(case.prediction.grid, (finding.x, finding.y, finding.z), finding.diameter_mm)


def _has_mask(case: Case, name: str) -> bool:
    return name.isdigit() and len(case.prediction.voxels[int(name) - 1]) > 0


def _put(classes: Classes, mask: NDArray[Any], voxels: NDArray[np.int64], label: int, there: bool) -> None:
    """Set or clear a class at voxels; where another class is, it stays."""
    at = tuple(voxels.T)
    values = mask[at]
    if classes.regions:
        mask[at] = values | (1 << label) if there else values & ~(1 << label)
    elif there:
        mask[at] = label + 1
    else:
        mask[at] = np.where(values == label + 1, 0, values)


def _brush(classes: Classes, state: State, slices: Any) -> None:
    """Replace axial slices by those that were painted: runs of each, by the slice's number."""
    if not isinstance(slices, dict) or not slices:
        raise Refused("no slices")
    deep, high, wide = state.mask.shape
    most = (1 << len(classes.names)) - 1 if classes.regions else len(classes.names)
    new = {}
    for number, runs in slices.items():
        if not (isinstance(number, str) and number.isascii() and number.isdigit() and int(number) < deep):
            raise Refused("no such slice")
        try:
            new[int(number)] = filled(np.asarray(runs, np.int64), high * wide).reshape(high, wide)
        except (ValueError, TypeError, OverflowError):
            raise Refused("no runs of a slice") from None
        if new[int(number)].min(initial=0) < 0 or new[int(number)].max(initial=0) > most:
            raise Refused("no such class")
    for at, values in new.items():
        state.mask[at] = values


def _place(line: Mapping[str, Any]) -> tuple[float, float, float]:
    x, y, z = _numbers(line.get("mm"), 3)
    return x, y, z


def _diameter(line: Mapping[str, Any]) -> float:
    (diameter,) = _numbers([line.get("diameter_mm")], 1)
    if not 0 < diameter <= LARGEST_MM:
        raise Refused(f"a diameter is above 0 and at most {LARGEST_MM:g} mm")
    return diameter


def _numbers(values: Any, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        raise Refused(f"{count} numbers are needed")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in values):
        raise Refused("no numbers in mm")
    return [float(v) for v in values]


def _label(classes: Classes, line: Mapping[str, Any]) -> int:
    label = line.get("label", 0)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(classes.names):
        raise Refused("no such class")
    return label


class Desk:
    """A reader's decisions about one case.

    Args:
        case: what is judged.
        folder: the reader's.
        reader: the reader's name, as it is recorded.

    Raises:
        VoxelscaleError: the decisions there are about another prediction of this case.
    """

    def __init__(self, case: Case, folder: Path, reader: str) -> None:
        self.case, self._top, self._reader = case, folder, reader
        self.folder = folder / case.name
        self._lock = threading.Lock()
        self._size = _size(self.folder / JOURNAL)
        self._lines = read_journal(self.folder)
        digest = case.prediction.digest
        if any(line.get("prediction") != digest for line in self._lines):
            raise VoxelscaleError(
                f"{self.folder}: decisions about another prediction of this case",
                "move that folder away, or name another --reader",
            )
        self.state = replay(case, self._lines)

    def act(self, line: Mapping[str, Any], after: int | None = None) -> None:
        """Do one thing, and record it before this returns.

        Args:
            after: how many lines the journal had when the reader saw the case; None: it does not matter.

        Raises:
            Refused: it cannot be done; nothing has changed.
            VoxelscaleError: it cannot be recorded, or something was decided in another window meanwhile.
        """
        with self._lock:
            if after is not None and after != len(self._lines):
                raise self._elsewhere()
            if line.get("action") == "undo":
                if not _kept(self._lines):
                    raise Refused("there is nothing to undo")
                whole = self._stamped({"action": "undo"})
                state = replay(self.case, [*self._lines, whole])
            else:
                whole, state = self._stamped(line), self.state
                try:
                    apply(self.case, state, whole)
                except KeyError as error:
                    raise Refused(f"{error.args[0]} is missing") from None
            try:
                if _size(self.folder / JOURNAL) != self._size:
                    raise self._elsewhere()
                _append(self.folder / JOURNAL, whole)
            except VoxelscaleError:
                self.state = replay(self.case, self._lines)
                raise
            self._size = _size(self.folder / JOURNAL)
            self._lines.append(whole)
            self.state = state

    def _elsewhere(self) -> VoxelscaleError:
        what = f"{self.case.name}: decided in another window meanwhile"
        return VoxelscaleError(what, "open this page again")

    def _stamped(self, line: Mapping[str, Any]) -> dict[str, Any]:
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        about = {"prediction": self.case.prediction.digest}
        return {**line, "time": when, "reader": self._reader, "case": self.case.name, **about}

    def save(self) -> None:
        """Write the outcome, the mask and the reader's table, where there is anything decided."""
        with self._lock:
            if not self._lines:
                return
            written, marks = self.case.classes.written(self.state.mask), self.outcome()
        write_scan(as_in_file(written, self.case.image.raw), self.folder / MASK)
        tabulate(self._top, self.case.listed.source, marks["finished"])
        # Last: it says that the others are of these lines.
        write_atomic(self.folder / OUTCOME, json.dumps(marks, indent=1))

    @property
    def outdated(self) -> bool:
        """Whether another process has written to the journal."""
        with self._lock:
            return _size(self.folder / JOURNAL) != self._size

    @property
    def unsaved(self) -> bool:
        """Whether the journal has lines that outcome, mask and table do not know of."""
        return is_behind(self.folder, self._lines)

    def outcome(self) -> dict[str, Any]:
        """Plain values: who, when, and the verdict on each finding and added nodule."""
        findings, names = self.case.prediction.findings, self.case.classes.names
        marks = []
        for name, mark in self.state.marks.items():
            found = findings[int(name) - 1] if name.isdigit() else None
            place = mark.place or ((found.x, found.y, found.z) if found else None)
            facts: dict[str, Any] = {
                "finding": name,
                "verdict": mark.verdict,
                "mm": place,
                "moved": bool(found and mark.place),
            }
            facts |= {"probability": found.probability} if found else {"diameter_mm": mark.diameter_mm}
            marks.append(facts | ({} if len(names) == 1 else {"class": names[mark.label]}))
        last = self._lines[-1]["time"] if self._lines else None
        return {
            "case": self.case.name,
            "reader": self._reader,
            "time": last,
            "finished": self.state.finished,
            "prediction": self.case.prediction.digest,
            "lines": len(self._lines),
            "brushed": any(line["action"] == "brush" for line in _kept(self._lines)),
            "marks": marks,
        }

    @property
    def can_undo(self) -> bool:
        """Whether there is anything to undo."""
        return bool(_kept(self._lines))


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of a case's journal; of one that a kill cut short there is none."""
    lines = read_json_lines(folder / JOURNAL)
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("action"), str)]


def is_behind(folder: Path, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a case's journal has lines that outcome, mask and table do not know of."""
    try:
        known = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))["lines"]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    return bool(lines) and known != len(lines)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a journal and bring it onto the disk.

    Raises:
        VoxelscaleError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        with path.open("ab") as handle:
            handle.write(b"\n" * cut + json.dumps(line, separators=(",", ":")).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise not_written(path, error) from None


def tabulate(folder: Path, source: Source, finished: bool) -> None:
    """Put a case into the reader's table of finished cases, or take it out.

    The table has the scans' paths, as ``names.csv`` of the predictions: it is for the owner of the data.

    Raises:
        VoxelscaleError: it cannot be written, or has the columns of another data set.
    """
    path = folder / TABLE
    images = [source.image, *source.more]
    several = [f"image_{channel.name}" for channel in source.channels] if source.more else ["image"]
    columns = [*several, "label", "case", "patient", "seriesuid"]
    rows = {}
    if path.is_file():
        table = read_table(path, columns[:-1], columns[-1:])  # earlier tables do not name the series
        rows = {
            table.word(cells, "case"): [table.word(cells, c) for c in columns] for _, cells in table.rows()
        }
    rows.pop(source.case, None)
    if finished:
        mask = os.path.join(source.case, MASK)
        rows[source.case] = [
            *(str(image.absolute()) for image in images),
            mask,
            source.case,
            source.patient,
            source.series,
        ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows.values()])
    temporary = temporary_of(path)
    try:
        write_private(temporary, text.getvalue().encode(errors="surrogateescape"))
        os.replace(temporary, path)
    except OSError as error:
        raise not_written(path, error) from None
