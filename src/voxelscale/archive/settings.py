"""The file that `voxelscale listen` reads: strict keys, plain values, paths from the file's own folder."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from voxelscale.config.section import Rule
from voxelscale.config.values import coerce, read_yaml
from voxelscale.dicom_out.kinds import KINDS
from voxelscale.errors import VoxelscaleError
from voxelscale.suggest import meant, nearest

T = TypeVar("T")

SENT = tuple(kind for kind in KINDS if kind != "page")
"""What an archive takes: DICOM only."""

LONGEST_TITLE = 16
"""Characters of an AE title (PS3.5, 6.2)."""


@dataclass(frozen=True, kw_only=True)
class ArchiveSettings:
    """A DICOMweb service. It is watched, unless series are received by C-STORE; results go to it, unless
    `send` says otherwise."""

    url: str
    """Its root, such as https://pacs.example.org/dicom-web."""
    credentials: str = ""
    """YAML file with user and password, or with token; "": the environment's VOXELSCALE_DICOMWEB_USER and
    VOXELSCALE_DICOMWEB_PASSWORD, or VOXELSCALE_DICOMWEB_TOKEN, where they are set."""
    ca_file: str = ""
    """Certificates to trust, PEM; "": those of the system."""
    timeout: float = 60.0
    """Seconds to wait for a connection, and for each piece of an answer."""
    days: int = 7
    """Studies are looked at whose date is at most so many days ago; 0: all."""

    def checks(self) -> list[Rule]:
        return [
            ("timeout", self.timeout > 0, "above 0 seconds"),
            ("days", 0 <= self.days <= 36500, "0 to 36500"),
        ]


@dataclass(frozen=True, kw_only=True)
class ReceiveSettings:
    """A C-STORE receiver."""

    ae_title: str = "VOXELSCALE"
    """How it is called."""
    host: str = "127.0.0.1"
    """Address it listens on; 0.0.0.0: reachable from other machines."""
    port: int = 11112
    """TCP port; 0: a free one."""
    accept: tuple[str, ...] = ()
    """AE titles that may send; []: any."""
    keep_days: float = 7.0
    """So long the files of a series stay that was not answered."""

    def checks(self) -> list[Rule]:
        titles = all(_is_title(title) for title in (self.ae_title, *self.accept))
        return [
            ("ae_title", titles, f"1 to {LONGEST_TITLE} characters of ASCII, as those of accept"),
            ("port", 0 <= self.port < 65536, "0 to 65535"),
            ("keep_days", self.keep_days >= 0, "at least 0"),
        ]


@dataclass(frozen=True, kw_only=True)
class SendSettings:
    """A classic archive that takes results by C-STORE."""

    host: str
    """Its address."""
    port: int
    """Its port."""
    ae_title: str
    """How it is called."""
    calling: str = "VOXELSCALE"
    """How we are called."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""

    def checks(self) -> list[Rule]:
        wanted = f"1 to {LONGEST_TITLE} characters of ASCII"
        return [
            ("port", 0 < self.port < 65536, "1 to 65535"),
            ("ae_title", _is_title(self.ae_title), wanted),
            ("calling", _is_title(self.calling), wanted),
            ("timeout", self.timeout > 0, "above 0 seconds"),
        ]


@dataclass(frozen=True, kw_only=True)
class RulesSettings:
    """Which series are answered: those that follow all of these rules. Patterns have * and ?; capitals do
    not count; "" is for a series that does not say it; []: any."""

    modality: tuple[str, ...] = ("CT",)
    """Modalities; other series are not looked at."""
    body_part: tuple[str, ...] = ("*CHEST*", "*THORAX*", "*LUNG*", "")
    """Patterns of BodyPartExamined."""
    description: tuple[str, ...] = ()
    """Patterns of SeriesDescription."""
    not_description: tuple[str, ...] = ()
    """Patterns that SeriesDescription must not follow."""
    kernel: tuple[str, ...] = ()
    """Patterns of ConvolutionKernel."""
    slice_thickness: tuple[float, float] = (0.0, 5.0)
    """Minimum and maximum of SliceThickness in mm; a series that does not say it is answered."""
    min_slices: int = 30
    """Minimum number of slices."""

    def checks(self) -> list[Rule]:
        low, high = self.slice_thickness
        return [
            ("modality", bool(self.modality), "at least one"),
            ("slice_thickness", 0 <= low <= high, "a minimum and a maximum in mm"),
            ("min_slices", self.min_slices >= 1, "at least 1"),
        ]


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """A small HTTP server: /health says whether all is well, /metrics is for Prometheus."""

    host: str = "127.0.0.1"
    """Address it listens on."""
    port: int = 8790
    """TCP port; 0: a free one."""

    def checks(self) -> list[Rule]:
        return [("port", 0 <= self.port < 65536, "0 to 65535")]


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """What to watch, what to answer, and with what."""

    model: str
    """Folder of a run, or a model file."""
    folder: str
    """Keeps the ledger, the predictions and the scans that are worked on."""
    archive: ArchiveSettings | None = None
    """DICOMweb."""
    receive: ReceiveSettings | None = None
    """C-STORE, from an archive or a scanner that sends."""
    send: SendSettings | None = None
    """C-STORE, to an archive without DICOMweb."""
    rules: RulesSettings = field(default_factory=RulesSettings)
    """Which series."""
    results: tuple[str, ...] = ("seg", "sr")
    """What is sent: seg, probability, sr, rtstruct, as for predict --dicom-out."""
    set: tuple[str, ...] = ()
    """Keys of the model's config, such as [predict.threshold=0.6]."""
    every: float = 30.0
    """Seconds between looks at the archive."""
    stable: float = 120.0
    """A series is taken when its number of instances has not changed for so many seconds."""
    attempts: int = 5
    """So often a step of a series is tried before it counts as failed."""
    wait: float = 60.0
    """Seconds before a step is tried again; doubled each time."""
    longest_wait: float = 3600.0
    """Maximum of these seconds, also between looks at an archive that is away."""
    keep_scans: bool = False
    """Whether the scans that were answered are kept, in the folder's scans/: to look at results."""
    health: HealthSettings | None = field(default_factory=HealthSettings)
    """Where health and metrics are; null: nowhere."""

    def checks(self) -> list[Rule]:
        return [
            ("every", self.every > 0, "above 0 seconds"),
            ("stable", self.stable >= 0, "at least 0 seconds"),
            ("attempts", self.attempts >= 1, "at least 1"),
            ("wait", self.wait > 0, "above 0 seconds"),
            ("longest_wait", self.longest_wait >= max(self.wait, self.every), "at least wait and every"),
            ("results", bool(self.results), "at least one"),
        ]


def read_settings(path: Path) -> ListenSettings:
    """The settings of a YAML file; its relative paths count from its folder.

    Raises:
        VoxelscaleError: the file is missing or no YAML, a key is unknown or missing, a value is of the
            wrong type or out of range, or nothing is watched or sent to.
    """
    if not path.is_file():
        raise VoxelscaleError(f"{path}: no such file", "docs/hospital.md has a complete example")
    settings = _build(ListenSettings, read_yaml(path), str(path), "")
    wrong = [kind for kind in settings.results if kind not in SENT]
    if wrong:
        raise VoxelscaleError(f"{path}: results: {wrong[0]}", f"choose of {', '.join(SENT)}")
    if settings.archive is None and settings.receive is None:
        hint = "write 'archive: {url: ...}', or 'receive: {...}'"
        raise VoxelscaleError(f"{path}: neither archive nor receive", hint)
    if settings.archive is None and settings.send is None:
        hint = "write 'send: {host: ..., port: ..., ae_title: ...}', or 'archive: {url: ...}'"
        raise VoxelscaleError(f"{path}: nowhere to send results to", hint)
    return settings


def resolved(path: Path, name: str) -> Path:
    """A path that the settings in `path` name."""
    return path.absolute().parent / Path(name).expanduser()


def _build(cls: type[T], tree: Mapping[str, Any], where: str, above: str) -> T:
    kinds = typing.get_type_hints(cls)
    by_key = {f.name: f for f in fields(typing.cast(Any, cls))}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in by_key:
            near = nearest(str(key), list(by_key))
            hint = meant([f"{above}{near}"]) if near else f"known keys here: {', '.join(by_key)}"
            raise VoxelscaleError(f"{where}: unknown key {above}{key}", hint)
        values[key] = _value(kinds[key], value, where, f"{above}{key}")
    for key, f in by_key.items():
        if key not in values and f.default is f.default_factory:  # both are MISSING
            raise VoxelscaleError(f"{where}: {above}{key} is missing", f"write '{key}: ...'")
    built = cls(**values)
    for key, allowed, wanted in typing.cast(Any, built).checks():
        if not allowed:
            shown = getattr(built, key)
            raise VoxelscaleError(f"{where}: {above}{key} is {shown}", f"it must be {wanted}")
    return built


def _value(kind: Any, value: Any, where: str, path: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    section = next((option for option in options if is_dataclass(option)), None)
    if section is None:
        return coerce(kind, value, where, path)
    if value is None and type(None) in options:
        return None
    if not isinstance(value, Mapping):
        raise VoxelscaleError(f"{where}: {path} is a section, not a value", f"write keys below '{path}:'")
    return _build(typing.cast(Any, section), value, where, f"{path}.")


def _is_title(title: str) -> bool:
    return 0 < len(title.strip()) <= LONGEST_TITLE and title.isascii() and title.isprintable()
