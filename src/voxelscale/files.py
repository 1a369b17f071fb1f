"""Durable writing (under a temporary name, synced, renamed), and the files of a tree."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from voxelscale.errors import VoxelscaleError

_MAGIC = b"voxelscale sealed 1\n"

TO_WRITE = "free some space or choose another folder"
PROBE = bytes(4096)
"""What `check_output` writes for a trial: a block, which a full disk or a used-up quota refuses."""


def check_output(path: Path, *, file: bool = False) -> None:
    """Raise an error if an output cannot be written there; called by commands before they compute.

    Nothing is left behind. Missing folders are not made; the nearest one that exists must be writable.

    Args:
        path: the folder that will be written, or the file.
        file: whether it is a file.

    Raises:
        VoxelscaleError: it is of the other kind, lies below a file, or a trial file cannot be written.
    """
    path = path.absolute()
    if path.is_dir() and file:
        raise VoxelscaleError(f"{path}: a folder, not a file", "name a file in it")
    if path.is_file() and not file:
        raise VoxelscaleError(f"{path}: a file, not a folder", "choose another folder")
    if path.exists() and not (path.is_dir() or path.is_file()):  # a device would be replaced
        raise VoxelscaleError(f"{path}: not a regular file", "choose another path")
    above = path.parent if file else path
    while not os.path.lexists(above):
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above) as handle:
            handle.write(PROBE)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise not_written(path, error) from None


def not_written(path: Path, error: Exception) -> VoxelscaleError:
    """The message about a file or folder that cannot be written."""
    words = getattr(error, "strerror", None) or str(error).strip() or "not all of it was taken"
    return VoxelscaleError(f"{path}: cannot be written ({words.splitlines()[-1]})", TO_WRITE)


def own_word() -> str:
    """For the name of a temporary file: no other thread's, nor that of a process on another machine."""
    return secrets.token_hex(4)


def put_in_place(temporary: Path, path: Path) -> None:
    """Bring a whole temporary file onto the disk, then give it its name."""
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())  # a full disk or quota may show only here
    os.replace(temporary, path)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that at any instant either the old or the new content is there, whole.

    Text is UTF-8; what has no place in it, as a path in another encoding, is written as ``\\udce9``.

    Raises:
        VoxelscaleError: the file cannot be written (no space, no permission).
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{own_word()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            handle.write(data)
        if temporary.stat().st_size != len(data):
            raise OSError(errno.EIO, "the file is shorter than what was written")
        put_in_place(temporary, path)
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `folder`: what is there is always whole.

    An old one goes first. After an error the part stays until the next attempt.
    """
    part = folder.with_name(f".{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    os.replace(part, folder)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """`write_atomic` of a table; the first row names the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, text.getvalue())


def digest_of(tree: object) -> str:
    """SHA-256, in hexadecimal, of nested plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, one a line, in order; of a line that a kill cut short there is none."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def write_sealed(path: Path, payload: bytes) -> None:
    """`write_atomic` with the payload's SHA-256 before it."""
    write_atomic(path, _MAGIC + hashlib.sha256(payload).digest() + payload)


def seal_of(path: Path) -> str:
    """The digest that a sealed file bears, unchecked: by which a changed one is known."""
    with path.open("rb") as handle:
        return handle.read(len(_MAGIC) + 32)[len(_MAGIC) :].hex()[:16]


def read_sealed(path: Path) -> bytes:
    """The payload that `write_sealed` wrote.

    Raises:
        VoxelscaleError: the file is missing, of another kind, truncated or altered.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VoxelscaleError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
    start = len(_MAGIC) + 32
    if not data.startswith(_MAGIC):
        raise VoxelscaleError(f"{path}: not a voxelscale checkpoint or model", "check the path")
    payload = data[start:]
    if hashlib.sha256(payload).digest() != data[len(_MAGIC) : start]:
        raise VoxelscaleError(f"{path}: truncated or altered (checksum differs)", "use another copy")
    return payload


def files_below(
    folder: Path, *, hidden: bool = False, unreadable: Callable[[OSError], None] | None = None
) -> Iterator[Path]:
    """Every file in a folder, however deep, in the order of names.

    Links to folders are followed. Each real folder is read once, so loops end; a link to a folder that
    holds this one is passed over.

    Args:
        hidden: whether files and folders whose names begin with a dot count.
        unreadable: gets the error of each folder that cannot be read.
    """
    top = os.path.realpath(folder)
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(name)
        above = real != top and os.path.commonpath([real, top]) == real
        if real in seen or above:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if hidden or not f.startswith("."))
        yield from (Path(name, file) for file in sorted(files) if hidden or not file.startswith("."))
