"""A case's findings on one printed page, A4, for a patient's record: one HTML file that loads nothing.

The patient is named only if asked for; otherwise the page bears the case's name. It does not say when it
was made, so that the same prediction gives the same page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from voxelscale.dicom_out.objects import MANUFACTURER, Algorithm
from voxelscale.dicom_out.original import NO_DATE, Original
from voxelscale.findings import Finding
from voxelscale.pages.page import notes, page_of, plain_table
from voxelscale.report.cases import CaseScans, confidence, further
from voxelscale.report.overlays import Place, window_name

MOST_ROWS, MOST_PICTURES, MOST_WARNINGS = 8, 3, 2
"""Findings that are listed, findings that are shown, warnings: what one page has room for."""

LONGEST_WARNING = 150
"""Characters."""

COLUMNS = ("", "Confidence", "x, y, z (LPS), mm", "Long × short axis, mm", "Volume, mm³", "Mean HU")
MISSING = "–"

STYLE = """<style>
@page { size: A4 portrait; margin: 10mm; }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb; }
  body { font-size: 9.5pt; line-height: 1.3; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } h1 { font-size: 15pt; } h2 { margin: 8pt 0 4pt; font-size: 11pt; }
  th, td { padding: 1.5pt 6pt; } th { font-size: 8.5pt; } .meter { width: 34pt; }
  .lead { margin: 2pt 0 6pt; } .warn { margin-top: 4pt; padding: 3pt 8pt; }
  footer { margin-top: 6pt; font-size: 8pt; }
  .case { padding: 4pt 6pt; margin-bottom: 4pt; } .case h3 { margin-bottom: 2pt; font-size: 9.5pt; }
  .views { grid-template-columns: repeat(4, 1fr); gap: 4pt; } .views div { font-size: 7pt; }
  svg.slice { max-height: 26mm; } .wide { overflow: visible; }
}
</style>"""


def case_page(
    original: Original,
    findings: Sequence[tuple[int, str, Finding]],
    facts: Mapping[str, Any],
    scans: CaseScans,
    algorithm: Algorithm,
    *,
    named: bool,
) -> str:
    """The page's HTML.

    Args:
        findings: rank, class and measures of those that the mask has, most confident first.
        facts: what ``findings.json`` says.
        scans: for the pictures.
        named: whether the patient is.
    """
    title = f"{MANUFACTURER}: findings of {original.case}"
    shown = [_picture(scans, *one) for one in findings[:MOST_PICTURES]]
    sections = [
        STYLE,
        f"<h1>{escape(f'Findings by {MANUFACTURER}, for research')}</h1>",
        f'<p class="lead">{escape(_about(original, algorithm, named=named))}</p>',
        notes("Not for diagnosis", ["Found by a program and checked by no one. No medical device."]),
        notes("Warnings", _warnings(facts), "#ff9f1c"),
        "<h2>Findings</h2>",
        _table(findings) if findings else "<p>Nothing was found.</p>",
        further(len(findings) - MOST_ROWS, "findings.json"),
        *shown,
        "<footer>Positions are LPS mm: x to the patient's left, y to the back, z to the head. Axes are the "
        "longest in an axial slice and the longest across it. Confidence is the program's own, 0 to 1. "
        f"Pictures: {escape(window_name(scans.channel))}; the patient's right is on the left.</footer>",
    ]
    return page_of(title, sections)


def _about(original: Original, algorithm: Algorithm, *, named: bool) -> str:
    said = [f"case {original.case}"]
    if named:
        about = original.about
        said = [
            about["PatientName"].replace("^", " ").strip() or "no name",
            f"ID {about['PatientID'] or MISSING}",
        ]
        said.append(f"born {_date(about['PatientBirthDate'])}")
        if original.date != NO_DATE:
            said.append(f"study of {_date(original.date)}")
    said.append(f"{original.modality}, {len(original.frames)} slices")
    said.append(f"voxelscale {algorithm.version}")
    return " · ".join([*said, f"model {algorithm.model or MISSING}"])


def _date(text: str) -> str:
    return f"{text[:4]}-{text[4:6]}-{text[6:]}" if text else MISSING


def _warnings(facts: Mapping[str, Any]) -> list[str]:
    found = facts.get("warnings", [])
    texts = [str(text)[:LONGEST_WARNING] for text in found[:MOST_WARNINGS]]
    left = len(found) - len(texts)
    return [*texts, *([f"and {left} more in findings.json"] if left > 0 else [])]


def _table(findings: Sequence[tuple[int, str, Finding]]) -> str:
    rows = []
    for rank, name, f in findings[:MOST_ROWS]:
        short = MISSING if f.short_axis_mm is None else f"{f.short_axis_mm:.1f}"
        rows.append(
            [
                escape(f"{name} {rank}"),
                confidence(f),
                f"{f.x:.1f}, {f.y:.1f}, {f.z:.1f}",
                f"{f.axial_diameter_mm:.1f} × {short}",
                f"{f.volume_mm3:,.0f}",
                MISSING if f.mean_hu is None else f"{f.mean_hu:.0f}",
            ]
        )
    return plain_table(COLUMNS, rows, "Findings")


def _picture(scans: CaseScans, rank: int, name: str, finding: Finding) -> str:
    place = Place(centre=(finding.x, finding.y, finding.z), diameter_mm=finding.diameter_mm)
    return scans.block(f"{name} {rank}", f"confidence {finding.probability:.3f}", place)
