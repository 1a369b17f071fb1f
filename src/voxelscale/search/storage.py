"""Where a search is kept: the only thing that its workers share and agree through.

A journal file needs nothing and lies in the search's folder, on any disk that all workers see, NFS
included. PostgreSQL is for workers by the hundred, or without a common disk for small files. SQLite is
refused: its locks fail on network disks, and parallel writers block each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from voxelscale.errors import VoxelscaleError

JOURNAL = "journal.log"
"""Name of the journal file in a search's folder."""

WAITS = (0.5, 1, 2, 4, 8, 16)
"""Seconds between attempts at a storage that is out of reach."""

T = TypeVar("T")
GO_ON = "the same command resumes from there"


class Journal(JournalFileBackend):
    """Optuna's journal file, whose writer may have been cut off in the middle of a line.

    A kill, a full disk or a power cut can leave a last line without its end. Optuna would append the
    next record to it and could read neither from then on; here the stump is cut off first, under the
    lock that every writer takes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # While the lock is held the file is written and synced: seconds, not minutes, even on NFS.
        super().__init__(str(path), lock_obj=_Lock(path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records.

        Raises:
            VoxelscaleError: the file cannot be written; what was written of them will be cut off.
        """
        try:
            super().append_logs(logs)
        except OSError as error:
            hint = f"free some space or check the disk; {GO_ON}"
            raise VoxelscaleError(f"{self.path}: cannot be written ({error.strerror})", hint) from None

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The records from a number on.

        Raises:
            VoxelscaleError: the file is gone, or damaged before its last line.
        """
        try:
            yield from super().read_logs(log_number_from)
        except OSError as error:
            raise VoxelscaleError(f"{self.path}: cannot be read ({error.strerror})", GO_ON) from None
        except ValueError:
            hint = "restore it from a copy; the trials' own folders are untouched"
            raise VoxelscaleError(f"{self.path}: damaged", hint) from None


class _Lock(JournalFileSymlinkLock):
    """The writers' lock; each holder leaves the file complete."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def acquire(self) -> bool:
        got = super().acquire()
        with contextlib.suppress(OSError):  # the write that follows reports it
            _cut_stump(self._path)
        return got


def _cut_stump(path: Path) -> None:
    """Cut off a last line that has no end."""
    with path.open("r+b") as handle:
        end = size = handle.seek(0, os.SEEK_END)
        if not size:
            return
        handle.seek(size - 1)
        if handle.read(1) == b"\n":
            return
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - 4096)
            handle.seek(start)
            tail, end = handle.read(end - start) + tail, start
        handle.truncate(end + tail.rfind(b"\n") + 1)
        handle.flush()
        os.fsync(handle.fileno())


def open_storage(url: str, folder: Path) -> BaseStorage:
    """The storage of a search.

    Args:
        url: ``postgresql://user:password@host/database``, or "" for a journal file.
        folder: of the search, for the journal.

    Raises:
        VoxelscaleError: the kind is not supported, the driver is missing, or it cannot be reached.
    """
    _quiet()
    if not url:
        folder.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Journal(folder / JOURNAL))
    scheme = url.partition(":")[0].partition("+")[0].lower()
    if scheme == "sqlite":
        raise VoxelscaleError(
            f"{url}: SQLite cannot be shared by parallel workers",
            "leave search.storage empty for a journal file, or give a PostgreSQL URL",
        )
    if scheme not in ("postgresql", "postgres"):
        raise VoxelscaleError(
            f"{strip_password(url)}: unknown storage",
            "give postgresql://user:password@host/database, or none",
        )
    return _open_postgresql(url)


def strip_password(url: str) -> str:
    """A URL without its password, for files and messages; libpq finds it in PGPASSWORD or ~/.pgpass."""
    url = re.sub(r"(?<=[?&])password=[^&]*&?", "", url).rstrip("?&")
    scheme, sign, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{sign}{user.partition(':')[0]}{at}{host}"


def _open_postgresql(url: str) -> BaseStorage:
    try:
        import psycopg
    except ImportError:
        hint = "in the folder of Voxelscale's source: pip install '.[postgresql]'"
        raise VoxelscaleError(f"{strip_password(url)}: the driver psycopg is not installed", hint) from None
    from sqlalchemy.exc import SQLAlchemyError

    full = "postgresql+psycopg://" + url.partition("://")[2]
    try:
        # A pre-ping replaces connections that a restarted server has cut.
        return RDBStorage(full, engine_kwargs={"pool_pre_ping": True})
    except (SQLAlchemyError, psycopg.Error, ValueError) as error:
        problem = str(getattr(error, "orig", error)).strip().splitlines()[0]
        hint = "check the URL, and that the server runs and lets this user in"
        raise VoxelscaleError(f"{strip_password(url)}: {problem}", hint) from None


def _quiet() -> None:
    """Optuna logs every trial; the search's own messages are enough."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def is_storage_trouble(error: BaseException) -> bool:
    """Whether it may pass by itself: a server that restarts, a network or a disk that is away or full."""
    from sqlalchemy.exc import DBAPIError

    ours = isinstance(error, VoxelscaleError) and isinstance(error.__context__, OSError)
    return ours or isinstance(error, DBAPIError | optuna.exceptions.StorageInternalError)


def patiently(call: Callable[[], T]) -> T:
    """The call's result, tried again for half a minute while the storage is out of reach."""
    for seconds in WAITS:
        try:
            return call()
        except Exception as error:
            if not is_storage_trouble(error):
                raise
        time.sleep(seconds)
    return call()
