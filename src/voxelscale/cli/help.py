"""Commands to begin with: quickstart, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import ConfigFile, Sets, read_config, verb
from voxelscale.console import duration
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@verb("Help", goes_on=True)
def quickstart(
    out: Annotated[Path, typer.Argument(help="Folder of all results.")] = Path("quickstart"),
    scan: Annotated[
        Path | None, typer.Option(help="At the end, show what the starter model finds in this chest CT.")
    ] = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Run all steps on synthetic scans, in minutes.

    \b
    voxelscale quickstart
    voxelscale quickstart trial/ --set train.samples=2000
    voxelscale quickstart --scan patient.nii.gz

    Makes scans, prepares them, trains, predicts the test scans, evaluates and writes a report. After Ctrl-C
    the same command resumes. With --scan it ends with a real CT: the model that comes with voxelscale
    (docs/starter.md) predicts it into OUT/scan. The last line printed is JSON with dice,
    sensitivity_at_1_fp, seconds and report.
    """
    check_output(out)
    from voxelscale.evaluate.text import text_value
    from voxelscale.quickstart import quickstart as run_quickstart
    from voxelscale.quickstart import quickstart_config

    if scan is not None and not scan.exists():
        raise VoxelscaleError(f"{scan}: no such file or folder", "give --scan a CT")
    result = run_quickstart(out, quickstart_config(config, tuple(set_ or ())))
    total = sum(result.seconds.values())
    laps = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.seconds.items())
    print(f"Dice on the test scans: {text_value(result.dice)}")
    print(f"sensitivity at 1 false positive per scan: {text_value(result.sensitivity_at_1_fp)}")
    print(f"time: {duration(total)} ({laps})")
    print(f"report: {result.report}")
    code: int | None = 0
    if scan is not None:
        from voxelscale.cli.predict import predict
        from voxelscale.model.shipped import SHIPPED

        code = predict(Path(SHIPPED[0]), scan, out / "scan")
    summary = {
        "dice": _rounded(result.dice),
        "sensitivity_at_1_fp": _rounded(result.sensitivity_at_1_fp),
        "seconds": round(total, 1),
        "report": str(result.report),
    }
    print(json.dumps(summary))
    return code or 0


@verb("Help")
def config(
    config: ConfigFile = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a table of all keys instead, as docs/config.md.")
    ] = False,
    set_: Sets = None,
) -> None:
    """Print the config as YAML, with a comment on every key.

    \b
    voxelscale config > mine.yaml
    voxelscale train store/ run/ --config mine.yaml
    voxelscale train store/ run/ --config mine.yaml --set optim.lr=0.002

    --config replaces defaults, --set replaces both.
    """
    from voxelscale.config import docs

    print(docs.markdown() if markdown else docs.commented(read_config(config, set_)), end="")
