"""The same work on every predicted case, where one case's fault does not stop the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from voxelscale.config import PrepareConfig
from voxelscale.console import Progress
from voxelscale.data.listing import Source, list_sources
from voxelscale.data.names import names_of
from voxelscale.errors import VoxelscaleError

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that could not be used, and why."""

    source: Source
    error: VoxelscaleError

    @property
    def told(self) -> dict[str, str]:
        """For who mends it now: the file is named."""
        return {"case": self.source.case, "error": self.error.message, "hint": self.error.hint}

    @property
    def kept(self) -> dict[str, str]:
        """For a file that others see: without paths, which may be called after the patient."""
        return {**self.told, "error": self.source.without_paths(self.error.message)}


def predicted_sources(
    predictions: Path,
    file: str,
    data: Path,
    config: PrepareConfig,
    layout: str = "auto",
    annotations: Path | None = None,
) -> list[Source]:
    """The cases of a data set that have a mask, and in the folder of their prediction this file."""
    listed = list_sources(data, layout, annotations, names_of(config, predictions))
    return [s for s in listed if s.labels and (predictions / s.case / file).is_file()]


def each_case(
    label: str, sources: Sequence[Source], work: Callable[[Source], Made]
) -> tuple[dict[str, Made], list[Failure]]:
    """What was made of each case, by name in the order of `sources`, and the failures.

    Args:
        label: what the progress bar says.
    """
    made: dict[str, Made] = {}
    failed = []
    with Progress(label, len(sources)) as progress:
        for done, source in enumerate(sources, start=1):
            try:
                made[source.case] = work(source)
            except VoxelscaleError as error:
                failed.append(Failure(source=source, error=error))
            progress.update(done, source.case)
    return made, failed


def none_usable(what: str, failed: Sequence[Failure], hint: str) -> VoxelscaleError:
    """The error where not one case could be used, with the first failure's reason."""
    reason = f": {failed[0].error.message}" if failed else ""
    return VoxelscaleError(f"{what}{reason}", hint)
