"""The commands: one thin function a verb, no logic; a module for each group of them."""

from __future__ import annotations

import io
import sys

# Each registers its commands; the help lists them in this order.
from voxelscale.cli import data, train, study, predict, export, archive, evaluate, view, help  # isort: skip  # noqa: F401
from voxelscale.cli.common import app, print_error
from voxelscale.errors import VoxelscaleError
from voxelscale.usage import LEVELS, UsageError, explain

__all__ = ["app", "main"]


def main() -> None:
    """Entry point; --quiet and --verbose may stand anywhere before a bare ``--``."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show ends no command
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    levels = [word for word in words[:end] if word in LEVELS]
    others = [word for word in words[:end] if word not in LEVELS] + words[end:]
    try:
        code = app([*levels, *(others or ["--help"])], prog_name="voxelscale", standalone_mode=False)
    except (VoxelscaleError, UsageError) as error:
        fault = error if isinstance(error, VoxelscaleError) else explain(error)
        print_error(fault.message, fault.hint)
        code = 2
    sys.exit(code or 0)
