"""From raw scans to masks and findings on the scans' own voxels, in one process or in several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from voxelscale.config import Config, PredictConfig, ReadingConfig
from voxelscale.console import count, warn
from voxelscale.dataset.listing import Source, detect_layout
from voxelscale.device import default_device
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import Finding, read_findings, write_findings
from voxelscale.model.bundle import Bundle
from voxelscale.predict.case import predicted_by, predicted_with, settings_of
from voxelscale.predict.ranks import predict_in_ranks
from voxelscale.predict.record import read_record, record_cases
from voxelscale.predict.work import Predictions, Work
from voxelscale.ranks.place import fill


def predict(
    sources: Sequence[Source],
    bundle: Bundle,
    config: PredictConfig,
    out: Path,
    reading: ReadingConfig | None = None,
) -> Predictions:
    """Look at every scan; write masks and findings, and warn where they are not to be relied upon.

    ``<out>/<case>/mask.nii.gz`` lies voxel on voxel on the scan, ``<case>/findings.csv`` is LUNA16's
    table and ``findings.json`` has every field, and the warnings; ``<out>/findings.csv`` is the table of
    all cases that this model has predicted into the folder, by earlier commands too. Of several classes
    the mask has the data set's values, and the tables have a column ``class``
    (`voxelscale.predict.classes.classes_by`). Run again with the same arguments it keeps what is whole and
    unchanged. Started by torchrun, srun or mpiexec, the ranks share the scans out, and what remains of them
    by windows (`voxelscale.predict.ranks`).

    A scan that cannot be what the model is for (`voxelscale.store.plausible.against`) fails, unless
    `config.refuse_unusable` is false.

    Args:
        reading: its ``fill_gaps`` and ``select`` say how images are read; None: as in the model's config.

    Raises:
        VoxelscaleError: no scan could be predicted at all.
    """
    fill()
    if os.environ.get("RANK", "0") == "0":
        record_cases(out, (source.case for source in sources))
    reading = reading or bundle.config.reading
    if "RANK" not in os.environ:
        outcome = Work(bundle, config, out, default_device(), reading).each(sources)
    else:
        outcome = predict_in_ranks(sources, bundle, config, out, reading)
    if outcome.rank:
        return outcome
    if not outcome.findings:
        case, message, hint = outcome.failed[0]
        raise VoxelscaleError(f"no scan could be predicted; {case}: {message}", hint)
    by_case = _of_before(bundle, out, outcome, settings_of(bundle, config, reading)) | outcome.findings
    every = [f for case in sorted(by_case) for f in by_case[case]]
    write_findings(every, out / "findings.csv", labelled=not bundle.classes.single)
    _warn_of(outcome)
    return outcome


def _of_before(bundle: Bundle, out: Path, outcome: Predictions, settings: str) -> dict[str, list[Finding]]:
    """What earlier commands found in other cases of this folder, with the same model."""
    record, tried = read_record(out), {case for case, *_ in outcome.failed} | outcome.findings.keys()
    found: dict[str, list[Finding]] = {}
    others = []
    for case in sorted((record.cases if record else frozenset()) - tried):
        if not (path := out / case / "findings.json").is_file():
            continue  # it failed then
        if predicted_by(out / case) in ("", bundle.identity):
            found[case] = read_findings(path)
        else:
            others.append(case)
    if unlike := [case for case in found if predicted_with(out / case) not in ("", settings)]:
        what = f"{out}: findings.csv holds {count(len(unlike), 'case')} with other settings or another"
        warn(f"{what} calibration, such as {unlike[0]}; predict all with the same ones")
    if others:
        what = f"{out}: {count(len(others), 'case')} of another model, such as {others[0]}"
        warn(f"{what}: left out of findings.csv; predict with each model into a folder of its own")
    return found


def with_channels_of(bundle: Bundle, config: Config, scans: Path) -> Config:
    """The config with the names of a model's channels, for scans that no data set names them of.

    So ``a_0000.nii.gz`` and ``a_0001.nii.gz`` in a folder are one case.
    """
    names = tuple(channel.name for channel in bundle.channels)
    if len(names) == 1 or config.reading.channels or detect_layout(scans):
        return config
    return replace(config, reading=replace(config.reading, channels=names))


def _warn_of(outcome: Predictions) -> None:
    """Every warning once; one that holds for several scans is given with their number."""
    cases: dict[str, list[str]] = {}
    for case, texts in outcome.warnings.items():
        for text in texts:
            cases.setdefault(text, []).append(case)
    for text, of in cases.items():
        warn(f"{of[0] if len(of) == 1 else f'{len(of)} scans'}: {text}")
