"""What the commands share: the application, options, and how errors are shown."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voxelscale import __version__
from voxelscale.console import set_verbosity
from voxelscale.errors import VoxelscaleError
from voxelscale.usage import Commands, RunsByDefault

if TYPE_CHECKING:
    from voxelscale.config import Config
    from voxelscale.dataset import DataSet

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
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file with any of the config's keys.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one config key, such as train.samples=4000; repeatable.",
        autocompletion=_keys,
    ),
]

Layout = Annotated[
    str,
    typer.Option(help="Layout of the data set: auto, csv, folders, msd, nnunet, lidc, luna16 or dicom."),
]
Annotations = Annotated[
    Path | None,
    typer.Option(help="Folder of XML, tables, SEG or RTSTRUCT, if not the data set's own."),
]


Verb = Callable[..., int | None]

SIGPIPE_EXIT = 141
"""What a shell says of a program that SIGPIPE ended."""


def verb(
    group: str, *, goes_on: bool = False, to: typer.Typer = app, name: str | None = None
) -> Callable[[Verb], Verb]:
    """Register a command. Its errors are two lines with exit code 2.

    Ctrl-C, or SIGTERM, with which batch systems ask, ends it with exit code 130.

    Args:
        group: heading in the help.
        goes_on: whether the same command, given again, resumes an interrupted one.
        to: the application or group of commands that it belongs to.
        name: name of the command; None: that of the function.
    """

    def register(command: Verb) -> Verb:
        @functools.wraps(command)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                with _sigterm_as_interrupt():
                    code = command(*args, **kwargs) or 0
                if sys.stdout:  # None where it is closed, as of a service
                    sys.stdout.flush()
            except VoxelscaleError as error:
                print_error(error.message, error.hint)
                code = 2
            except OSError as error:
                if isinstance(error, BrokenPipeError) and _nobody_reads():
                    raise typer.Exit(SIGPIPE_EXIT) from None
                # A full or failing disk, a network share that is gone: a traceback would not help.
                print_error(
                    f"{error.filename or 'input or output'}: {error.strerror or error}",
                    "check the disk and its permissions",
                )
                code = 2
            except KeyboardInterrupt:
                again = "resumes where this one stopped" if goes_on else "starts again from the beginning"
                print_error("interrupted", f"the same command {again}")
                code = 130
            raise typer.Exit(code)

        to.command(name, rich_help_panel=group)(guarded)
        return command

    return register


def _nobody_reads() -> bool:
    """Whether the pipe that results go to was closed, as `head` does; what is left of them is dropped."""
    if not sys.stdout:
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # Other threads are given no signals; a rank must end at once when torchrun restarts it.
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


search_app = typer.Typer(cls=RunsByDefault, rich_markup_mode=None)
app.add_typer(
    search_app,
    name="search",
    help="Find better settings by parallel Bayesian optimisation.",
    rich_help_panel="Studies",
)


def print_error(message: str, hint: str) -> None:
    """Print an error and its hint to stderr, one line each."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def print_failed(failed: Sequence[tuple[str, str, str]], verb: str) -> int:
    """Print the error of each failed case, then their number; return the exit code."""
    for _, message, hint in failed:
        print_error(message, hint)
    if failed:
        names = ", ".join(case for case, _, _ in failed)
        print(f"{len(failed)} not {verb}: {names}", file=sys.stderr)
    return 2 if failed else 0


def rows_of(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The failed cases of a summary, in the form that `print_failed` takes."""
    return [(f["case"], f["error"], f["hint"]) for f in summary["failed"]]


def read_config(path: Path | None, sets: list[str] | None, base: Config | None = None) -> Config:
    """The config of the command line."""
    from voxelscale.config import load

    return load(path, sets or (), base)


def data_set(
    path: Path,
    config: Config,
    layout: str = "auto",
    annotations: Path | None = None,
    keys: Path | None = None,
) -> DataSet:
    """The data set of a command line; `keys`: a store or predictions, whose key names its cases."""
    from voxelscale.dataset import DataSet

    return DataSet(
        path=path,
        reading=config.reading,
        layout=layout,
        annotations=annotations,
        splits=config.prepare.splits,
        key_folder=keys,
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"voxelscale {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print details as well.")] = False,
) -> None:
    """From a folder of CT scans to a model that finds lesions.

    \b
    voxelscale inspect scans/ --out scans.html        what the data set holds, and what is wrong with it
    voxelscale prepare scans/ store/                  check, resample and store it
    voxelscale train store/ run/                      train a U-Net; the same command resumes
    voxelscale predict run/ new_scans/ predictions/   write masks and findings
    voxelscale evaluate predictions/ scans/           Dice, sensitivity, FROC, with intervals
    voxelscale report predictions/ scans/ --run run/  write one HTML page

    New here? `voxelscale quickstart` does all of this on synthetic scans, in minutes. The folder that a
    command writes is its last argument; a single file, or another folder than usual, is --out. Every
    parameter is a key of one config: `voxelscale config` prints all of them, --set changes one. Each
    command's --help has examples.
    """
    set_verbosity(0 if quiet else 2 if verbose else 1)
