"""What of the site's Markdown is written from the code: the command line's reference, and notebooks.

A page has a comment in its place: ``<!-- commands -->``, or ``<!-- notebook: PATH -->`` with its path.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
COMMANDS = "<!-- commands -->"
NOTEBOOK = re.compile(r"^<!-- notebook: (\S+) -->$", re.MULTILINE)
CONTROL = re.compile("\x1b\\[[0-9;?]*[A-Za-z]|\r")
"""Of a terminal, in what a command printed."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill in each page as it is read."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if COMMANDS in source[0]:
        source[0] = source[0].replace(COMMANDS, commands())
    for found in NOTEBOOK.finditer(source[0]):
        app.env.note_dependency(str(ROOT / found[1]))
        source[0] = source[0].replace(found[0], notebook(ROOT / found[1]))


def commands() -> str:
    """Every command: how it is used, what it does, its arguments and options."""
    import typer

    from voxelscale.cli import app
    from voxelscale.usage import GROUPS

    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="voxelscale", **root.context_settings)
    parts = []
    for group in GROUPS:
        parts.append(f"## {group}")
        for name, command in root.commands.items():
            if command.rich_help_panel == group:
                parts += _command(root.get_command(context, name), name, context, 3)
    return "\n\n".join(parts)


def _command(command: Any, name: str, parent: Any, level: int) -> Iterator[str]:
    context = command.context_class(command, info_name=name, parent=parent, **command.context_settings)
    yield f"{'#' * level} {context.command_path.removeprefix('voxelscale ')}"
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    yield from _paragraphs(command.help or "")
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [f"| `{_cell(record[0])}` | {_escaped(_cell(record[1]))} |" for record in records if record]
    yield "\n".join(["| argument or option | meaning |", "|---|---|", *rows])
    for below in getattr(command, "commands", {}):
        yield from _command(command.get_command(context, below), below, context, level + 1)


def _paragraphs(text: str) -> Iterator[str]:
    """Click's help as Markdown: what must keep its lines, as a block; hard words of Markdown escaped."""
    for paragraph in textwrap.dedent(text).strip().split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield "```text\n" + paragraph.removeprefix("\b\n") + "\n```"
        else:
            yield _escaped(paragraph)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", r"\*")


def notebook(path: Path) -> str:
    """A notebook as Markdown, with what its cells gave."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        else:
            parts.append(f"```ipython3\n{text}\n```")
            parts += filter(None, map(_output, cell["outputs"]))
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join("".join(data["image/png"]).split())
        return f'<img alt="Figure drawn by the cell above" src="data:image/png;base64,{picture}">'
    if "text/html" in data:  # a blank line would end it as HTML
        lines = (
            "".join(data["text/html"])
            .replace('border="1" class="dataframe"', 'class="docutils"')
            .splitlines()
        )
        return "<div>\n" + "\n".join(line for line in lines if line.strip()) + "\n</div>"
    text = CONTROL.sub("", "".join(output.get("text", data.get("text/plain", ""))))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
