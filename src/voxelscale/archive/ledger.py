"""What became of each series: kept in SQLite, so that nothing is done twice, whatever is restarted when."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from voxelscale.errors import VoxelscaleError

FILE = "ledger.sqlite"

State = Literal["seen", "fetched", "predicted", "stored", "skipped", "failed"]

STATES = ("seen", "fetched", "predicted", "stored", "skipped", "failed")
"""A series goes from left to right; the last three are ends."""

OPEN = ("seen", "fetched", "predicted")

TABLES = """
CREATE TABLE IF NOT EXISTS series (
    series TEXT PRIMARY KEY, study TEXT NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL,
    instances INTEGER NOT NULL, first_seen REAL NOT NULL, changed REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',
    patient TEXT NOT NULL DEFAULT '', updated REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS open ON series (state, first_seen);
CREATE INDEX IF NOT EXISTS of_study ON series (study);
CREATE TABLE IF NOT EXISTS results (sop TEXT PRIMARY KEY, series TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS history (at REAL NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL,
    reason TEXT NOT NULL);
"""

COLUMNS = (
    "study, series, name, state, instances, first_seen, changed, attempts, due, reason, patient, updated"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A series in the ledger.

    Attributes:
        study, series: UIDs, for the archive only.
        name: keyed hash of the series: in logs and file names.
        state: one of the `STATES`.
        instances: how many it had when it was last looked at.
        first_seen, changed, updated: seconds since 1970: when it was first seen, when `instances` last
            changed, when anything did.
        attempts: at its next step, so far.
        due: not before, seconds since 1970.
        reason: why it is where it is.
        patient: keyed hash of the PatientID that was fetched.
    """

    study: str = field(repr=False)
    series: str = field(repr=False)
    name: str
    state: State
    instances: int
    first_seen: float
    changed: float
    attempts: int
    due: float
    reason: str
    patient: str
    updated: float


class Ledger:
    """A ledger's file; only its owner can read it, because it holds UIDs.

    Raises:
        VoxelscaleError: it cannot be opened, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            hint = "check the folder; a ledger that is damaged can be moved away: nothing is sent twice"
            raise VoxelscaleError(f"{path}: cannot be opened ({error})", hint) from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def see(self, study: str, series: str, name: str, instances: int, now: float) -> Row:
        """A series that the archive has now; a new one is entered.

        One that was skipped or failed is open again when its number of instances has changed. One that was
        answered stays so, with a note.
        """
        row = self.get(series)
        if row is None:
            values = (series, study, name, "seen", instances, now, now, now)
            with self._db:
                self._db.execute(
                    "INSERT INTO series (series, study, name, state, instances, first_seen, changed,"
                    " updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
                self._note(now, name, "seen", "")
        elif row.study != study:
            if row.state in OPEN:
                self.move(row, "failed", now, "another study has a series of the same UID")
        elif row.instances != instances and row.state == "stored":
            more = f"answered with {row.instances} instances; the archive has {instances} now"
            if row.reason != more:
                self._set(row, now, reason=more)
        elif row.instances != instances:
            self._set(row, now, instances=instances, changed=now, attempts=0, due=0.0)
            if row.state != "seen":
                self._set(row, now, state="seen", reason="its number of instances has changed")
        return self._get(series)

    def get(self, series: str) -> Row | None:
        """A series' row; None where it was never seen."""
        return next(self._select("WHERE series = ?", series), None)

    def _select(self, where: str, *values: object) -> Iterator[Row]:
        names = COLUMNS.split(", ")
        for found in self._db.execute(f"SELECT {COLUMNS} FROM series {where}", values):  # noqa: S608
            yield Row(**dict(zip(names, found, strict=True)))

    def _get(self, series: str) -> Row:
        row = self.get(series)
        assert row is not None  # noqa: S101 (it was entered before)
        return row

    def due(self, now: float, stable: float) -> list[Row]:
        """The open series that may be worked on, in the order in which they were first seen.

        Args:
            stable: seconds since the number of instances last changed.
        """
        where = "WHERE state IN ('seen', 'fetched', 'predicted') AND due <= ?"
        where += " AND (state != 'seen' OR changed <= ?) ORDER BY first_seen, name"
        return list(self._select(where, now, now - stable))

    def rows(self) -> Iterator[Row]:
        """All series, in the order in which they were first seen."""
        return self._select("ORDER BY first_seen, name")

    def open(self) -> set[str]:
        """UIDs of the series that are still to be worked on."""
        found = self._db.execute(
            "SELECT series FROM series WHERE state IN ('seen', 'fetched', 'predicted')"
        )
        return {series for (series,) in found}

    def of_study(self, study: str) -> list[Row]:
        """The series of a study that were seen."""
        return list(self._select("WHERE study = ?", study))

    def move(self, row: Row, state: State, now: float, reason: str = "", patient: str | None = None) -> Row:
        """A series has come to a state; its attempts count from 0 again."""
        values: dict[str, object] = {"state": state, "reason": reason, "attempts": 0, "due": 0.0}
        if patient is not None:
            values["patient"] = patient
        with self._db:
            self._set(row, now, **values)
            self._note(now, row.name, state, reason)
        return self._get(row.series)

    def begin(self, row: Row, now: float) -> Row:
        """An attempt at the next step begins: counted first, so that a crash counts."""
        self._set(row, now, attempts=row.attempts + 1)
        return self._get(row.series)

    def take_back(self, row: Row, now: float) -> None:
        """The attempt that began does not count: it was interrupted, or the archive is away."""
        self._set(row, now, attempts=max(0, row.attempts - 1))

    def later(self, row: Row, due: float, now: float, reason: str) -> None:
        """The attempt that began did not succeed; the next one is not before `due`."""
        with self._db:
            self._set(row, now, due=due, reason=reason)
            self._note(now, row.name, "later", reason)

    def sent(self, row: Row, sop: str, now: float) -> None:
        """A result is in the archive."""
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", (sop, row.series, now))

    def was_sent(self, sop: str) -> bool:
        """Whether a result was sent before."""
        return self._db.execute("SELECT 1 FROM results WHERE sop = ?", (sop,)).fetchone() is not None

    def retry_failed(self, now: float) -> int:
        """Open the failed series again; how many."""
        rows = [row for row in self.rows() if row.state == "failed"]
        for row in rows:
            self.move(row, "seen", now, "to be tried again")
        return len(rows)

    def counts(self) -> dict[str, int]:
        """How many series are in each state."""
        found = dict(self._db.execute("SELECT state, COUNT(*) FROM series GROUP BY state"))
        return {state: int(found.get(state, 0)) for state in STATES}

    def _set(self, row: Row, now: float, **values: object) -> None:
        names = ", ".join(f"{name} = ?" for name in (*values, "updated"))
        with self._db:
            self._db.execute(
                f"UPDATE series SET {names} WHERE series = ?",  # noqa: S608
                (*values.values(), now, row.series),
            )

    def _note(self, now: float, name: str, state: str, reason: str) -> None:
        self._db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (now, name, state, reason))
