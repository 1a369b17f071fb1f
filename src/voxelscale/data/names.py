"""What cases and patients are called: file names, series UIDs, or a keyed hash of identifiers.

A hash without a key would hide nothing: whoever knows a hospital's numbering can hash all its numbers
and compare. HMAC-SHA256 (RFC 2104) under a key that stays with the data's owner cannot be turned round
that way, and gives the same person the same name as long as the key is the same.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from voxelscale.config import PrepareConfig
from voxelscale.errors import VoxelscaleError

KEY_FILE = "names.key"
"""Where a key that was made lies, in the folder of the store or of the predictions."""

VARIABLE = "VOXELSCALE_NAME_KEY"
"""The environment variable that may hold the key itself."""

LEAST_BYTES, MOST_BYTES = 8, 4096
"""A shorter key can be guessed; a longer file is hardly a key."""

How = Literal["auto", "file", "series", "hash"]


@dataclass
class Names:
    """How cases are to be called, and the key of the hash.

    The key is only looked for, or made, when something is hashed.

    Args:
        how: ``file``: after files and folders; ``series``: after the SeriesInstanceUID; ``hash``: keyed
            hash; ``auto``: after files where the layout has files with names of their own, the hash in
            trees of DICOM files, whose folders are often called after the patient.
        key_file: holds the key; "": `VARIABLE`, or else `KEY_FILE` in `folder`.
        folder: where a key is kept; None: the key is forgotten with this object.
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
            hint = "choose another folder: the cases in this one are called after that key"
            raise VoxelscaleError(f"{folder / KEY_FILE}: another key", hint)

    def _hash(self, kind: str, text: str) -> str:
        if not self._key:
            self._key = self._find_key()
        # 64 bits: among a million names a collision has a chance of 1 in 37 million.
        return hmac.new(self._key, f"{kind}\0{text}".encode(), "sha256").hexdigest()[:16]

    def _find_key(self) -> bytes:
        if self.key_file:
            return _read(Path(self.key_file).expanduser())
        if VARIABLE in os.environ:
            return _checked(os.environ[VARIABLE].strip().encode(), VARIABLE)
        fresh = secrets.token_hex(32).encode()
        return fresh if self.folder is None else _keep(self.folder / KEY_FILE, fresh)


def names_of(config: PrepareConfig, folder: Path | None) -> Names:
    """The names that a config asks for, their key kept in `folder`."""
    return Names(how=config.names, key_file=config.name_key, folder=folder)


def _keep(path: Path, key: bytes) -> bytes:
    """The key in the file, written first if there is none, readable for its owner only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(key + b"\n")
                file.flush()
                os.fsync(file.fileno())
            # A link, not a renaming: of two commands that begin at once the first one's key stays.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
    except OSError as error:
        hint = "choose another folder, or name a file with a key as prepare.name_key"
        raise VoxelscaleError(f"{path}: cannot be written ({error.strerror})", hint) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return _read(path)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
    except OSError as error:
        hint = "name a file that holds the key as prepare.name_key"
        raise VoxelscaleError(f"{path}: cannot be read ({error.strerror})", hint) from None
    return _checked(content.strip(), str(path))


def _checked(key: bytes, where: str) -> bytes:
    if LEAST_BYTES <= len(key) <= MOST_BYTES:
        return key
    size = "too short" if len(key) < LEAST_BYTES else "too long"
    hint = f"use {LEAST_BYTES} to {MOST_BYTES} bytes, as 'openssl rand -hex 32' makes them"
    raise VoxelscaleError(f"{where}: {size} for a key", hint)
