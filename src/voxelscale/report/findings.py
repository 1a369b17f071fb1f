"""The report without a truth: what was found, where, and how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from voxelscale.classes import Classes
from voxelscale.config import ReadingConfig
from voxelscale.console import count, warn
from voxelscale.dataset import DataSet, Source
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import Finding, read_prediction
from voxelscale.pages.page import cards, legend, notes, write_page
from voxelscale.report.cases import finding_table, read_scans, toggles, view_command
from voxelscale.report.facts import classes_in, head, model_lines, model_section, models, warnings_of
from voxelscale.report.overlays import Place, window_name

MOST_PICTURES = 3
"""Findings of a case that are shown; four pictures each, 100 kB in all."""

MOST_CASES = 50
"""Cases with pictures: a page of them is about 15 MB."""

MOST_ROWS = 30
"""Findings of a case that are listed."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One case that was predicted.

    Attributes:
        source: its scan.
        findings: most confident first.
        warnings: what `voxelscale predict` said of it.
        classes: what its mask distinguishes.
    """

    source: Source
    findings: list[Finding]
    warnings: list[str]
    classes: Classes


def write_findings_page(
    predictions: Path,
    data: DataSet,
    out: Path,
    run: Path | None = None,
) -> None:
    """Write one self-contained HTML page: each case's findings, and slices through the most confident ones.

    Args:
        predictions: ``<case>/mask.nii.gz`` and ``<case>/findings.json``.
        data: the scans that were predicted; those with labels are not looked for.
        out: the page.
        run: the folder of the model's training; None: the page does not say how it was trained.

    Raises:
        VoxelscaleError: no scan without labels was predicted.
    """
    sources = [s for s in data.named_as_in(predictions).scans if not s.labels]
    predicted = [s for s in sources if (predictions / s.case / "findings.json").is_file()]
    if not predicted:
        raise VoxelscaleError(
            f"{predictions}: no prediction of a scan of {data.path}",
            "run voxelscale predict on these scans first",
        )
    cases, failed = [], []
    for source in predicted:
        folder = predictions / source.case
        try:
            findings, content = read_prediction(folder / "findings.json")
        except VoxelscaleError as error:
            failed.append(f"{source.case}: {source.without_paths(error.message)}")
            continue
        classes, warnings = classes_in(content) or source.classes, warnings_of(folder)
        cases.append(Predicted(source=source, findings=findings, warnings=warnings, classes=classes))
    absent = [s.case for s in sources if s not in predicted]
    if absent:
        warn(f"{predictions}: no prediction of {count(len(absent), 'scan')}: {', '.join(absent[:5])}")
    by_name = {one.source.case: one.source for one in cases}
    shown = [_case(one, by_name, predictions, data.reading, number) for number, one in enumerate(cases)]
    found = sum(len(one.findings) for one in cases)
    window = window_name(sources[0].channels[0])
    names = list(
        dict.fromkeys(name for one in cases if not one.classes.single for name in one.classes.names)
    )
    sections = [
        head("Voxelscale findings", [count(len(cases), "scan"), count(found, "finding")], window),
        '<p class="lead">Nothing here was compared with a truth: a reader is to check each finding.</p>',
        _cards(cases),
        notes("Not predicted", absent),
        notes("Cannot be read", [line.replace(f"{predictions}/", "") for line in failed]),
        model_section(model_lines(models(predictions, by_name), run)),
        "<h2>Cases</h2>",
        toggles(["prediction", "mark"], several=bool(names)),
        *([legend(names)] if names else []),
        *shown,
        "<footer>Positions are LPS mm, as in findings.csv: x to the patient's left, y to the back, z to "
        "the head. Diameter: of the sphere of the same volume, in a scan of one slice of the circle of the "
        "same area. "
        f"The {'dashed' if names else 'orange'} line is the predicted mask; a "
        "finding below the threshold has none. The ring marks the finding.</footer>",
    ]
    write_page("Voxelscale findings", sections, out)


def _cards(cases: list[Predicted]) -> str:
    most = max((f.probability for one in cases for f in one.findings), default=None)
    without = sum(not one.findings for one in cases)
    largest = max((f.diameter_mm for one in cases for f in one.findings), default=None)
    return cards(
        [
            ("Scans", str(len(cases)), f"{without} without a finding"),
            ("Findings", str(sum(len(one.findings) for one in cases)), "all confidences"),
            ("Highest confidence", "–" if most is None else f"{most:.3f}", ""),
            ("Largest finding", "–" if largest is None else f"{largest:.1f} mm", "diameter"),
            ("Scans with warnings", str(sum(bool(one.warnings) for one in cases)), ""),
        ]
    )


def _case(
    one: Predicted, sources: dict[str, Source], predictions: Path, reading: ReadingConfig, number: int
) -> str:
    case = one.source.case
    parts = [
        f"<h3>{escape(case)}: {count(len(one.findings), 'finding')}</h3>",
        notes("Warnings", one.warnings, "#ff9f1c"),
    ]
    if not one.findings:
        return "".join(parts)
    parts.append(finding_table(one.findings, MOST_ROWS, f"Findings of {case}"))
    shown = number < MOST_CASES
    scans = read_scans(case, sources, predictions, reading, one.classes) if shown else None
    if number == MOST_CASES:
        parts.append(f'<p class="lead">Only the first {MOST_CASES} cases have pictures.</p>')
    for place, finding in enumerate(one.findings[:MOST_PICTURES] if scans else [], start=1):
        assert scans is not None  # noqa: S101 - there is something to show
        named = f", {finding.label}" if finding.label else ""
        title = f"Finding {place}{named}: confidence {finding.probability:.3f}"
        where = f"({finding.x:.1f}, {finding.y:.1f}, {finding.z:.1f}) mm"
        note = f"diameter {finding.diameter_mm:.1f} mm at {where}"
        at = Place(centre=(finding.x, finding.y, finding.z), diameter_mm=finding.diameter_mm)
        parts.append(scans.block(title, note, at, view_command(case, place)))
    return "".join(parts)
