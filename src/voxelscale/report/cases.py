"""What a report shows of single cases: slices with outlines, and tables of findings."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from voxelscale.classes import Classes
from voxelscale.config import ReadingConfig
from voxelscale.console import warn
from voxelscale.dataset.reading import read_image, read_truth
from voxelscale.dataset.source import Source
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.truth import labels_in
from voxelscale.files import read_json_object
from voxelscale.findings import Finding
from voxelscale.formats import check_same_place
from voxelscale.geometry import Scan, reorient
from voxelscale.pages.page import plain_table
from voxelscale.predict.case import as_predicted
from voxelscale.report.overlays import Place, overlay_views, window_of

LAYERS = {"truth": "#4dd964", "prediction": "#ff9f1c", "mark": "#4cc9f0"}
"""What is drawn over a slice, with its colour, as the page's styles have it."""

FINDING_COLUMNS = (
    "",
    "Confidence",
    "x, y, z (LPS), mm",
    "Diameter, mm",
    "Longest in a slice, mm",
    "Volume, mm³",
    "Mean HU",
)

MISSING = "–"


def toggles(layers: Sequence[str], *, several: bool = False) -> str:
    """Boxes that show or hide what is drawn over the slices.

    Args:
        several: whether classes have colours of their own: truth and prediction differ by their line.
    """
    styles = {name: f"background:{colour}" for name, colour in LAYERS.items()}
    if several:
        lines = (("truth", "solid"), ("prediction", "dashed"))
        styles |= {name: f"height:0;border-top:2px {line} var(--ink)" for name, line in lines}
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}" checked><i style="{styles[name]}"></i>{name}</label>'
        for name in layers
    )
    return f'<div class="toggles" role="group" aria-label="Outlines">{boxes}</div>'


class CaseScans:
    """A case's scan, true mask and predicted mask on one lattice.

    Args:
        source: the case.
        mask: the predicted one's file.
        reading: how the data set is read.
        classes: what the predicted mask distinguishes; None: what the labels do.

    Raises:
        VoxelscaleError: one of them cannot be read, or they do not lie on each other.
    """

    def __init__(
        self, source: Source, mask: Path, reading: ReadingConfig, classes: Classes | None = None
    ) -> None:
        self.image = reorient(read_image(source, reading))
        self.classes = classes or source.classes
        self.channel = source.channels[0]
        self.window = window_of(self.image.array, self.channel)
        self.prediction = labels_in(mask, self.classes)
        check_same_place(mask, self.prediction, source.image, self.image)
        self.truth = Scan(0 * self.prediction.array, self.prediction.affine)
        if source.labels:
            self.truth = read_truth(source, reading)
            check_same_place(source.labels[0], self.truth, source.image, self.image)

    def block(self, title: str, note: str, place: Place | None = None, command: str = "") -> str:
        """Slices in four views with a heading.

        Args:
            title, note: plain text.
            place: where to look, with a ring around it; None: where the lesion is largest.
            command: what shows them in the viewer; "": is not said.
        """
        views = overlay_views(self.image, self.truth, self.prediction, place, self.classes, self.window)
        style = "case at" if place else "case"
        below = f"<small>In the viewer: <code>{escape(command)}</code></small>" if command else ""
        drawn = "".join(f"<div>{svg}{escape(caption)}</div>" for caption, svg in views)
        return (
            f'<div class="{style}"><h3>{escape(title)}<small>{escape(note)}</small></h3>'
            f'<div class="views">{drawn}</div>'
            f"{below}</div>"
        )


def view_command(case: str, finding: int = 0) -> str:
    """The command that opens the viewer at a case and finding; folders are not named in a report."""
    which = f" --finding {finding}" if finding else ""
    return f"voxelscale view PREDICTIONS SCANS --case {shlex.quote(case)}{which}"


def read_scans(
    case: str,
    sources: dict[str, Source],
    predictions: Path,
    reading: ReadingConfig,
    classes: Classes | None = None,
) -> CaseScans | None:
    """A case's scans; None, with a warning, where they cannot be shown."""
    source = sources.get(case)
    if source is None:
        warn(f"no picture of {case}: the scans have no such case")
        return None
    folder = predictions / case
    reading = as_predicted(reading, read_json_object(folder / "findings.json"))
    try:
        return CaseScans(source, folder / "mask.nii.gz", reading, classes)
    except VoxelscaleError as error:
        warn(f"no picture of {case}: {error.message}")
        return None


def confidence(finding: Finding) -> str:
    """A finding's confidence with a bar, HTML."""
    return meter(finding.probability) + f"{finding.probability:.3f}"


def meter(share: float) -> str:
    """A bar for a share of 1, HTML."""
    return f'<span class="meter"><i style="width:{100 * min(max(share, 0.0), 1.0):.0f}%"></i></span>'


def finding_table(findings: Sequence[Finding], most: int, label: str) -> str:
    """The findings, most confident first, at most so many; how many more there are stands below."""
    rows = [
        [
            str(number),
            confidence(f),
            f"{f.x:.1f}, {f.y:.1f}, {f.z:.1f}",
            f"{f.diameter_mm:.1f}",
            f"{f.axial_diameter_mm:.1f}",
            f"{f.volume_mm3:,.0f}",
            MISSING if f.mean_hu is None else f"{f.mean_hu:.0f}",
        ]
        for number, f in enumerate(findings[:most], start=1)
    ]
    columns = list(FINDING_COLUMNS)
    if any(f.label for f in findings):
        columns.insert(1, "Class")
        for row, finding in zip(rows, findings, strict=False):
            row.insert(1, escape(finding.label))
    return plain_table(columns, rows, label) + further(len(findings) - most, "findings.json")


def further(left: int, file: str) -> str:
    """How many findings a table leaves out, and where they are; "" where it has all."""
    if left <= 0:
        return ""
    return f'<p class="lead">{left:,} further, less confident ones are in {escape(file)}.</p>'
