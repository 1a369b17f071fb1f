"""The command listen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import verb


@verb("Prediction", goes_on=True)
def listen(
    config: Annotated[Path, typer.Argument(help="YAML file: model, folder, archive, rules, ...")],
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try series again that failed before.")
    ] = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Print what became of each series, and end.")
    ] = False,
) -> None:
    """Watch an archive; answer new chest CT series.

    \b
    voxelscale listen hospital.yaml
    voxelscale listen hospital.yaml --ledger
    voxelscale listen hospital.yaml --retry-failed

    Series come from a DICOMweb service, or are received by C-STORE. Each that follows the rules is
    predicted once, and the results go back to the archive. A ledger keeps what was seen, stored, skipped
    or failed, and why. Ctrl-C ends it; the same command continues. docs/hospital.md has a complete example
    of the file.

    Not a medical device: for research only.
    """
    from voxelscale.archive.service import ledger_lines, open_service

    service = open_service(config)
    if ledger:
        print("\n".join(ledger_lines(service.folder)))
        return
    from voxelscale.archive.answer import Model
    from voxelscale.archive.settings import resolved
    from voxelscale.cli.common import read_config
    from voxelscale.dataset.names import Names
    from voxelscale.model.bundle import read_bundle

    bundle = read_bundle(resolved(config, service.settings.model))
    settings = read_config(None, list(service.settings.set), bundle.config)
    names = Names(how="hash", key_file=settings.reading.name_key, folder=service.predictions)
    model = Model(bundle, settings, service.predictions, service.settings.results)
    service.run(model, names, retry_failed=retry_failed)
