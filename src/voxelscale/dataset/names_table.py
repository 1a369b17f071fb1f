"""The table that says which file and series is behind each case's name; for the owner of the data only."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from voxelscale.dataset.names import temporary_of, write_private
from voxelscale.dataset.source import Source
from voxelscale.errors import VoxelscaleError
from voxelscale.tables import read_table

TABLE = "names.csv"
"""In the folder of a store or of predictions."""


def write_names(sources: Sequence[Source], folder: Path) -> Path:
    """Write, readable for its owner only, which image and series each case is; the table grows.

    It holds paths and UIDs: it is for the owner of the data, and is never part of a report.

    Raises:
        VoxelscaleError: it cannot be written.
    """
    path = folder / TABLE
    rows: dict[str, list[str]] = {}
    if path.is_file():
        table = read_table(path, ("case", "path", "seriesuid"))
        rows = {cells[0]: [table.word(cells, c) for c in table.places] for _, cells in table.rows()}
    rows |= {s.case: [s.case, str(s.image.absolute()), s.series] for s in sources}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("case", "path", "seriesuid"), *rows.values()])
    temporary = temporary_of(path)
    try:
        write_private(temporary, text.getvalue().encode(errors="backslashreplace"))
        os.replace(temporary, path)
    except OSError as error:
        raise VoxelscaleError(
            f"{path}: cannot be written ({error.strerror})", "choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path
