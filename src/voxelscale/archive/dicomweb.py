"""A DICOMweb service (PS3.18): what it has (QIDO-RS), its scans (WADO-RS), results for it (STOW-RS)."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxelscale.archive.access import Access
from voxelscale.archive.identity import FIX, UID, Entry, Series, first_slice, read_header, text_of
from voxelscale.archive.troubles import AwayError, UntrueError, missing_extra, quiet_libraries
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PAGE = 200
"""Results asked for at a time."""

STUDY, SERIES, INSTANCE, PATIENT = "0020000D", "0020000E", "00080018", "00100020"
MODALITY, IN_STUDY, IN_SERIES = "00080060", "00201208", "00201209"
"""Tags as DICOM's JSON writes them; the last two are numbers of instances."""

LATER = (408, 425, 429, 500, 502, 503, 504)
"""HTTP's codes of a server that may answer later."""

TO_REACH = "check the URL, and that the archive runs"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study that an archive has.

    Attributes:
        uid: StudyInstanceUID, never shown.
        patient: PatientID; "": not said.
        instances: how many it has; None: not said.
    """

    uid: str = field(repr=False)
    patient: str = field(repr=False)
    instances: int | None


class DicomWeb:
    """A DICOMweb service, through dicomweb-client.

    Every method raises an AwayError where the service does not answer or refuses the credentials, and an
    UntrueError where its answer contradicts itself or the standard. Messages name no UID.
    """

    def __init__(self, access: Access) -> None:
        try:
            from dicomweb_client import DICOMwebClient
        except ImportError:
            raise missing_extra("dicomweb-client") from None
        quiet_libraries()
        self.url = access.url.rstrip("/")
        self._client = DICOMwebClient(
            self.url, session=access.session(), permissive_uid=True, timeout=access.timeout
        )
        self._client.set_http_retry_params(retry=False)  # `listen` has a back-off of its own

    def answers(self) -> bool:
        """Whether it answers a small query now."""
        try:
            with self._asked():
                self._client.search_for_studies(limit=1)
        except (AwayError, UntrueError):
            return False
        return True

    def studies(self, modality: str = "", since: date | None = None) -> list[Study]:
        """The studies with series of a modality, from a StudyDate on; those without a UID are left out."""
        filters = {"ModalitiesInStudy": modality} if modality else {}
        filters |= {"StudyDate": f"{since:%Y%m%d}-"} if since else {}
        return [
            Study(uid=_uid(item, STUDY), patient=_text(item, PATIENT), instances=_number(item, IN_STUDY))
            for item in self._pages(
                self._client.search_for_studies,
                STUDY,
                filters,
                fields=["NumberOfStudyRelatedInstances"],
                strict=False,
            )
        ]

    def series(self, study: str) -> list[Entry]:
        """The series of a study; those without a UID are left out."""
        search, fields = self._client.search_for_series, ["NumberOfSeriesRelatedInstances"]
        entries = []
        for item in self._pages(search, SERIES, {}, fields=fields, of=(study,), strict=False):
            series, number = _uid(item, SERIES), _number(item, IN_SERIES)
            number = len(self.instances(study, series)) if number is None else number
            entries.append(
                Entry(study=study, series=series, modality=_text(item, MODALITY), instances=number)
            )
        return entries

    def patient(self, study: str) -> str | None:
        """The PatientID of a study; "" where the service does not say it; None: there is no such study.

        Raises:
            UntrueError: there is more than one.
        """
        filters = {"StudyInstanceUID": study}
        found = self._pages(self._client.search_for_studies, STUDY, filters)
        found = [item for item in found if _text(item, STUDY) == study]
        if len(found) > 1:
            raise UntrueError(f"the archive has {len(found)} studies of one UID", FIX)
        return _text(found[0], PATIENT) if found else None

    def instances(self, study: str, series: str) -> list[str]:
        """The SOPInstanceUIDs of a series.

        Raises:
            UntrueError: one is listed twice.
        """
        search = self._client.search_for_instances
        return [_uid(item, INSTANCE) for item in self._pages(search, INSTANCE, {}, of=(study, series))]

    def describe(self, entry: Entry) -> Dataset:
        """The attributes of one of a series' slices, without its pixels."""
        listed = self.instances(entry.study, entry.series)
        if not listed:
            raise UntrueError("the archive lists no instance of it", FIX)
        return first_slice(self._header(entry, uid) for uid in listed)

    def _header(self, entry: Entry, uid: str) -> Dataset:
        from pydicom.dataset import Dataset

        with self._asked():
            tree = self._client.retrieve_instance_metadata(entry.study, entry.series, uid)
            tree = tree[0] if isinstance(tree, list) else tree
            # Bulk data stay where they are; what is asked of the attributes are single values.
            return Dataset.from_json(json.dumps(tree), bulk_data_uri_handler=lambda tag, vr, uri: None)

    def fetch(self, entry: Entry, folder: Path) -> str:
        """Write the instances of a series into a folder, numbered; the PatientID that all of them have.

        They are written as they were sent, in their own transfer syntaxes.

        Raises:
            UntrueError: as of `Series`; all are to be of the study's patient.
        """
        from pydicom import dcmwrite

        patient = self.patient(entry.study)
        if patient is None:
            raise UntrueError("the archive has no such study any more", FIX)
        entry = replace(entry, patient=patient)
        series = Series(entry, self.instances(entry.study, entry.series))
        number = 0
        with self._asked():
            for dataset in self._client.iter_series(
                entry.study, entry.series, media_types=(("application/dicom", "*"),)
            ):
                content = io.BytesIO()
                dcmwrite(content, dataset, enforce_file_format=True)
                if series.take(dataset, content.getvalue()):
                    number += 1
                    write_atomic(folder / f"{number:05d}.dcm", content.getvalue())
        series.finish()
        return series.patient or ""

    def release(self, entry: Entry, files: Collection[str]) -> int:
        """Nothing is kept of a series that has been answered: 0, as of `Inbox.release`."""
        return 0

    def send(self, files: Sequence[Path], done: Callable[[str], None] = lambda uid: None) -> int:
        """Store results that the archive does not have; how many were sent.

        Args:
            done: is called with each SOPInstanceUID that is known to be there.

        Raises:
            UntrueError: the archive refuses one, or does not have it although it accepted it.
        """
        from pydicom import dcmread

        sent = 0
        for path in files:
            header = read_header(path)
            uid = text_of(header, "SOPInstanceUID")
            if not self._has(header):
                with self._asked("store"):
                    reply = self._client.store_instances([dcmread(path)], header.StudyInstanceUID)
                _check_reply(reply, uid)
                if not _named(reply, "ReferencedSOPSequence", uid) and not self._has(header):
                    raise UntrueError("the archive accepted a result but does not list it", "check its log")
                sent += 1
            done(uid)
        return sent

    def _has(self, header: Dataset) -> bool:
        uids = [text_of(header, f"{level}InstanceUID") for level in ("Study", "Series", "SOP")]
        search, filters = self._client.search_for_instances, {"SOPInstanceUID": uids[2]}
        try:
            items = self._pages(search, INSTANCE, filters, of=(uids[0], uids[1]))
        except _MissingError:  # of a series that is not there some services say so
            return False
        return any(_text(item, INSTANCE) == uids[2] for item in items)

    def _pages(
        self,
        search: Callable[..., Any],
        key: str,
        filters: dict[str, str],
        *,
        fields: Sequence[str] = (),
        of: Sequence[str] = (),
        strict: bool = True,
    ) -> list[dict[str, Any]]:
        """All results of a search, page by page, also where the service caps a page or knows no pages.

        Args:
            key: the tag of the UID by which results differ.
            strict: whether a result without a usable UID, and two with one UID, are errors; else such a
                result is left out.

        Raises:
            UntrueError: of `strict`.
        """
        found: dict[str, dict[str, Any]] = {}
        while True:
            with self._asked():
                page = search(
                    *of, limit=PAGE, offset=len(found), search_filters=filters, fields=fields or None
                )
            if not isinstance(page, list) or not all(isinstance(item, dict) for item in page):
                raise UntrueError("the archive's list is no list of attributes", TO_REACH)
            if not strict:
                page = [item for item in page if UID.fullmatch(_text(item, key))]
            uids = [_uid(item, key) for item in page]
            if strict and len(set(uids)) < len(uids):
                raise UntrueError("the archive lists a UID twice", FIX)
            new = {uid: item for uid, item in zip(uids, page, strict=True) if uid not in found}
            if not new:
                return list(found.values())
            found |= new

    @contextlib.contextmanager
    def _asked(self, what: str = "answer") -> Iterator[None]:
        """What goes wrong in a request, as an AwayError or UntrueError that quotes nothing of a header."""
        import requests

        try:
            yield
        except VoxelscaleError:
            raise
        except requests.exceptions.SSLError:
            hint = "name a file with the certificate of its authority (ca_file, --ca-file)"
            raise AwayError(f"{self.url}: its certificate is not trusted", hint) from None
        except requests.HTTPError as error:
            code = 0 if error.response is None else error.response.status_code
            raise self._refusal(code, what) from None
        except (requests.ConnectionError, requests.Timeout) as error:
            words = (
                "does not answer in time" if isinstance(error, requests.Timeout) else "cannot be reached"
            )
            raise AwayError(f"{self.url}: {words}", TO_REACH) from None
        except requests.exceptions.ChunkedEncodingError:
            raise AwayError(f"{self.url}: the transfer was cut off", TO_REACH) from None
        except requests.TooManyRedirects:
            raise UntrueError(f"{self.url}: redirects to another place", "give that URL itself") from None
        except requests.RequestException as error:
            raise UntrueError(f"{self.url}: {type(error).__name__}", TO_REACH) from None
        except OSError:
            raise
        except Exception as error:  # whatever hostile bytes make pydicom and the client raise
            words = str(error)
            if words.startswith("Unexpected media type"):
                raise UntrueError("the answer is no multipart of DICOM (wrong content type)", FIX) from None
            name = type(error).__name__
            raise UntrueError(f"the archive's answer cannot be read ({name})", FIX) from None

    def _refusal(self, code: int, what: str) -> VoxelscaleError:
        if code in (401, 403):
            hint = "check the credentials (docs/hospital.md, The archive)"
            return AwayError(f"{self.url}: refuses the credentials (HTTP {code})", hint)
        if code in LATER:
            return AwayError(f"{self.url}: cannot {what} now (HTTP {code})", "check its log")
        if code in (404, 410):
            return _MissingError("the archive has no such study, series or instance", FIX)
        return UntrueError(f"{self.url}: refuses to {what} (HTTP {code})", "check its log")


class _MissingError(UntrueError):
    """The archive has no such thing."""


def _check_reply(reply: Dataset, uid: str) -> None:
    """Raise an UntrueError where an answer of STOW-RS says that an instance was not stored."""
    failed = reply.get("FailedSOPSequence") or []
    reasons = [item.get("FailureReason") for item in failed]
    if failed:
        codes = ", ".join(f"0x{code:04X}" for code in reasons if isinstance(code, int)) or "no reason given"
        raise UntrueError(f"the archive refuses a result ({codes})", "check its log")


def _named(reply: Dataset, sequence: str, uid: str) -> bool:
    return any(text_of(item, "ReferencedSOPInstanceUID") == uid for item in reply.get(sequence) or [])


def _text(item: dict[str, Any], tag: str) -> str:
    """The first value of an attribute in DICOM's JSON; "" where there is none."""
    values = item.get(tag)
    values = values.get("Value") if isinstance(values, dict) else None
    value = values[0] if isinstance(values, list) and values else ""
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _number(item: dict[str, Any], tag: str) -> int | None:
    text = _text(item, tag)
    return int(text) if text.isdecimal() else None


def _uid(item: dict[str, Any], tag: str) -> str:
    uid = _text(item, tag)
    if not UID.fullmatch(uid):
        raise UntrueError("the archive lists something without a usable UID", FIX)
    return uid
