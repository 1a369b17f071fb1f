"""Several label files of one scan: which there are, and which of them are copies of each other."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from pathlib import Path

from voxelscale.errors import VoxelscaleError
from voxelscale.files import files_below


def labels_named(folder: Path, text: str) -> tuple[Path, ...]:
    """The label files that a table's cell names: none, one, several between ``;``, or a folder of them.

    Args:
        folder: the table's own, from which paths count.
    """
    parts = [text] if ";" not in text or (folder / text).exists() else text.split(";")
    names = [part.strip() for part in parts if part.strip()]
    return distinct(file for name in names for file in label_files(named_in(folder, name)))


def named_in(folder: Path, text: str) -> Path:
    """What a table calls a path, with the separators of this system where it was written on Windows."""
    turned = folder / text.replace("\\", "/")
    return turned if turned.exists() and not (folder / text).exists() else folder / text


def label_files(path: Path) -> tuple[Path, ...]:
    """The label files in a folder, however deep; a file, or a folder of DICOM slices, is one itself."""
    from voxelscale.labels import kind_of

    if not path.is_dir():
        return (path,)
    found = []
    for file in files_below(path):
        try:
            if kind_of(file) != "mask" or _is_mask(file):
                found.append(file)
        except (VoxelscaleError, OSError):
            found.append(file)  # damaged: reading it will say so
    return distinct(found) or (path,)


def _is_mask(file: Path) -> bool:
    """Whether it is a mask of its own: no slice of a series, no voxels whose header lies beside them."""
    from voxelscale.formats import detect_format

    try:
        return detect_format(file) != "dicom"
    except VoxelscaleError:
        return False


def distinct(files: Iterable[Path]) -> tuple[Path, ...]:
    """The files without byte-identical copies of earlier ones."""
    kept: list[Path] = []
    for file in files:
        same = (other for other in kept if file.is_file() and other.is_file())
        if not any(file.samefile(other) or filecmp.cmp(file, other, shallow=False) for other in same):
            kept.append(file)
    return tuple(kept)
