"""What each config key means, from its docstring: as comments of the YAML, and as docs/config.md."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

import yaml

from voxelscale.config import Config, keys, to_dict

WIDTH = 100
"""Columns of a comment."""


@cache
def docstrings() -> dict[str, str]:
    """Of every section (``train``) and every key (``train.samples``), on one line; "" where there is none.

    Attributes have no docstring at run time: they are read from the source.
    """
    found: dict[str, str] = {}
    for name, section in get_type_hints(Config).items():
        found[name] = _one_line(section.__doc__ or "")
        body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                said = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
                found[f"{name}.{statement.target.id}"] = _one_line(said)
    return found


def choices(key: str) -> list[str]:
    """The values that ``section.key`` may have where they are words of a list, else []."""
    section, _, name = key.partition(".")
    kind = get_type_hints(get_type_hints(Config)[section])[name]
    inner = next((arg for arg in get_args(kind) if get_origin(arg) is Literal), kind)
    return [str(value) for value in get_args(inner)] if get_origin(inner) is Literal else []


def commented(config: Config) -> str:
    """The whole tree as YAML, each key under a comment that says what it means; `load` reads it back."""
    lines, tree = [], to_dict(config)
    for section, values in tree.items():
        lines += [*_comment(docstrings()[section], ""), f"{section}:"]
        for key, value in values.items():
            lines += _comment(_meaning(f"{section}.{key}"), "  ")
            lines.append(f"  {_yaml(key, value)}")
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    """The page docs/config.md: every key with its default and its meaning."""
    lines = [
        "# Config keys",
        "",
        "Every parameter is a key of one config. `--set key=value` sets one, `--config FILE` reads a YAML",
        "file over the defaults, and `voxelscale config` prints all keys with these comments. This page",
        "is what `voxelscale config --markdown` prints.",
    ]
    tree = to_dict(Config())
    for section, values in tree.items():
        lines += [
            "",
            f"## {section}",
            "",
            docstrings()[section],
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, value in values.items():
            default = _yaml(key, value).removeprefix(f"{key}: ")
            text = _meaning(f"{section}.{key}").replace("|", chr(92) + "|")
            lines.append(f"| `{section}.{key}` | `{default}` | {text} |")
    return "\n".join(lines) + "\n"


def undocumented() -> list[str]:
    """Sections and keys without a docstring."""
    return [key for key in (*to_dict(Config()), *keys()) if not docstrings().get(key)]


def _meaning(key: str) -> str:
    words = choices(key)
    return docstrings()[key] + (f" One of {', '.join(words)}." if words else "")


def _yaml(key: str, value: object) -> str:
    """``key: value`` on one line."""
    text = yaml.safe_dump({key: value}, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip()[1:-1]


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())
