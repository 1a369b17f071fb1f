"""Scans that were sent to us by C-STORE, until they are answered: a folder a series, a file an instance."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.archive.identity import FIX, UID, Entry, Series, first_slice, read_header, text_of
from voxelscale.archive.troubles import UntrueError
from voxelscale.console import warn
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PIXELS = 0x7FE00008
"""Tag of the first attribute that may hold pixels."""


class Inbox:
    """A folder of series; its names are keyed hashes, so they say nothing of a patient.

    Args:
        folder: the inbox, and nothing else.
        names: with the key of the hash.
        keep_days: so long the files of a series that was not answered stay.
    """

    def __init__(self, folder: Path, names: Names, keep_days: float = 7.0) -> None:
        self._folder, self._names, self._keep_days = folder, names, keep_days
        self._known: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def answers(self) -> bool:
        """It is always there."""
        return True

    def put(self, dataset: Dataset, content: bytes) -> bool:
        """Keep an instance; False: it was there already.

        Args:
            content: it as a file.

        Raises:
            UntrueError: it has no usable UIDs, or those of another instance.
            VoxelscaleError: it cannot be written.
        """
        uids = [text_of(dataset, f"{level}InstanceUID") for level in ("Study", "Series", "SOP")]
        if not all(UID.fullmatch(uid) for uid in uids):
            raise UntrueError("an instance without usable UIDs was sent", FIX)
        series, own = self._names.case("/".join(uids[:2])), self._names.case(uids[2])
        path = self._folder / series / f"{own}.dcm"
        with self._lock:  # two associations may send it at once
            if path.exists():
                if not _same(path, dataset, content):
                    raise UntrueError(f"{series}: two different instances have one SOPInstanceUID", FIX)
                return False
            write_atomic(path, content)
        return True

    def look(self) -> list[Entry]:
        """The series that are there."""
        entries = []
        for folder in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            files = self._files(folder)
            if files and folder.name not in self._known:
                try:
                    self._known[folder.name] = _read(files[0])
                except VoxelscaleError as error:
                    warn(error.message)
                    continue
            if files:
                entries.append(replace(self._known[folder.name], instances=len(files)))
        return entries

    def describe(self, entry: Entry) -> Dataset:
        """The attributes of one of a series' slices, without its pixels."""
        return first_slice(read_header(file) for file in self._files(self._place(entry)))

    def fetch(self, entry: Entry, folder: Path) -> str:
        """Copy the instances of a series into a folder; see `DicomWeb.fetch`."""
        from pydicom import dcmread

        series = Series(entry)
        for path in self._files(self._place(entry)):
            content = path.read_bytes()
            try:
                dataset = dcmread(path)
            except Exception as error:  # whatever hostile bytes make pydicom raise
                raise UntrueError(f"{path.name}: not readable ({type(error).__name__})", FIX) from None
            if series.take(dataset, content):
                write_atomic(folder / path.name, content)
        series.finish()
        return series.patient or ""

    def release(self, entry: Entry, files: Collection[str]) -> int:
        """Remove the files of a series that have been answered; how many others came meanwhile.

        Args:
            files: names of those that `fetch` copied.
        """
        place = self._place(entry)
        with self._lock:
            for name in files:
                (place / name).unlink(missing_ok=True)
            left = len(self._files(place))
            if not left:
                shutil.rmtree(place, ignore_errors=True)
        return left

    def forget_old(self, wanted: set[str]) -> None:
        """Remove the files of series that were not answered, when nothing came for `keep_days`.

        Args:
            wanted: SeriesInstanceUIDs of those that are still to be answered.
        """
        for entry in self.look():
            place = self._place(entry)
            newest = max(file.stat().st_mtime for file in self._files(place))
            if entry.series not in wanted and time.time() - newest > self._keep_days * 86400:
                shutil.rmtree(place, ignore_errors=True)

    def _place(self, entry: Entry) -> Path:
        return self._folder / self._names.case(f"{entry.study}/{entry.series}")

    def _files(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("case-*.dcm"))


def _read(file: Path) -> Entry:
    header = read_header(file)
    return Entry(
        study=text_of(header, "StudyInstanceUID"),
        series=text_of(header, "SeriesInstanceUID"),
        modality=text_of(header, "Modality"),
        instances=0,
        patient=text_of(header, "PatientID"),
    )


def _same(path: Path, dataset: Dataset, content: bytes) -> bool:
    """Whether a file holds the instance that was sent again, perhaps in another transfer syntax."""
    from pydicom import dcmread

    if path.read_bytes() == content:
        return True
    old = dcmread(path)
    if _words(old) != _words(dataset):
        return False
    # Pixels that are compressed otherwise cannot be compared byte by byte; of such all else must agree.
    other = old.file_meta.TransferSyntaxUID != dataset.file_meta.TransferSyntaxUID
    return other or bool(old.get("PixelData") == dataset.get("PixelData"))


def _words(dataset: Dataset) -> dict[int, str]:
    """The standard's attributes of a data set, but for sequences and pixels."""
    return {e.tag: str(e.value) for e in dataset[:PIXELS] if not e.tag.is_private and e.VR != "SQ"}
