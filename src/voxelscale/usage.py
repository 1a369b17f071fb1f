"""The command line itself: commands by group in the help, and errors of usage in the same two lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from voxelscale.errors import VoxelscaleError
from voxelscale.suggest import meant, nearest, nearest_command, nearest_keys

LEVELS = ("-q", "--quiet", "-v", "--verbose")
"""Options of all commands, which may stand anywhere."""

GROUPS = ("Data", "Training", "Prediction", "Evaluation", "Studies", "Help")
"""Of commands, in the order of a project."""

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Click's UsageError; Typer brings a Click of its own, under another name in each version."""


class _Group(typer.core.TyperGroup):
    """Commands whose arguments are shown in capitals, as their help refers to them."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command by its name."""
        command = super().get_command(ctx, cmd_name)
        for parameter in command.params if command else ():
            if parameter.param_type_name == "argument" and not parameter.metavar:
                parameter.metavar = str(parameter.name).upper()
        return command


class Commands(_Group):
    """The commands, listed by the group that each of them names (Typer's ``rich_help_panel``)."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        width = max(map(len, self.commands))
        for group in GROUPS:
            with formatter.section(group):
                formatter.write_dl(
                    [
                        (name.ljust(width), command.get_short_help_str(formatter.width - 6 - width))
                        for name, command in self.commands.items()
                        if getattr(command, "rich_help_panel", "") == group
                    ]
                )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or suggest one."""
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            near = nearest_command(name, self.commands)
            hint = meant([f"voxelscale {near}"]) if near else "voxelscale --help lists the commands"
            raise VoxelscaleError(f"no such command: {name}", hint)
        return super().resolve_command(ctx, args)


class RunsByDefault(_Group):
    """A command with a few commands of its own: without one of them it runs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` before arguments that name no command."""
        if args and args[0] not in self.commands and not ctx.resilient_parsing:
            near = nearest(args[0], self.commands)
            if near and not Path(args[0]).exists():
                raise VoxelscaleError(
                    f"{args[0]}: no such command or folder", meant([f"{ctx.command_path} {near}"])
                )
        named = args and args[0] in self.commands
        completing = ctx.resilient_parsing and not args
        parsed: list[str] = super().parse_args(ctx, args if named or completing else ["run", *args])
        return parsed


def explain(error: Any) -> VoxelscaleError:
    """A usage error in the two lines of all errors."""
    if error.ctx is None:
        return VoxelscaleError(_plain(error.format_message()), "voxelscale --help lists the commands")
    path = error.ctx.command_path.replace(" search run", " search")
    command = path.partition(" ")[2] or path
    parameters = error.ctx.command.params
    if (name := getattr(error, "option_name", "")) and hasattr(error, "possibilities"):
        return VoxelscaleError(f"{command}: no such option: {name}", _meant_option(name, parameters, path))
    if hasattr(error, "param_type") and error.param is not None:
        what = f"{error.param.param_type_name} {_shown(error.param)}"
        hint = f"write {path} {' '.join(_shown(p) for p in parameters if p.required)}"
        return VoxelscaleError(f"{command}: missing {what}", f"{hint}; {path} --help has examples")
    return VoxelscaleError(f"{command}: {_plain(error.format_message())}", f"see {path} --help")


def _meant_option(name: str, parameters: Any, path: str) -> str:
    known = [option for p in parameters for option in (*p.opts, *p.secondary_opts)]
    if near := nearest(name, [option for option in known if option.startswith("--")]):
        return meant([near])
    if "--set" in known:
        from voxelscale.config import keys

        if found := nearest_keys(name.lstrip("-").replace("-", "_"), keys()):
            return meant([f"--set {key}=VALUE" for key in found])
    return f"{path} --help lists the options"


def _shown(parameter: Any) -> str:
    """A parameter as a person writes it: ``STORE``, ``--annotations PATH``."""
    name = str(parameter.name).upper()
    return name if parameter.param_type_name == "argument" else f"{parameter.opts[0]} {name}"


def _plain(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    return text[:1].lower() + text[1:]
