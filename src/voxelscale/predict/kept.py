"""Probabilities that predict wrote, read back, so that other thresholds and rules can be tried on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import Classes
from voxelscale.errors import VoxelscaleError
from voxelscale.findings.regions import box_of
from voxelscale.formats import check_same_place, read_label
from voxelscale.geometry import Grid, Scan, reorient
from voxelscale.infer.sliding_window import Box
from voxelscale.predict.case import probability_file

MOST_KEPT = 255
"""What a probability of 1 is kept as."""


MOST_REMEMBERED = 2**30
"""Bytes of a case's probabilities that stay in memory, for all rules that are tried; of more only one
class's."""


class KeptMaps:
    """Probabilities of all classes on a scan's own voxels; one output at a time.

    Args:
        classes: what the outputs are; of those that exclude each other output 0 is the background.
        grid: the scan's lattice.
        of_class: probabilities (z, y, x) in [0, 1] of a class by its number, from 0.
    """

    def __init__(
        self, classes: Classes, grid: Grid, of_class: Callable[[int], NDArray[np.float32]]
    ) -> None:
        self.grid, self._classes, self._of_class = grid, classes, of_class
        self._last: tuple[int, NDArray[np.float32]] | None = None

    def output(self, at: int) -> NDArray[np.float32]:
        """Probabilities (z, y, x) in [0, 1] of an output."""
        if self._last is None or self._last[0] != at:
            self._last = at, self._read(at)
        return self._last[1]

    def _read(self, at: int) -> NDArray[np.float32]:
        if self._classes.regions or self._classes.single:
            return self._of_class(at)
        if at:
            return self._of_class(at - 1)
        background = np.ones(self.grid.shape, np.float32)
        for number in range(len(self._classes.names)):
            background -= self._of_class(number)
        return np.maximum(background, 0, out=background)

    def box(self, at: int) -> Box | None:
        """The smallest box that holds all of an output's probabilities above 0."""
        box = box_of(self.output(at) > 0)
        return box if box[0].stop > box[0].start else None

    def within(self, at: int, box: Box) -> NDArray[np.float32]:
        """An output's probabilities in a box."""
        return self.output(at)[box]


def has_probabilities(folder: Path, classes: Classes) -> bool:
    """Whether those of all classes are in the folder of a case."""
    return all((folder / probability_file(classes, name)).is_file() for name in classes.names)


def read_kept(folder: Path, classes: Classes, image: Path, scan: Scan) -> KeptMaps:
    """The probabilities in the folder of a case, in steps of 1/255.

    Args:
        image: the case's, for messages.
        scan: on the image's lattice, turned to LPS.

    Raises:
        VoxelscaleError: when they are asked for: a file is missing, damaged or of another scan.
    """

    known: dict[int, NDArray[Any]] = {}
    remember = scan.array.size * len(classes.names) <= MOST_REMEMBERED

    def of_class(at: int) -> NDArray[np.float32]:
        if at not in known:
            values = read(at)
            if not remember:
                known.clear()
            known[at] = values
        return np.asarray(known[at] / np.float32(MOST_KEPT), np.float32)

    def read(at: int) -> NDArray[Any]:
        path = folder / probability_file(classes, classes.names[at])
        kept = reorient(read_label(path))
        check_same_place(path, kept, image, scan)
        if kept.array.max(initial=0) > MOST_KEPT:
            raise VoxelscaleError(f"{path}: no probabilities", "run voxelscale predict again")
        return kept.array

    return KeptMaps(classes, scan.grid, of_class)


def maps_of_labels(stored: NDArray[Any], classes: Classes, grid: Grid) -> KeptMaps:
    """Stored labels (z, y, x) as probabilities of 0 and 1."""
    return KeptMaps(classes, grid, lambda at: classes.where(stored, at).astype(np.float32))
