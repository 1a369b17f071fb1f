"""Every hint and every line of the docs names only commands, options and config keys that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from voxelscale import cli
from voxelscale.config import keys
from voxelscale.config.docs import docstrings

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

OTHERS = {"--nnodes", "--nproc-per-node", "--no-python", "--no-deps", "--raw", "--help", "-h"}
"""Options of torchrun, pip and gdcmconv, and of every command."""

HOLE = "\0"
"""Where an f-string puts a value that only the moment knows."""

KEY = re.compile(r"(?<![\w./\0-])([a-z]+)\.([a-z0-9_]+)(?![\w/(-]|\.\w)")
FILES = {
    "onnx",
    "pt2",
    "ts",
    "csv",
    "key",
    "yaml",
    "html",
    "json",
    "jsonl",
    "vxs",
    "txt",
    "gz",
    "md",
    "svg",
    "py",
    "sqlite",
    "log",
}


def command_tree() -> dict[str, Any]:
    """Commands by name, "search status" and its like among them."""
    group = typer.main.get_command(cli.app)
    found: dict[str, Any] = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", {})
        found |= {f"{name} {verb}": c for verb, c in inner.items()}
        found[name] = inner["run"] if inner else command
    return found


COMMANDS = command_tree()


def options_of(command: Any) -> set[str]:
    return {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | OTHERS


EVERYWHERE = {"--quiet", "--verbose", "-q", "-v", "--version"}
ALL_OPTIONS = EVERYWHERE.union(*(options_of(command) for command in COMMANDS.values()))
SETTABLE = {*keys(), "key.path"}
SECTIONS = {key.partition(".")[0] for key in keys()}


CALLERS = {
    "evaluate": ["evaluate", "compare", "froc", "calibrate", "report"],
    "scale": ["scale"],
    "search": ["search", "search status", "search report"],
    "train": ["train", "refine", "scale", "search"],
}
"""By package: the commands that can run into its errors, whose options its hints may name."""


def text_of(node: ast.AST | None) -> str:
    """The words of a string, an f-string, a sum or a choice of such; values unknown here are holes."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)} ; {text_of(node.orelse)}"
    if isinstance(node, ast.BinOp):
        return f"{text_of(node.left)} {text_of(node.right)}"
    return ""


def hints() -> Iterator[tuple[str, str]]:
    """(Where, text): second arguments of VoxelscaleError, what is called hint, and constants."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[str] = []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("VoxelscaleError", "print_error")
            ):
                given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "hint")]
                found = [text_of(argument) for argument in given]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                if any("hint" in name.lower() or name.isupper() for name in names):
                    found = [text_of(node.value)]
                    if isinstance(node.value, ast.Tuple):
                        found = [text_of(element) for element in node.value.elts]
            for text in found:
                if " " in text.strip() and "\n" not in text:  # a page's style is no hint
                    yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", text


HINTS = list(hints())


def faults(text: str, *commands: Any) -> list[str]:
    """What a text names that does not exist.

    Args:
        commands: whose options count; none given: those of any.
    """
    known = EVERYWHERE.union(*map(options_of, commands)) if commands else ALL_OPTIONS
    wrong = [o for o in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text) if o not in known]
    for section, key in KEY.findall(text):
        if section in SECTIONS and key not in FILES and f"{section}.{key}" not in keys():
            wrong.append(f"{section}.{key}")
    wrong += [
        o for o in re.findall(r"--set ([a-z_]+\.[a-z_0-9]+)=", text) if o not in (*keys(), "key.path")
    ]
    return wrong


def said_commands(text: str) -> Iterator[tuple[str, Any]]:
    """(The whole command line, its command or None) for each ``voxelscale WORD`` in a text."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"voxelscale [^\n`;#|]*", joined):
        words = line.split()[1:]
        while words and words[0] in EVERYWHERE:
            words.pop(0)
        name = words[0].rstrip(".,)") if words else ""
        if re.fullmatch(r"[a-z]+", name):
            two = f"{name} {words[1]}" if len(words) > 1 else ""
            yield line, COMMANDS.get(two) or COMMANDS.get(name)


def test_there_are_hints_to_read() -> None:
    assert len(HINTS) > 200
    assert any("train.batch_size" in text for _, text in HINTS)


@pytest.mark.parametrize(
    "text", ["use --run", "use --oot", "set train.sampels=3", "--set predict.treshold=0.4 may do"]
)
def test_a_wrong_hint_is_found(text: str) -> None:
    assert faults(text, COMMANDS["train"])


def test_hints_name_what_exists() -> None:
    wrong = []
    for where, text in HINTS:
        callers = CALLERS.get(where.split("/")[2], [])
        wrong += [(where, name, text) for name in faults(text, *(COMMANDS[name] for name in callers))]
    assert not wrong


def test_hints_name_commands_that_exist() -> None:
    for where, text in HINTS:
        for line, command in said_commands(text):
            assert command is not None, (where, line)
            assert not faults(line.split(" or ")[0], command), (where, line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_docs_name_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S))
    for line, command in said_commands(blocks):
        assert command is not None, line
        assert not faults(line, command), line
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        keyed = [f"{s}.{k}" for s, k in KEY.findall(quoted) if s in SECTIONS and k not in FILES]
        assert all(key in keys() or key == quoted.partition("(")[0] for key in keyed), quoted
        for line, command in said_commands(quoted):
            assert command is not None, line
            assert not faults(line, command), line


def test_help_and_docstrings_of_keys_name_what_exists() -> None:
    wrong = [(key, name) for key, text in docstrings().items() for name in faults(text)]
    for name, command in COMMANDS.items():
        texts = [command.help or "", *(getattr(p, "help", "") or "" for p in command.params)]
        wrong += [(name, fault) for text in texts for fault in faults(text)]
        for line, other in said_commands(command.help or ""):
            wrong += [(name, line)] if other is None else [(name, f) for f in faults(line, other)]
    assert not wrong
