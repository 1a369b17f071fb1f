"""One study from an archive, and its results back to it: what `voxelscale predict --dicomweb` needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.archive.identity import UID, Entry, check_results, read_header, text_of
from voxelscale.archive.troubles import UntrueError
from voxelscale.console import notice
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError
from voxelscale.files import whole_folder

SCANS = "scans"
"""Folder of the fetched series in that of the predictions."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What was fetched of a study.

    Attributes:
        folder: holds a folder of each series, called by the keyed hash of its UID.
        entries, places: what the archive said of each series, and its folder, by SeriesInstanceUID.
        failed: name, error and hint of each series that could not be used.
    """

    folder: Path
    entries: Mapping[str, Entry]
    places: Mapping[str, Path]
    failed: tuple[tuple[str, str, str], ...]


def fetch_study(web: DicomWeb, study: str, series: str, out: Path, names: Names) -> Fetched:
    """Fetch the CT series of a study into ``<out>/scans/<case>/``; those that are there whole are kept.

    Args:
        series: only this one, whatever its modality; "": all CT series.
        names: with the key of the hash.

    Raises:
        VoxelscaleError: a UID is none, or no series could be fetched.
        AwayError: the archive does not answer.
    """
    for option, uid in (("--study", study), ("--series", series or study)):
        if not UID.fullmatch(uid):
            raise VoxelscaleError(f"{option}: not a UID", "give digits and dots, as 1.2.840.113619.2.55")
    listed = web.series(study)
    wanted = [e for e in listed if e.series == series or (not series and e.modality == "CT")]
    if not wanted:
        what = "such series" if series else "CT series"
        raise VoxelscaleError(f"the archive has no {what} in this study", "check the UIDs")
    places = {entry.series: out / SCANS / names.case(entry.series) for entry in wanted}
    failed = {}
    for entry in wanted:
        name = places[entry.series].name
        try:
            _fetch(web, entry, places[entry.series])
        except UntrueError as error:
            failed[entry.series] = (name, f"{name}: {error.message}", error.hint)
    entries = {entry.series: entry for entry in wanted if entry.series not in failed}
    if not entries:
        raise VoxelscaleError(*next(iter(failed.values()))[1:])
    return Fetched(folder=out / SCANS, entries=entries, places=places, failed=tuple(failed.values()))


def _fetch(web: DicomWeb, entry: Entry, folder: Path) -> None:
    here = {text_of(read_header(file), "SOPInstanceUID") for file in folder.glob("*.dcm")}
    if here and here == set(web.instances(entry.study, entry.series)):  # as many may be others
        return
    with whole_folder(folder) as part:
        web.fetch(entry, part)
    notice(f"{folder.name}: {entry.instances} instances fetched")


def send_results(web: DicomWeb, fetched: Fetched, files: Mapping[str, Sequence[Path]]) -> int:
    """Store results with their scans' studies; how many the archive did not have yet.

    Args:
        files: by the scan's SeriesInstanceUID; those that are no DICOM are not sent.

    Raises:
        VoxelscaleError: one is for another patient or study than its scan, or the archive refuses it.
    """
    sent = 0
    for series, written in files.items():
        of_case = [file for file in written if file.suffix == ".dcm"]
        entry, place = fetched.entries[series], fetched.places[series]
        header = read_header(next(place.glob("*.dcm")))
        patient = text_of(header, "PatientID")
        check_results(of_case, entry, patient)
        now = web.patient(entry.study)
        if now is None:
            raise VoxelscaleError(
                f"{place.name}: the archive has no such study any more", "check the archive"
            )
        if now and now != patient:
            hint = f"delete {place}, and run the command again"
            raise VoxelscaleError(
                f"{place.name}: its study has another PatientID than when it was fetched", hint
            )
        sent += web.send(of_case)
    return sent
