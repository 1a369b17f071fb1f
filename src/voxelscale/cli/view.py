"""The commands view and compare-readers."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import typer

from voxelscale.cli.common import Annotations, ConfigFile, Layout, Sets, data_set, read_config, verb
from voxelscale.errors import VoxelscaleError


@verb("Evaluation", goes_on=True)
def view(
    predictions: Annotated[
        Path, typer.Argument(help="Folder that voxelscale predict wrote, or a study with report pages.")
    ],
    scans: Annotated[
        Path | None,
        typer.Argument(help="The scans that were predicted, or the data set with the true masks."),
    ] = None,
    case: Annotated[str, typer.Option(help="Case to show first.")] = "",
    finding: Annotated[int, typer.Option(min=1, help="Number of the finding to show first.")] = 1,
    reader: Annotated[str, typer.Option(help="Who reads; by default the login name.")] = "",
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's are a risk.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the browser, where there is a desktop.")] = True,
    patient_names: Annotated[
        bool, typer.Option(help="Show the patients' identifiers in the page.")
    ] = False,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Look at findings in the browser; accept, reject and correct them.

    \b
    voxelscale view predictions/ scans/
    voxelscale view predictions/ scans/ --case case-0003 --finding 2 --reader "A. Smith"
    voxelscale prepare predictions/readers/A._Smith/ store/
    voxelscale view search/

    Serves a page on this machine only and prints its address, which holds a secret token. What is decided
    is in predictions/readers/<reader>/: a journal, a mask of each case, and dataset.csv of the finished
    cases, which prepare takes. docs/viewer.md describes the page and its keys. For research only.
    """
    from voxelscale.viewer.serve import door_of, listening, needs_server, serve

    needs_server()
    from voxelscale.viewer.app import Shown, build
    from voxelscale.viewer.cases import list_predicted
    from voxelscale.viewer.decisions import reader_folder
    from voxelscale.viewer.pages import build_pages

    if scans is None:
        listener = listening(host, port)
        door = door_of(host, listener)
        serve(build_pages(predictions, door), door, listener, host, open_browser=browser)
        return
    settings = read_config(config, set_)
    data = data_set(scans, settings, layout, annotations)
    listed = list_predicted(predictions, data)
    if case and case not in {one.name for one in listed}:
        raise VoxelscaleError(f"{predictions}: no prediction of the case {case}", "check --case")
    name = reader or _login_name()
    shown = Shown(
        cases=listed,
        reading=settings.reading,
        folder=reader_folder(predictions, name),
        reader=name,
        patients=patient_names,
    )
    listener = listening(host, port)
    door = door_of(host, listener)
    app, viewer = build(shown, door)
    fragment = f"#{urlencode({'case': case, 'finding': finding})}" if case else ""
    try:
        serve(app, door, listener, host, fragment, browser)
    finally:
        viewer.close()


@verb("Evaluation", name="compare-readers")
def compare_readers(
    predictions: Annotated[Path, typer.Argument(help="Folder that both readers looked at.")],
    reader_a: Annotated[str, typer.Argument(help="Name of a reader, as given to voxelscale view.")],
    reader_b: Annotated[str, typer.Argument(help="Name of the other reader.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Compare what two readers decided in voxelscale view.

    \b
    voxelscale compare-readers predictions/ "A. Smith" "B. Jones"

    How often both accepted and rejected, Cohen's kappa, and the Dice of their masks of cases that both
    finished.
    """
    from voxelscale.viewer.readers import compare_readers as compare
    from voxelscale.viewer.readers import text_table

    result = compare(predictions, reader_a, reader_b)
    print(json.dumps(result) if as_json else "\n".join(text_table(result)))


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        raise VoxelscaleError("the login name is unknown", "name the reader by --reader") from None
