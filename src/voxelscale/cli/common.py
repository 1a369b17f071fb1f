"""What the commands share: the application, options, and how errors are shown."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voxelscale import __version__
from voxelscale.console import set_verbosity
from voxelscale.errors import VoxelscaleError
from voxelscale.usage import Commands, RunsByDefault

if TYPE_CHECKING:
    from voxelscale.config import Config

app = typer.Typer(
    name="voxelscale",
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _keys() -> list[str]:
    """For the shell's completion of ``--set``."""
    from voxelscale.config import keys

    return [f"{key}=" for key in keys()]


ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML with any of the config's keys.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One config key, as train.samples=4000; repeatable.",
        autocompletion=_keys,
    ),
]

Layout = Annotated[
    str, typer.Option(help="How the data set is laid out: csv, folders, msd, nnunet, lidc, luna16, dicom.")
]
Annotations = Annotated[
    Path | None,
    typer.Option(help="Where XML, tables, SEG or RTSTRUCT lie, if elsewhere."),
]


Verb = Callable[..., int | None]


def verb(
    group: str, *, goes_on: bool = False, to: typer.Typer = app, name: str | None = None
) -> Callable[[Verb], Verb]:
    """A command whose errors are two lines and exit code 2, and that ends well on Ctrl-C.

    Args:
        group: under which the help lists it.
        goes_on: whether the same command, given again, keeps what an interrupted one has done.
        to: the commands that it becomes one of.
        name: where it is not the function's.
    """

    def register(command: Verb) -> Verb:
        @functools.wraps(command)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                code = command(*args, **kwargs) or 0
            except VoxelscaleError as error:
                tell(error.message, error.hint)
                code = 2
            except OSError as error:
                # A disk that fails or fills, a share that goes away: not worth a traceback.
                tell(
                    f"{error.filename or 'input or output'}: {error.strerror or error}",
                    "check the disk and its permissions",
                )
                code = 2
            except KeyboardInterrupt:
                again = "goes on where this one stopped" if goes_on else "begins again"
                tell("interrupted", f"the same command {again}")
                code = 130
            raise typer.Exit(code)

        to.command(name, rich_help_panel=group)(guarded)
        return command

    return register


search_app = typer.Typer(cls=RunsByDefault, rich_markup_mode=None)
app.add_typer(
    search_app,
    name="search",
    help="Find better settings by parallel Bayesian optimisation.",
    rich_help_panel="Studies",
)


def tell(message: str, hint: str) -> None:
    """An error on stderr, in two lines."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def tell_failed(failed: Sequence[tuple[str, str, str]], verb: str) -> int:
    """Each failed case with its fault, then how many; the exit code."""
    for _, message, hint in failed:
        tell(message, hint)
    if failed:
        names = ", ".join(case for case, _, _ in failed)
        print(f"{len(failed)} not {verb}: {names}", file=sys.stderr)
    return 2 if failed else 0


def rows_of(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The failed cases of a summary, as `tell_failed` takes them."""
    return [(f["case"], f["error"], f["hint"]) for f in summary["failed"]]


def read_config(path: Path | None, sets: list[str] | None, base: Config | None = None) -> Config:
    """The config of the command line."""
    from voxelscale.config import load

    return load(path, sets or (), base)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"voxelscale {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Details, too.")] = False,
) -> None:
    """From a folder of CT scans to a model that finds lesions.

    \b
    voxelscale inspect scans/ scans.html              what is there, and what is wrong with it
    voxelscale prepare scans/ store/                  check, resample and store scans and masks
    voxelscale train store/ run/                      train a U-Net; Ctrl-C saves, again goes on
    voxelscale search store/ search/                  find better settings, on all devices at once
    voxelscale scale store/ study/                    what N workers do to time and Dice
    voxelscale predict run/ new_scans/ predictions/   masks and findings in patient mm
    voxelscale evaluate predictions/ scans/           Dice, surfaces, sensitivity, FROC
    voxelscale compare predictions/ others/ scans/    whether one model is better than another
    voxelscale froc findings.csv --annotations ...    a submission scored as LUNA16 does
    voxelscale calibrate run/ val/ scans/             confidence that means what it says
    voxelscale refine run/ store/                     false-positive reduction by a second network
    voxelscale ensemble all.vxs run1/ run2/           several models as one
    voxelscale report predictions/ scans/ --run run/  one HTML page

    No scans at hand: voxelscale phantom scans/ makes synthetic ones, and voxelscale quickstart does
    all of it in a few minutes. Every parameter is a key of one config tree; voxelscale config prints it.
    """
    set_verbosity(0 if quiet else 2 if verbose else 1)
