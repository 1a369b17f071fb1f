"""What cases and patients are called: file names, series UIDs, or a keyed hash of identifiers.

A hash without a key would hide nothing: anyone who knows a hospital's numbering can hash all its numbers
and compare. HMAC-SHA256 (RFC 2104) under a key that stays with the data's owner cannot be turned round
that way, and gives the same person the same name as long as the key is the same.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError

KEY_FILE = "names.key"
"""Where a key lies: in the folder of the user's settings, and in that of a store or of predictions."""

VARIABLE = "VOXELSCALE_NAME_KEY"
"""The environment variable that may hold the key itself."""

LEAST_BYTES, MOST_BYTES = 8, 4096
"""A shorter key can be guessed; a longer file is hardly a key."""

How = Literal["auto", "file", "series", "hash"]


@dataclass
class Names:
    """How cases are to be called, and the key of the hash.

    The key is only read, or created, when something is hashed.

    Args:
        how: ``file``: after files and folders; ``series``: after the SeriesInstanceUID; ``hash``: keyed
            hash; ``auto``: after files where the layout has files with names of their own, the hash in
            trees of DICOM files, whose folders are often named after the patient.
        key_file: holds the key; "": `VARIABLE`, or else `KEY_FILE` in `folder`, or else the user's key, one
            for all data (`user_key`), which is made where there is none.
        folder: gets a copy of the user's key; None: none does.
    """

    how: How = "auto"
    key_file: str = ""
    folder: Path | None = None
    _key: bytes = field(default=b"", repr=False)

    def case(self, uid: str) -> str:
        """The hashed name of a case."""
        return "case-" + self._hash("case", uid)

    def patient(self, identifier: str) -> str:
        """The hashed name of a patient: what the store knows of whose a case is."""
        return "patient-" + self._hash("patient", identifier)

    def keep_in(self, folder: Path) -> None:
        """Keep the key there, too, if it is one that was made and has been used.

        Raises:
            VoxelscaleError: another key is there: the folder's cases would lose their names.
        """
        made = self._key and self.folder is not None and not self.key_file and VARIABLE not in os.environ
        if made and _keep(folder / KEY_FILE, self._key) != self._key:
            hint = "choose another folder: the cases in this one are named with that key"
            raise VoxelscaleError(f"{folder / KEY_FILE}: another key", hint)

    def _hash(self, kind: str, text: str) -> str:
        if not self._key:
            self._key = self._find_key()
        # 64 bits: among a million names a collision has a probability of 1 in 37 million.
        return hmac.new(self._key, f"{kind}\0{text}".encode(), "sha256").hexdigest()[:16]

    def _find_key(self) -> bytes:
        if self.key_file:
            return _read(Path(self.key_file).expanduser())
        if VARIABLE in os.environ:
            return _checked(os.environ[VARIABLE].strip().encode(), VARIABLE)
        if self.folder is None:
            return _users_key()
        path = self.folder / KEY_FILE
        if path.is_file():
            return _read(path)
        key = _users_key()
        with contextlib.suppress(VoxelscaleError):  # a folder that is only read needs no copy
            key = _keep(path, key)
        return key


def user_key() -> Path:
    """The file of the user's own key, in the folder where the system keeps settings."""
    if folder := os.environ.get("XDG_CONFIG_HOME"):
        settings = Path(folder)
    elif sys.platform == "win32":
        settings = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        settings = Path.home() / "Library" / "Application Support"
    else:
        settings = Path.home() / ".config"
    return settings / "voxelscale" / KEY_FILE


def _users_key() -> bytes:
    """The user's key, made where there is none; one for this command alone where it cannot be kept."""
    fresh = secrets.token_hex(32).encode()
    try:
        return _keep(user_key(), fresh)
    except (VoxelscaleError, RuntimeError) as error:  # Path.home() knows none
        warn(f"{error}; names of DICOM cases will differ from command to command; set {VARIABLE} to a key")
        return fresh


def _keep(path: Path, key: bytes) -> bytes:
    """The key in the file, written first if there is none, readable for its owner only."""
    temporary = temporary_of(path)
    try:
        if not path.exists():
            write_private(temporary, key + b"\n")
            # A link, not a renaming: of two commands that begin at once the first one's key stays.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
    except OSError as error:
        hint = "choose another folder, or name a file with a key as reading.name_key"
        raise VoxelscaleError(f"{path}: cannot be written ({error.strerror})", hint) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return _read(path)


def temporary_of(path: Path) -> Path:
    """A name beside a file's own, under which it is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")


def write_private(path: Path, content: bytes) -> None:
    """A new file that its owner alone may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
    except OSError as error:
        hint = "name a file that holds the key as reading.name_key"
        raise VoxelscaleError(f"{path}: cannot be read ({error.strerror})", hint) from None
    return _checked(content.strip(), str(path))


def _checked(key: bytes, where: str) -> bytes:
    if LEAST_BYTES <= len(key) <= MOST_BYTES:
        return key
    size = "too short" if len(key) < LEAST_BYTES else "too long"
    hint = f"use {LEAST_BYTES} to {MOST_BYTES} bytes, as 'openssl rand -hex 32' makes them"
    raise VoxelscaleError(f"{where}: {size} for a key", hint)
