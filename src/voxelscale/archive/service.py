"""What `voxelscale listen` does: its parts put together, from its settings to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from voxelscale.archive.access import Access
from voxelscale.archive.answer import Answer
from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.archive.dimse import Sender, receiver
from voxelscale.archive.health import Meter, serve
from voxelscale.archive.inbox import Inbox
from voxelscale.archive.ledger import FILE, Ledger
from voxelscale.archive.listen import Clock, Listener, alone
from voxelscale.archive.settings import ListenSettings, read_settings, resolved
from voxelscale.console import count, notice
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError

PREDICTIONS, INBOX = "predictions", "inbox"
"""Folders in that of the service."""


@dataclass(frozen=True)
class Service:
    """A service as its file describes it."""

    path: Path
    settings: ListenSettings

    @property
    def folder(self) -> Path:
        """Where its ledger is."""
        return resolved(self.path, self.settings.folder)

    @property
    def predictions(self) -> Path:
        """Where masks and findings are."""
        return self.folder / PREDICTIONS

    def run(
        self, answer: Answer, names: Names, *, retry_failed: bool = False, clock: Clock | None = None
    ) -> None:
        """Watch and answer until it is interrupted.

        Args:
            answer: what a scan's results are.
            names: how series and patients are called.
            retry_failed: whether series that failed are tried again.
        """
        settings, meter = self.settings, Meter()
        web = DicomWeb(self._access()) if settings.archive else None
        sink = Sender(settings.send) if settings.send else web
        receive, clock = settings.receive, clock or Clock()
        inbox = Inbox(self.folder / INBOX, names, receive.keep_days) if receive else None
        scans = inbox or web
        assert scans is not None  # noqa: S101 (read_settings refuses it)
        assert sink is not None  # noqa: S101
        with alone(self.folder), ExitStack() as stack:
            listener = Listener(settings, self.folder, scans, sink, answer, names, clock, meter)
            stack.callback(listener.ledger.close)
            if retry_failed:
                again = listener.ledger.retry_failed(clock.now())
                notice(f"{count(again, 'failed series')} to be tried again")
            if settings.health:
                port = stack.enter_context(serve(settings.health, meter))
                notice(f"health and metrics at http://{settings.health.host}:{port}/health and /metrics")
            if inbox and receive:
                counted = lambda what: meter.add("instances_total", f'end="{what}"')  # noqa: E731
                port = stack.enter_context(receiver(receive, inbox, counted))
                notice(f"{receive.ae_title} receives at {receive.host}:{port}")
            notice("listening; Ctrl-C ends it, the same command continues")
            listener.run()

    def _access(self) -> Access:
        archive = self.settings.archive
        assert archive is not None  # noqa: S101
        return Access(
            url=archive.url,
            credentials=resolved(self.path, archive.credentials) if archive.credentials else None,
            ca_file=resolved(self.path, archive.ca_file) if archive.ca_file else None,
            timeout=archive.timeout,
        )


def open_service(path: Path) -> Service:
    """The service of a file; errors as of `read_settings`."""
    return Service(path, read_settings(path))


def ledger_lines(folder: Path) -> Sequence[str]:
    """The ledger as a CSV's lines, without UIDs.

    Raises:
        VoxelscaleError: there is none.
    """
    if not (folder / FILE).is_file():
        raise VoxelscaleError(f"{folder}: no ledger there", "start voxelscale listen first")
    ledger, lines = Ledger(folder / FILE), ["case,state,instances,updated,attempts,reason"]
    for row in ledger.rows():
        at = datetime.fromtimestamp(row.updated).astimezone().isoformat(timespec="seconds")
        reason = row.reason.replace('"', "'")
        lines.append(f'{row.name},{row.state},{row.instances},{at},{row.attempts},"{reason}"')
    ledger.close()
    return lines
