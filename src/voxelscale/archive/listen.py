"""Watch an archive; answer each new series once; survive restarts of either side.

A series goes from state to state in the ledger: seen, fetched, predicted, stored. Each step leaves its
files whole before the ledger says so, so it can be cut off at any instant.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from voxelscale.archive.answer import Answer
from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.archive.dimse import Sender
from voxelscale.archive.health import Meter
from voxelscale.archive.identity import Entry, check_results, read_header, text_of, without_headers
from voxelscale.archive.inbox import Inbox
from voxelscale.archive.ledger import FILE, OPEN, Ledger, Row
from voxelscale.archive.rules import against
from voxelscale.archive.settings import ListenSettings
from voxelscale.archive.troubles import AwayError, UntrueError
from voxelscale.console import notice, warn
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output, whole_folder

LONGEST_REASON = 300
"""Characters of a reason in the ledger."""

LEAST_FREE = 2**26
"""With fewer bytes left on the disk an error is taken for the disk's: scans and results need more."""


@dataclass(frozen=True)
class Clock:
    """The time, and how to wait; tests have one of their own.

    Attributes:
        now: seconds since 1970.
        wait: waits for so many seconds.
    """

    now: Callable[[], float] = time.time
    wait: Callable[[float], None] = time.sleep


@dataclass
class Listener:
    """Answers series, one after another.

    Attributes:
        settings: rules and times.
        folder: keeps the ledger and the files of series that are worked on.
        scans: where series come from.
        sink: where results go.
        answer: what a scan's results are.
        names: with the key of the hash; patients and series are called by it.
    """

    settings: ListenSettings
    folder: Path
    scans: DicomWeb | Inbox
    sink: DicomWeb | Sender
    answer: Answer
    names: Names
    clock: Clock = field(default_factory=Clock)
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.folder / FILE)
        self._settled: dict[str, int] = {}
        self._away = 0
        self._tidy()
        self.meter.series(self.ledger.counts())

    def run(self) -> None:
        """Go on until it is interrupted."""
        while True:
            try:
                seconds = self.round()
            except sqlite3.OperationalError as error:  # a full disk: what was done so far is kept
                warn(f"{self.folder / FILE}: cannot be used ({error}); is the disk full?")
                seconds = self.settings.wait
            self.clock.wait(seconds)

    def round(self) -> float:
        """Look at the archive once and do all that is due; seconds until the next round."""
        self._alive()
        reached = self._look()
        self.meter.put("archive_up", int(reached))
        for row in self.ledger.due(self.clock.now(), self.settings.stable):
            if not self._finish(row, reached):
                reached = False
        self.meter.series(self.ledger.counts())
        self.meter.put("archive_up", int(reached))
        if reached and self._away:
            notice("the archive answers again")
        self._away = 0 if reached else self._away + 1
        settings = self.settings
        return min(settings.every * 2.0 ** min(self._away, 30), settings.longest_wait)

    def _look(self) -> bool:
        """Enter what is new into the ledger; whether the archive answers."""
        try:
            for entry in self._entries():
                if entry.modality in self.settings.rules.modality:
                    self._see(entry)
        except AwayError as error:
            if not self._away:
                warn(f"{error.message}; {error.hint}")
            return False
        except UntrueError as error:
            warn(error.message)
            return True
        self.meter.put("last_look_seconds", self.clock.now())
        return True

    def _entries(self) -> Iterator[Entry]:
        """The series that the archive has; of studies that have not changed and are done, none."""
        if isinstance(self.scans, Inbox):
            yield from self.scans.look()
            self.scans.forget_old(self.ledger.open())
            return
        archive = self.settings.archive
        days = archive.days if archive else 0
        # Scanners write their own day: late in America's evening UTC is a day ahead.
        since = datetime.fromtimestamp(self.clock.now()).date() - timedelta(days) if days else None
        for modality in self.settings.rules.modality:
            for study in self.scans.studies(modality, since):
                if study.instances is not None and self._settled.get(study.uid) == study.instances:
                    continue
                try:
                    entries = self.scans.series(study.uid)
                except UntrueError as error:
                    warn(f"a study: {error.message}")
                    continue
                yield from entries
                rows = self.ledger.of_study(study.uid)
                done = all(row.state in ("stored", "skipped", "failed") for row in rows)
                if done and study.instances is not None:
                    self._settled[study.uid] = study.instances

    def _see(self, entry: Entry) -> None:
        now, name = self.clock.now(), self.names.case(entry.series)
        before = self.ledger.get(entry.series)
        row = self.ledger.see(entry.study, entry.series, name, entry.instances, now)
        if before is None:
            notice(f"{name}: seen, {entry.instances} instances", level=2)
        elif row.reason != before.reason and row.reason:
            warn(f"{name}: {row.reason}")
        if before is not None and row.state == "seen" and before.state != "seen":
            self._clear(row)

    def _finish(self, row: Row, reached: bool) -> bool:
        """Take a series as far as it goes; whether the archive is still there."""
        steps = {"seen": self._fetch, "fetched": self._predict, "predicted": self._send}
        while row.state in steps and (reached or row.state == "fetched"):
            if row.attempts >= self.settings.attempts:  # the process ended during each of them
                self._fail(row, f"the program ended {row.attempts} times while it worked on it")
                return reached
            self._alive()
            kind, began, ended = row.state, time.monotonic(), "interrupted"
            row = self.ledger.begin(row, self.clock.now())
            try:
                row, ended = steps[kind](row), "done"
            except Exception as error:  # also what no one thought of must not end the service
                ended, reached = self._trouble(row, error, reached)
                return reached
            except BaseException:
                self.ledger.take_back(row, self.clock.now())
                raise
            finally:
                self.meter.add("steps_total", f'step="{kind}",end="{ended}"')
                self.meter.add("step_seconds_total", f'step="{kind}"', time.monotonic() - began)
        return reached

    def _trouble(self, row: Row, error: Exception, reached: bool) -> tuple[str, bool]:
        """What a step's error means: how the step ended, and whether the archive is there."""
        if isinstance(error, sqlite3.Error):
            raise error
        outside = isinstance(error, AwayError | UntrueError)
        full = self._is_full()
        if full or (outside and not self._answering(row.state)):
            self.ledger.take_back(row, self.clock.now())
            if not self._away:
                warn(f"{self.folder}: the disk is full" if full else str(error))
            return "away", False
        if isinstance(error, VoxelscaleError) and not outside:
            self._fail(row, error.message)
            return "failed", reached
        if outside:
            self._later(row, str(error))
            return "untrue" if isinstance(error, UntrueError) else "away", reached
        at = traceback.extract_tb(error.__traceback__)[-1]
        # The error's own words may be those of a header.
        self._later(row, f"unexpected: {type(error).__name__} in {Path(at.filename).name}:{at.lineno}")
        return "unexpected", reached

    def _is_full(self) -> bool:
        """Whether the folder is nearly full."""
        try:
            check_output(self.folder)
            return shutil.disk_usage(self.folder).free < LEAST_FREE
        except (VoxelscaleError, OSError):
            return True

    def _answering(self, state: str) -> bool:
        """Whether the archive of a step answers, so that its trouble is with this series."""
        return self.scans.answers() if state == "seen" else self.sink.answers()

    def _fetch(self, row: Row) -> Row:
        entry = self._entry(row)
        if reason := against(self.settings.rules, self.scans.describe(entry), row.instances):
            notice(f"{row.name}: skipped: {reason}", level=2)
            return self.ledger.move(row, "skipped", self.clock.now(), reason)
        with whole_folder(self._place(row, "scan")) as part:
            patient = self.scans.fetch(entry, part)
        return self.ledger.move(row, "fetched", self.clock.now(), patient=self.names.patient(patient))

    def _predict(self, row: Row) -> Row:
        patient = self._patient(row)
        if patient is None:
            return self._again(row)
        with whole_folder(self._place(row, "results")) as part:
            check_results(self.answer(self._place(row, "scan"), part), self._entry(row), patient)
        return self.ledger.move(row, "predicted", self.clock.now())

    def _send(self, row: Row) -> Row:
        patient, place = self._patient(row), self._place(row, "results")
        if patient is None or not place.is_dir():
            return self._again(row)
        files = sorted(place.rglob("*.dcm"))
        headers = check_results(files, self._entry(row), patient)
        now_of = self.sink.patient(row.study)
        if now_of is None and self.sink is self.scans:
            raise UntrueError("the archive has no such study any more", "")
        if now_of and now_of != patient:
            what = "its study has another PatientID than when it was fetched"
            if self.sink is not self.scans:
                raise UntrueError(what, "")
            return self._again(row, what)
        left = [
            file
            for file, header in zip(files, headers, strict=True)
            if not self.ledger.was_sent(str(header.SOPInstanceUID))
        ]
        sent = self.sink.send(left, lambda uid: self.ledger.sent(row, uid, self.clock.now()))
        self.meter.add("results_total", value=sent)
        answered = [file.name for file in self._place(row, "scan").glob("*.dcm")]
        others = self.scans.release(self._entry(row), answered)
        more = f"answered with {row.instances} instances; {others} more came meanwhile" if others else ""
        row = self.ledger.move(row, "stored", self.clock.now(), more)
        if more:
            warn(f"{row.name}: {more}")
        notice(f"{row.name}: stored")
        self._put_away(row)
        return row

    def _put_away(self, row: Row) -> None:
        """Keep the scan of an answered series, where that is asked for, and remove what else there is."""
        scan = self._place(row, "scan")
        if self.settings.keep_scans and row.state == "stored" and scan.is_dir():
            kept = self.folder / "scans" / row.name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            os.replace(scan, kept)
        self._clear(row)

    def _tidy(self) -> None:
        """Put away what a kill left of series that are done: it identifies patients."""
        if not any((self.folder / "work").glob("*")):
            return
        rows = {row.name: row for row in self.ledger.rows()}
        for place in (self.folder / "work").glob("*"):
            row = rows.get(place.name)
            if row is None:
                shutil.rmtree(place, ignore_errors=True)
            elif row.state not in OPEN:
                self._put_away(row)

    def _patient(self, row: Row) -> str | None:
        """The PatientID of what was fetched, which is in its files only; None: they are gone."""
        files = sorted(self._place(row, "scan").glob("*.dcm"))
        patient = text_of(read_header(files[0]), "PatientID") if files else ""
        return patient if files and self.names.patient(patient) == row.patient else None

    def _again(self, row: Row, why: str = "the files that were fetched are gone") -> Row:
        """Fetch a series once more."""
        warn(f"{row.name}: {why}: it is fetched again")
        self._clear(row)
        return self.ledger.move(row, "seen", self.clock.now(), why)

    def _fail(self, row: Row, reason: str) -> None:
        scan = self._place(row, "scan")
        reason = reason.replace(str(scan), row.name).removeprefix(f"{row.name}: ")
        reason = without_headers(reason, sorted(scan.glob("*.dcm")))[:LONGEST_REASON]
        warn(f"{row.name}: failed: {reason}")
        self.ledger.move(row, "failed", self.clock.now(), reason)
        self._clear(row)

    def _later(self, row: Row, reason: str) -> None:
        """Try a step again after a while; too many attempts are a failure."""
        now = self.clock.now()
        if row.attempts >= self.settings.attempts:
            self._fail(row, f"{reason} ({row.attempts} attempts)")
            return
        wait = min(self.settings.wait * 2 ** (row.attempts - 1), self.settings.longest_wait)
        notice(f"{row.name}: {reason}; again in {wait:.0f} s")
        self.ledger.later(row, now + wait, now, reason)

    def _clear(self, row: Row) -> None:
        """Remove the files of a series that is not worked on."""
        shutil.rmtree(self.folder / "work" / row.name, ignore_errors=True)

    def _place(self, row: Row, kind: str) -> Path:
        return self.folder / "work" / row.name / kind

    def _entry(self, row: Row) -> Entry:
        return Entry(study=row.study, series=row.series, modality="", instances=row.instances)

    def _alive(self) -> None:
        self.meter.put("last_alive_seconds", self.clock.now())


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one process at a time works in the folder.

    Raises:
        VoxelscaleError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "listen.lock").open("w") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on Windows
            pass
        except OSError:
            raise VoxelscaleError(f"{folder}: another listen works there", "end it first") from None
        yield
