"""The classic services: C-STORE in both directions, C-FIND before something is sent (PS3.4, B and C)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxelscale.archive.identity import FIX, read_header, text_of
from voxelscale.archive.inbox import Inbox
from voxelscale.archive.settings import ReceiveSettings, SendSettings
from voxelscale.archive.troubles import AwayError, UntrueError, missing_extra, quiet_libraries
from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SCANS = tuple(f"1.2.840.10008.5.1.4.1.1.2{more}" for more in ("", ".1", ".2"))
"""SOP classes that are received: CT, enhanced CT, legacy converted enhanced CT."""

SUCCESS, FULL, WRONG, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA900, 0xC000
"""Status of a C-STORE (PS3.4, B.2.3)."""

WARNINGS = (0xB000, 0xB006, 0xB007)
"""Status with which an object was stored, too."""

PENDING = (0xFF00, 0xFF01)


@contextmanager
def receiver(
    settings: ReceiveSettings, inbox: Inbox, counted: Callable[[str], None] = lambda what: None
) -> Iterator[int]:
    """Accept series into an inbox while the block runs; gives the port.

    Args:
        counted: is called with ``received``, ``again`` or ``refused`` for every instance.

    Raises:
        VoxelscaleError: the port cannot be opened.
    """
    try:
        from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
        from pynetdicom.sop_class import Verification
    except ImportError:
        raise missing_extra("pynetdicom") from None

    def on_store(event: Any) -> int:
        try:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            new = inbox.put(dataset, event.encoded_dataset())
        except UntrueError as error:
            warn(f"C-STORE: {error.message}")
            counted("refused")
            return WRONG
        except (VoxelscaleError, OSError):
            warn("C-STORE: the inbox cannot be written: is the disk full?")
            counted("refused")
            return FULL
        except Exception as error:  # whatever hostile bytes make pydicom raise; its text may quote them
            warn(f"C-STORE: an instance cannot be read ({type(error).__name__})")
            counted("refused")
            return NOT_UNDERSTOOD
        counted("received" if new else "again")
        return SUCCESS

    quiet_libraries()
    entity = AE(ae_title=settings.ae_title)
    entity.require_called_aet = True
    entity.require_calling_aet = list(settings.accept)
    entity.maximum_pdu_size = 0
    entity.add_supported_context(Verification)
    for sop_class in SCANS:
        entity.add_supported_context(sop_class, ALL_TRANSFER_SYNTAXES)
    try:
        server = entity.start_server(
            (settings.host, settings.port), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)]
        )
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise VoxelscaleError(
            f"{where}: cannot be opened ({error.strerror})", "choose another port"
        ) from None
    try:
        yield int(server.server_address[1])
    finally:
        entity.shutdown()


class Sender:
    """A classic archive that takes results by C-STORE; errors as of `DicomWeb`."""

    def __init__(self, settings: SendSettings) -> None:
        quiet_libraries()
        self._settings = settings
        self._name = f"{settings.host}:{settings.port}"

    def answers(self) -> bool:
        """Whether it accepts an association now."""
        try:
            with self._associated([]):
                return True
        except (AwayError, UntrueError):
            return False

    def patient(self, study: str) -> str | None:
        """The PatientID of a study; "" where the archive does not say it; None: it knows no such study."""
        with self._associated([]) as (association, may_find):
            found = self._find(association, may_find, "STUDY", StudyInstanceUID=study, PatientID="")
        patients = {text_of(item, "PatientID") for item in found}
        if len(patients) > 1:
            raise UntrueError(f"{self._name}: has {len(patients)} patients of one study", FIX)
        return patients.pop() if patients else None

    def send(self, files: Sequence[Path], done: Callable[[str], None] = lambda uid: None) -> int:
        """Store results that the archive does not have; see `DicomWeb.send`."""
        if not files:
            return 0
        headers, sent = [read_header(path) for path in files], 0
        with self._associated(headers) as (association, may_find):
            for path, header in zip(files, headers, strict=True):
                uids = {k: text_of(header, k) for k in ("StudyInstanceUID", "SeriesInstanceUID")}
                uid = text_of(header, "SOPInstanceUID")
                if not self._find(association, may_find, "IMAGE", **uids, SOPInstanceUID=uid):
                    self._store(association, path)
                    sent += 1
                done(uid)
        return sent

    def _store(self, association: Any, path: Path) -> None:
        try:
            status = association.send_c_store(path).get("Status")
        except ValueError:  # no accepted presentation context
            raise UntrueError(
                f"{self._name}: does not take such an object", "check what it accepts"
            ) from None
        except RuntimeError:
            status = None
        if status is None:
            raise AwayError(f"{self._name}: the association was cut off", "check that the archive runs")
        if status != SUCCESS and status not in WARNINGS:
            hint = "check its log, and that it accepts these SOP classes"
            raise UntrueError(f"{self._name}: refuses a result (0x{status:04X})", hint)

    def _find(self, association: Any, may_find: bool, level: str, **keys: str) -> list[Dataset]:
        """What matches; nothing where the archive cannot be asked."""
        from pydicom.dataset import Dataset
        from pynetdicom.sop_class import (
            StudyRootQueryRetrieveInformationModelFind as Find,
        )

        if not may_find:
            return []
        query = Dataset()
        query.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(query, keyword, value)
        found = []
        for status, item in association.send_c_find(query, Find):
            if not status:
                raise AwayError(f"{self._name}: the association was cut off", "check that the archive runs")
            if status.Status in PENDING and item is not None:
                found.append(item)
            elif status.Status not in (*PENDING, SUCCESS):
                # Not the same as nothing that matches: a patient may have been changed.
                what = f"{self._name}: does not answer a query (0x{status.Status:04X})"
                raise AwayError(what, "check its log")
        return [item for item in found if all(text_of(item, k) == v for k, v in keys.items() if v)]

    @contextmanager
    def _associated(self, headers: Sequence[Dataset]) -> Iterator[tuple[Any, bool]]:
        """An association that may store these objects, and whether it may query."""
        try:
            from pynetdicom import AE
            from pynetdicom.sop_class import (
                StudyRootQueryRetrieveInformationModelFind as Find,
            )
            from pynetdicom.sop_class import Verification
        except ImportError:
            raise missing_extra("pynetdicom") from None
        entity = AE(ae_title=self._settings.calling)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self._settings.timeout
        entity.connection_timeout = self._settings.timeout
        entity.maximum_pdu_size = 0
        entity.add_requested_context(Verification)
        entity.add_requested_context(Find)
        wanted = {(text_of(h, "SOPClassUID"), str(h.file_meta.TransferSyntaxUID)) for h in headers}
        for sop_class, syntax in sorted(wanted):
            entity.add_requested_context(sop_class, syntax)
        where = self._settings.host, self._settings.port
        association = entity.associate(*where, ae_title=self._settings.ae_title)
        if not association.is_established:
            words = "refuses the association" if association.is_rejected else "cannot be reached"
            raise AwayError(f"{self._name}: {words}", "check host, port and AE titles")
        try:
            accepted = {context.abstract_syntax for context in association.accepted_contexts}
            yield association, Find in accepted
        finally:
            if association.is_established:
                association.release()
