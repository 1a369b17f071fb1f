"""What the files behind a case are known by, so that a changed file is noticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from voxelscale.dataset.source import Source
from voxelscale.labels.spheres import EXCLUDED

ENDS = 1 << 14
"""Bytes at both ends of an image's file that count besides its size and time: headers, small files, and
the checksum at the end of gzip are all in them."""


def source_stamp(source: Source) -> list[list[Any]]:
    """What an image's files are known by, those of all channels, of headers and every slice among them."""
    from voxelscale.formats import files_of

    # A data set that is moved or copied with its times must stay known: no inodes, no folders.
    more = [file for path in source.more for file in files_of(path)]
    return [_stamp(file, ENDS) for file in [*(source.files or files_of(source.image)), *more]]


def label_stamp(source: Source) -> list[list[Any]]:
    """The same of what says where its lesions are; of these files all bytes count."""
    from voxelscale.formats import files_of

    paths = [path for label in source.labels for path in (label, label.with_name(EXCLUDED))]
    return [_stamp(file, 0) for path in paths for file in files_of(path)]


def _stamp(file: Path, ends: int) -> list[Any]:
    """Name, size, time and a digest of a file's bytes: all, or those at its beginning and its end."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        status = file.stat()
        with file.open("rb") as handle:
            if ends and status.st_size > 2 * ends:
                digest.update(handle.read(ends))
                handle.seek(-ends, os.SEEK_END)
            for block in iter(lambda: handle.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:  # reading the case says what is wrong
        return [file.name, error.errno]
    return [file.name, status.st_size, status.st_mtime_ns, digest.hexdigest()]
