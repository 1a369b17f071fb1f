"""What a data set holds: its layout, its cases and their names, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from voxelscale.channels import Channel
from voxelscale.classes import Classes
from voxelscale.config import ReadingConfig
from voxelscale.dataset.folds import Fold
from voxelscale.dataset.listing import detect_layout, given_folds, list_cases, list_scans
from voxelscale.dataset.names import Names
from voxelscale.dataset.source import Found, Source

__all__ = ["DataSet", "Source"]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set as a user names it, listed when it is first asked for.

    Attributes:
        path: a CSV, a ``dataset.json``, a folder in one of the `voxelscale.dataset.listing.LAYOUTS`; for
            `scans` also one scan or a folder of them.
        reading: which mask values are the lesion, which slices may be missing, what cases are called.
        layout: one of the layouts, or ``auto``.
        annotations: where LIDC's XML, LUNA16's tables or DICOM's SEG and RTSTRUCT lie, if elsewhere.
        splits: a file of folds, as nnU-Net's ``splits_final.json``; "": the data set's own folds.
        key_folder: a store or predictions, whose key the hashed names of cases were made with; None: the
            user's own key.
    """

    path: Path
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    layout: str = "auto"
    annotations: Path | None = None
    splits: str = ""
    key_folder: Path | None = None

    @cached_property
    def names(self) -> Names:
        """How its cases are called."""
        return Names(how=self.reading.names, key_file=self.reading.name_key, folder=self.key_folder)

    @cached_property
    def cases(self) -> list[Source]:
        """The cases with their labels; errors as of `list_cases`."""
        return list(self._found.sources)

    @cached_property
    def _found(self) -> Found:
        return list_cases(self.path, self.layout, self.annotations, self.names, self.reading)

    @property
    def classes(self) -> Classes:
        """What its labels distinguish, as the user or the data set says; errors as of `list_cases`."""
        return self._found.classes

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What its images have, as the user or the data set says; errors as of `list_cases`."""
        return self._found.channels

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """The folds that the user or the data set gives; () where neither does; see `given_folds`."""
        return given_folds(self._found, self.path, self.splits)

    @cached_property
    def scans(self) -> list[Source]:
        """The scans, labelled or not; errors as of `list_scans`."""
        return list_scans(self.path, self.layout, self.names, self.reading)

    @property
    def cases_or_scans(self) -> list[Source]:
        """The cases of a data set; where the path holds plain scans, these.

        Raises:
            VoxelscaleError: as `list_cases` and `list_scans`; or a file is in no known format.
        """
        if self.layout != "auto" or detect_layout(self.path, self.annotations):
            return self.cases
        if self.path.is_file():
            from voxelscale.formats import detect_format

            detect_format(self.path)
        return self.scans

    def named_as_in(self, folder: Path) -> DataSet:
        """The same data set, its cases called as those of a store or of predictions."""
        # What has been listed already is not listed again.
        return self if folder == self.key_folder else replace(self, key_folder=folder)
