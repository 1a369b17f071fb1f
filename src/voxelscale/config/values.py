"""YAML's plain values as the declared types, or a clear refusal."""

from __future__ import annotations

import re
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from voxelscale.errors import VoxelscaleError
from voxelscale.suggest import meant, nearest

_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
"""As in YAML 1.1, without octal and sexagesimal numbers."""


class _Plain(yaml.SafeLoader):
    """YAML without what would be read as something else than is meant.

    No aliases, by which a kilobyte can stand for gigabytes; no key twice, of which YAML's reader keeps the
    last; and 010 and 1:30 are texts, not the numbers 8 and 90.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag not in _NUMBERS]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias; construct anything else as usual."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to another place (*), which is not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse a key that is there twice; construct anything else as usual."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise yaml.YAMLError(f"the key {twice[0]} is there twice in one section")
        return super().construct_mapping(node, deep)


for _tag, _form in _NUMBERS.items():
    _Plain.add_implicit_resolver(_tag, _form, list("-+.0123456789"))


_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: of syntax; of impossible dates and endless numbers; of thousands of brackets."""


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The tree of a YAML file; nothing of it is executed."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Plain)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise VoxelscaleError(f"{path}: no such file", "name an existing YAML file with --config") from None
    except (OSError, *_UNREADABLE) as error:
        raise VoxelscaleError(
            f"{path}: not readable as YAML: {_first_line(error)}", "correct the file's syntax"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise VoxelscaleError(f"{path}: holds no keys", "write sections, such as 'train: {samples: 4000}'")
    return tree


def parse(value: str, text: str) -> Any:
    """The value of ``--set text``."""
    try:
        return yaml.load(value, _Plain)  # noqa: S506 (a SafeLoader)
    except _UNREADABLE as error:
        raise VoxelscaleError(
            f"--set {text}: the value is not YAML: {_first_line(error)}", "quote the value"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def coerce(kind: Any, value: Any, where: str, path: str) -> Any:
    """`value` as the declared type, or a clear refusal."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        # Of a list or a mapping: what is neither is refused as the first of them.
        mapped = isinstance(value, Mapping) and any(get_origin(arg) is dict for arg in kinds)
        kind = next((arg for arg in kinds if (get_origin(arg) is dict) == mapped), kinds[0])
        return coerce(kind, value, where, path)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        near = nearest(str(value), [str(arg) for arg in args])
        choices = "one of " + ", ".join(map(str, args))
        raise _mistyped(where, path, value, f"{choices}; {meant([near])}" if near else choices)
    if origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        if not isinstance(value, list | tuple) or not (many or len(value) == len(args)):
            count = "a list" if many else f"a list of {len(args)}"
            raise _mistyped(where, path, value, f"{count}, as [{', '.join('…' for _ in args)}]")
        item_kinds = [args[0]] * len(value) if many else args
        return tuple(
            coerce(k, v, where, f"{path}[{i}]")
            for i, (k, v) in enumerate(zip(item_kinds, value, strict=True))
        )
    if origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise _mistyped(where, path, value, "a mapping, as {key: value}")
    if kind is float:
        return _as_float(value, where, path)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    names = {int: "a whole number", bool: "true or false", str: "a text"}
    raise _mistyped(where, path, value, names.get(kind, str(kind)))


def _as_float(value: Any, where: str, path: str) -> float:
    # YAML 1.1 reads 1e-3 (no dot) as a text.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise _mistyped(where, path, value, "a number")


def _mistyped(where: str, path: str, value: Any, wanted: str) -> VoxelscaleError:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
    return VoxelscaleError(f"{where}: {path} is {shown}", f"it must be {wanted}")
