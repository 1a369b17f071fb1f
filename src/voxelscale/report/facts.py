"""What a report says of itself: when, by which version and model, and what speaks against its findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from voxelscale import __version__
from voxelscale.classes import Classes
from voxelscale.errors import VoxelscaleError
from voxelscale.files import read_json_object
from voxelscale.predict.case import predicted_by
from voxelscale.report.overlays import WINDOW_NAME


def head(title: str, parts: Iterable[str], window: str = WINDOW_NAME) -> str:
    """The page's heading with date, version and the window of the pictures."""
    now = datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    said = " · ".join([*parts, now, f"voxelscale {__version__}", f"pictures: {window}"])
    return f'<h1>{escape(title)}</h1><p class="lead">{escape(said)}</p>'


def models(predictions: Path, cases: Iterable[str]) -> list[str]:
    """The identities of the models that predicted the cases, "" for a case that does not say."""
    return sorted({predicted_by(predictions / case) for case in cases})


def model_lines(found: list[str], run: Path | None) -> list[str]:
    """What is known of the models, in lines of plain text.

    Args:
        found: of `models`.
        run: the training's folder, whose ``model.vxs`` says what it was trained on; None: unknown.
    """
    known = [identity for identity in found if identity]
    lines = [f"model {identity}" for identity in known] or ["model: the predictions do not say"]
    if known and "" in found:
        lines.append("some predictions do not say by which model they were made")
    if len(known) > 1:
        lines.append("the cases were predicted by different models")
    if run is None or not (run / "model.vxs").is_file():
        return lines
    from voxelscale.model.bundle import read_bundle

    try:
        bundle = read_bundle(run)
    except VoxelscaleError as error:
        return [*lines, f"{run.name}: {error.message}".replace(f"{run.parent}/", "")]
    if known and bundle.identity not in known:
        lines.append(f"the training shown below made another model: {bundle.identity}")
    lines += [f"{name.replace('_', ' ')}: {_short(value)}" for name, value in bundle.trained.items()]
    return lines


def model_section(lines: list[str]) -> str:
    """The lines of `model_lines` as a block."""
    return (
        '<h2>Model</h2><div class="facts">' + "".join(f"<div>{escape(x)}</div>" for x in lines) + "</div>"
    )


def warnings_of(folder: Path) -> list[str]:
    """What ``findings.json`` says against relying on a case's findings."""
    content = read_json_object(folder / "findings.json").get("warnings", [])
    return [str(text) for text in content] if isinstance(content, list) else []


def classes_in(content: Mapping[str, Any]) -> Classes | None:
    """What ``findings.json`` says that its model distinguishes; None where it does not."""
    try:
        return Classes.from_dict(content["classes"])
    except (KeyError, TypeError, ValueError):
        return None


def _short(value: Any) -> str:
    """A fact of a model for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_short(own)}" for name, own in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(map(_short, value)) if len(value) == 2 else " × ".join(map(_short, value))
    return str(value)
