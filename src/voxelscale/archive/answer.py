"""What a model makes of a scan that has been fetched: its prediction, and the DICOM objects that say it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from voxelscale.config import Config
from voxelscale.console import count, warn
from voxelscale.dataset import DataSet
from voxelscale.device import default_device
from voxelscale.dicom_out.export import export_case
from voxelscale.errors import VoxelscaleError
from voxelscale.model.bundle import Bundle
from voxelscale.predict.record import record_cases
from voxelscale.predict.work import Work

Answer = Callable[[Path, Path], Sequence[Path]]
"""Looks at the scan in a folder, and writes its results as DICOM files into another one."""


class Model:
    """An answer by a model.

    Args:
        bundle: the model; it stays in memory between scans.
        config: its ``predict``, ``reading`` and ``export`` count.
        predictions: the folder that gets masks and findings, as `voxelscale predict` writes them.
        kinds: of results, as `export_case` takes them.
    """

    def __init__(self, bundle: Bundle, config: Config, predictions: Path, kinds: Sequence[str]) -> None:
        self._predictions, self._kinds = predictions, tuple(kinds)
        self._options = config.export
        if "probability" in kinds:
            config = replace(config, predict=replace(config.predict, probabilities=True))
        self._reading = replace(config.reading, names="hash", labels=None)
        self._work = Work(bundle, config.predict, predictions, default_device(), self._reading)

    def __call__(self, scan: Path, out: Path) -> list[Path]:
        """The results of a scan.

        Raises:
            VoxelscaleError: the scan is none that the model can handle.
        """
        data = DataSet(path=scan, reading=self._reading, key_folder=self._predictions)
        sources = data.scans
        if len(sources) != 1:
            raise VoxelscaleError(f"{count(len(sources), 'scan')} in the series", "set reading.select")
        source = sources[0]
        record_cases(self._predictions, [source.case])
        outcome = self._work.each(sources)
        if outcome.failed:
            _, message, hint = outcome.failed[0]
            raise VoxelscaleError(source.without_paths(message), hint)
        for text in outcome.warnings.get(source.case, ()):
            warn(f"{source.case}: {text}")
        return export_case(self._predictions, source, out, self._kinds, self._options, self._reading)
