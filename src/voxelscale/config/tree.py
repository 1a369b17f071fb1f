"""Every parameter of a run, as one tree of frozen dataclasses.

``load(path, sets)`` reads YAML over the defaults, then applies ``key.path=value`` settings; unknown
keys are refused with the nearest name, values are checked against the declared types. ``dump``
writes the whole tree back, so a run's ``config.yaml`` says everything that shaped it.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from voxelscale.config.augment import AugmentConfig
from voxelscale.config.data import DataConfig
from voxelscale.config.export import ExportConfig
from voxelscale.config.loss import LossConfig
from voxelscale.config.model import ModelConfig
from voxelscale.config.optim import OptimConfig
from voxelscale.config.phantom import PhantomConfig
from voxelscale.config.predict import PredictConfig
from voxelscale.config.prepare import PrepareConfig
from voxelscale.config.reading import ReadingConfig
from voxelscale.config.refine import RefineConfig
from voxelscale.config.renamed import RENAMED, as_once_meant, with_new_names
from voxelscale.config.scale import ScaleConfig
from voxelscale.config.search import SearchConfig
from voxelscale.config.section import Section
from voxelscale.config.train import TrainConfig
from voxelscale.config.values import coerce, parse, read_yaml
from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError
from voxelscale.suggest import meant, nearest_keys

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections."""

    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        for name in ("data", "predict"):
            patch = getattr(self, name).patch_size
            if self.model.dims == 2 and patch is not None and patch[0] != 1:
                _refuse(name, "patch_size", patch, "1 along z for model.dims=2")
        for name in _hints(Config):
            section: Section = getattr(self, name)
            for key, allowed, wanted in section.rules():
                if not allowed:
                    _refuse(name, key, getattr(section, key), wanted)


def _refuse(section: str, key: str, value: Any, wanted: str) -> typing.NoReturn:
    raise VoxelscaleError(f"config: {section}.{key} is {value}", f"it must be {wanted}")


def load(path: Path | None = None, sets: Sequence[str] = (), base: Config | None = None) -> Config:
    """The config of a YAML file over `base` (the defaults), then of ``key.path=value`` settings.

    Raises:
        VoxelscaleError: the file is not YAML, a key is unknown, a value is of the wrong type or out
            of range.
    """
    tree = to_dict(base or Config())
    if path is not None:
        _lay(tree, read_yaml(path), str(path))
    for text in sets:
        key, sign, value = text.partition("=")
        if not sign:
            raise VoxelscaleError(
                f"--set {text}: no '='", "write --set key.path=value, such as train.samples=4000"
            )
        nested: Any = parse(value, text)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _lay(tree, nested, "command line")
    return from_dict(tree)


def load_stored(path: Path) -> Config:
    """The config of a file that voxelscale wrote; no notice of old names, which its user did not choose."""
    tree = to_dict(Config())
    _lay(tree, read_yaml(path), str(path), announce=False)
    return from_stored(tree)


def from_stored(tree: Mapping[str, Any], where: str = "config") -> Config:
    """As `from_dict`, of a tree that voxelscale wrote; what only today's rules refuse is read as it was."""
    return from_dict(as_once_meant(tree), where)


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    """A section's keys and their types, evaluated once: it takes most of a config's time."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """The config of a nested mapping over the defaults (YAML's or JSON's plain types)."""
    return _build(Config, with_new_names(tree, where)[0], where, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries and lists of plain values."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def dump(config: Config) -> str:
    """The whole tree as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def _lay(tree: dict[str, Any], over: Mapping[str, Any], where: str, *, announce: bool = True) -> None:
    """Lay keys on the tree; a notice names those that have new names, if it is to `announce` them."""
    renewed, old = with_new_names(over, where)
    if old and announce:
        new = ", ".join(f"{key} (now {RENAMED[key]})" for key in old)
        notice(f"{where}: old names of keys are read: {new}")
    _merge(tree, renewed, Config, where)


def _merge(tree: dict[str, Any], over: Mapping[str, Any], cls: type, where: str, path: str = "") -> None:
    """Lay `over` on `tree` in place, refusing keys that `cls` does not have."""
    known = _hints(cls)
    for key, value in over.items():
        dotted = f"{path}{key}"
        if key not in known:
            whole = _full_key(dotted, value)
            near = nearest_keys(whole, keys())
            hint = meant(near) if near else f"known keys here: {', '.join(known)}"
            raise VoxelscaleError(f"{where}: unknown key {whole}", hint)
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise VoxelscaleError(f"{where}: {dotted} is a section, not a value", f"set {dotted}.KEY")
            _merge(tree[key], value, typing.cast(type, known[key]), where, f"{dotted}.")
        else:
            tree[key] = coerce(known[key], value, where, dotted)


def _full_key(dotted: str, value: Any) -> str:
    """An unknown section with the one key that was set in it."""
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        dotted = f"{dotted}.{key}"
    return dotted


def keys() -> list[str]:
    """All keys, as ``section.key``, in the tree's order."""
    return [f"{name}.{key}" for name, section in _hints(Config).items() for key in _hints(section)]


def _build(cls: type[T], tree: Mapping[str, Any], where: str, path: str) -> T:
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            raise VoxelscaleError(f"{where}: unknown key {path}{key}", "was it written by another version?")
        kind = hints[key]
        nested = is_dataclass(kind) and isinstance(value, Mapping)
        values[key] = (
            _build(typing.cast(type, kind), value, where, f"{path}{key}.")
            if nested
            else coerce(kind, value, where, f"{path}{key}")
        )
    return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
