"""Files as tools write them, stores that notice changes, outputs that cannot be written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from tests.conftest import Command, read_pair

from voxelscale.config import PrepareConfig, ReadingConfig
from voxelscale.dataset.listing import Source, list_scans, list_sources
from voxelscale.dataset.reading import read_case, read_truth
from voxelscale.dataset.stamps import label_stamp, source_stamp
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output, write_sealed
from voxelscale.formats import WRITTEN, files_of, read_label, read_scan, write_scan
from voxelscale.geometry import Scan
from voxelscale.store import Store, case_path, open_case, open_store, write_case
from voxelscale.store.lesions import resample_labels
from voxelscale.store.prepare import prepare_case

Reported = Callable[..., Path]
ALL_TRAIN = ("prepare.workers=1", "prepare.plan=false", "prepare.split=[1,0,0]", "prepare.spacing=[2,1,1]")

WRITERS = {
    "phantom": ["{out}"],
    "prepare": ["no_data", "{out}"],
    "inspect": ["no_data", "--out", "{out}"],
    "train": ["no_store", "{out}"],
    "search": ["no_store", "{out}"],
    "search report": ["{out}"],
    "scale": ["no_store", "{out}"],
    "predict": ["no_model", "no_scans", "{out}"],
    "refine": ["{out}", "no_store"],
    "ensemble": ["a.vxs", "b.vxs", "--out", "{out}"],
    "evaluate": ["no_predictions", "no_data", "--out", "{out}"],
    "calibrate": ["{out}", "no_predictions", "no_data"],
    "compare": ["a", "b", "no_data", "--out", "{out}"],
    "froc": ["a.csv", "--annotations", "b.csv", "--series", "c.csv", "--out", "{out}"],
    "report": ["a", "no_data", "--out", "{out}"],
    "quickstart": ["{out}"],
}
"""Every command that writes, with its output; every input is missing, so that the output must be first."""


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that even the superuser cannot write."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=False).returncode:
        pytest.skip("mounting a read-only folder is not permitted")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def run_writer(voxelscale: Command, verb: str, out: Path) -> str:
    arguments = [word.format(out=out) for word in WRITERS[verb]]
    code, _, errors = voxelscale(*verb.split(), *arguments)
    assert code == 2
    return errors


@pytest.mark.parametrize("verb", WRITERS)
def test_an_output_below_a_file_is_refused_first(tmp_path: Path, voxelscale: Command, verb: str) -> None:
    (tmp_path / "file").write_text("mine")
    errors = run_writer(voxelscale, verb, tmp_path / "file" / "deep" / "out")
    assert errors.startswith(f"error: {tmp_path / 'file' / 'deep'}")
    assert "cannot be written (Not a directory)" in errors
    assert len(errors.splitlines()) == 2
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", WRITERS)
def test_an_output_on_a_read_only_disk_is_refused_first(
    read_only: Path, voxelscale: Command, verb: str
) -> None:
    errors = run_writer(voxelscale, verb, read_only / "out")
    assert errors.startswith(f"error: {read_only}")
    assert "cannot be written (Read-only file system)" in errors
    assert len(errors.splitlines()) == 2


def test_an_output_of_the_wrong_kind_is_refused(tmp_path: Path, voxelscale: Command) -> None:
    (tmp_path / "file").write_text("mine")
    for verb in ("prepare", "predict", "train"):
        assert "a file, not a folder" in run_writer(voxelscale, verb, tmp_path / "file")
    for verb in ("inspect", "ensemble", "compare", "report"):
        assert "a folder, not a file" in run_writer(voxelscale, verb, tmp_path)
    assert "not a regular file" in run_writer(voxelscale, "report", Path("/dev/null"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("file", [False, True])
def test_looking_at_an_output_leaves_nothing_there(tmp_path: Path, file: bool) -> None:
    check_output(tmp_path / "new" / "out", file=file)
    assert not list(tmp_path.iterdir())


def prepare(voxelscale: Command, data: Path, store: Path, *sets: str) -> tuple[Store, str]:
    """The store that a command made, and what it said."""
    options = [word for key in (*ALL_TRAIN, *sets) for word in ("--set", key)]
    code, out, errors = voxelscale("prepare", data, store, *options)
    assert code == 0, errors
    return open_store(store), out + errors


def voxels_of(store: Store) -> list[int]:
    """Voxels of lesions in each case."""
    return [int(store.read(info.case)[1].sum()) for info in store.cases]


def prepared(data: Path, labels: tuple[int, ...] | None = None) -> list[int]:
    """Voxels of lesions in each case of a data set, prepared in this process."""
    reading, out = ReadingConfig(labels=labels), data.parent / "prepared"
    infos = [
        prepare_case(source, PrepareConfig(), out, (2, 1, 1), reading) for source in list_sources(data)
    ]
    return [int(open_case(out, info.case)[1].sum()) for info in infos]


def test_a_store_knows_that_data_files_changed(reported: Reported, voxelscale: Command) -> None:
    folder = reported("raw_replaced")
    store, _ = prepare(voxelscale, folder / "set.csv", folder / "s")
    assert voxels_of(store) == [280]
    reported("raw_replaced", "second")
    store, said = prepare(voxelscale, folder / "set.csv", folder / "s")
    assert "kept" not in said
    assert voxels_of(store) == [18]
    hu = store.read("image")[0]
    assert (hu.min(), hu.max()) == (-500, 560)
    assert "1 of them kept from before" in prepare(voxelscale, folder / "set.csv", folder / "s")[1]


def pair(folder: Path, kind: str) -> tuple[Path, Path]:
    """A scan in two files: its header, and the file of its voxels."""
    folder.mkdir(parents=True, exist_ok=True)
    array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    image = sitk.GetImageFromArray(array)
    ends = {".mhd": ".raw", ".mhd packed": ".zraw", ".nhdr": ".raw", ".hdr": ".img", ".hdr.gz": ".img.gz"}
    header = folder / f"a{kind.split()[0]}"
    if kind == ".hdr.gz":
        nib.save(nib.Nifti1Pair(array.T, np.eye(4)), folder / "a.hdr")
        for name in ("a.hdr", "a.img"):
            subprocess.run(["gzip", folder / name], check=True)
    else:
        sitk.WriteImage(image, str(header), useCompression=kind.endswith("packed"))
    data = folder / f"a{ends[kind]}"
    if kind == ".nhdr" and not data.is_file():
        data = folder / "a.raw.gz"
    return header, data


PAIRS = [".mhd", ".mhd packed", ".nhdr", ".hdr", ".hdr.gz"]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_header_is_known_with_its_data_file(tmp_path: Path, kind: str) -> None:
    header, data = pair(tmp_path, kind)
    assert set(files_of(header)) == {header, data}
    source = Source(case="a", patient="a", image=header, labels=(header,))
    before = source_stamp(source), label_stamp(source)
    times = data.stat().st_atime_ns, data.stat().st_mtime_ns
    data.write_bytes(data.read_bytes()[:-1] + b"x")  # the same size
    os.utime(data, ns=times)  # and the same time
    after = source_stamp(source), label_stamp(source)
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("kind", PAIRS)
def test_data_files_are_no_cases(tmp_path: Path, kind: str) -> None:
    for folder in ("images", "labels", "loose"):
        header, _ = pair(tmp_path / folder, kind)
    assert [s.case for s in list_sources(tmp_path)] == ["a"]
    assert [s.labels for s in list_sources(tmp_path)] == [(tmp_path / "labels" / header.name,)]
    assert [(s.case, s.image) for s in list_scans(tmp_path / "loose")] == [("a", header)]
    expected = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    assert np.array_equal(read_scan(header).array, expected)


def test_lists_of_data_files_are_known_and_are_no_cases(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        header, data = pair(tmp_path / folder, ".mhd")
        voxels = data.read_bytes()
        data.unlink()
        parts = [header.with_name(f"slice{n}.raw") for n in range(4)]
        for n, part in enumerate(parts):
            part.write_bytes(voxels[n * 60 : (n + 1) * 60])
        text = header.read_text().replace("a.raw", "LIST\n" + "\n".join(p.name for p in parts))
        header.write_text(text)
        assert files_of(header) == (header, *parts)
    assert [s.case for s in list_sources(tmp_path)] == ["a"]


def test_a_data_set_that_is_copied_with_its_times_stays_known(tmp_path: Path) -> None:
    header, data = pair(tmp_path / "one", ".mhd")
    (tmp_path / "two").mkdir()
    for file in (header, data):
        shutil.copy2(file, tmp_path / "two")
    stamps = [
        source_stamp(Source(case="a", patient="a", image=tmp_path / place / header.name))
        for place in ("one", "two")
    ]
    assert stamps[0] == stamps[1]


def test_two_labels_of_one_name_are_reported(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        pair(tmp_path / folder, ".mhd")
    pair(tmp_path / "labels", ".hdr")
    (source,) = list_sources(tmp_path)
    assert source.fault == "2 labels have its name: a.hdr, a.mhd"


@pytest.mark.parametrize("kind", ["meta", "nrrd"])
def test_folders_of_headers_and_raw_files(reported: Reported, kind: str) -> None:
    assert prepared(reported("labels_mhd_raw") / kind) == [280, 280]


def test_a_mask_that_nibabel_scaled(reported: Reported) -> None:
    assert prepared(reported("label_scaled_by_nibabel"), (2,)) == [280]


@pytest.mark.parametrize("kind", [".nii.gz", ".mha", ".nrrd"])
def test_masks_of_floats(tmp_path: Path, kind: str) -> None:
    array = np.zeros((4, 5, 6), np.float32)
    array[1, 2, 3], array[2, 2, 2] = 1.0005, 1.9995
    write_scan(Scan(array, np.eye(4)), tmp_path / f"a{kind}")
    assert sorted(read_label(tmp_path / f"a{kind}").array[array > 0]) == [1, 2]
    array[1, 2, 3] = 0.99
    write_scan(Scan(array, np.eye(4)), tmp_path / f"b{kind}")
    with pytest.raises(VoxelscaleError, match="a mask with fractions"):
        read_label(tmp_path / f"b{kind}")


def test_a_lesion_that_vanishes_is_reported(reported: Reported, voxelscale: Command) -> None:
    folder = reported("small_lesion_vanishes")
    store, said = prepare(voxelscale, folder, folder / "s", "prepare.spacing=[3,3,3]")
    (info,) = store.cases
    assert len(info.lesion_volumes_mm3) == 3
    # Voxels of 3 mm have their centres at 1, 4, 7 ...; the nodule of slices 50 and 51 meets none.
    assert info.lost == ({"volume_mm3": 8.0, "diameter_mm": 2.48, "centre": [11.5, -19.5, 20.5]},)
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert "lost: 1 lesion: 2.5 mm at (11.5, -19.5, 20.5)" in warning
    assert "prepare.keep_small=true" in warning
    # Kept from before, it is said again.
    assert warning in prepare(voxelscale, folder, folder / "s", "prepare.spacing=[3,3,3]")[1]


def test_a_lesion_that_vanishes_is_kept_where_asked(reported: Reported, voxelscale: Command) -> None:
    folder = reported("small_lesion_vanishes")
    sets = ("prepare.spacing=[3,3,3]", "prepare.keep_small=true")
    store, said = prepare(voxelscale, folder, folder / "s", *sets)
    (info,) = store.cases
    assert len(info.lesion_volumes_mm3) == 4
    assert "warning" not in said
    mask = store.read(info.case)[1]
    # Its centre lies between voxels: which of them is fullest is a tie.
    at = info.grid.mm_to_index(info.lost[0]["centre"])
    kept = np.argwhere(mask)
    assert (np.abs(kept - at).max(axis=1) <= 0.5 + 1e-6).sum() == 1


def test_lesions_merged_and_cut_by_resampling_are_counted() -> None:
    mask = np.zeros((12, 12, 24), np.uint8)
    mask[3:9, 3:9, 3:9] = mask[3:9, 3:9, 10:16] = 1  # a voxel apart: one lesion at 4 mm
    mask[5, 5, 18], mask[5, 5, 19], mask[5, 5, 20] = 1, 1, 1
    scan = Scan(mask, np.eye(4))
    made = resample_labels(scan, scan.grid.with_spacing((4, 4, 4)))
    assert (len(made.lesions), made.merged, len(made.lost)) == (1, 2, 1)
    thin = np.zeros((12, 12, 12), np.uint8)
    # A thread that leaves the centres of the coarse voxels (2, 6, 10) and comes back.
    thin[2, 2, :5] = thin[2:5, 2, 4] = thin[4, 2, 4:9] = thin[2:5, 2, 8] = thin[2, 2, 8:] = 1
    scan = Scan(thin, np.eye(4))
    assert resample_labels(scan, scan.grid.with_spacing((4, 4, 4))).cut == 1


@pytest.mark.parametrize(("part", "voxels"), [("two/set.csv", 428), ("cropped/set.csv", 280), ("one", 280)])
def test_segmentations_of_3d_slicer(
    reported: Reported, capsys: pytest.CaptureFixture[str], part: str, voxels: int
) -> None:
    data = reported("slicer_segmentation") / part
    assert prepared(data) == [voxels]
    assert "warning" not in capsys.readouterr().err
    (source,) = list_sources(data)
    assert source.case == "a"
    shutil.copy(source.labels[0], source.image.parent)  # as 3D Slicer saves it
    assert [scan.image for scan in list_scans(source.image.parent)] == [source.image]
    assert read_truth(source, ReadingConfig()).array.sum() == voxels


def test_segments_are_chosen_by_number(reported: Reported) -> None:
    folder = reported("slicer_segmentation") / "two"
    image, label = folder / "images" / "a.nrrd", folder / "labels" / "a.seg.nrrd"
    first, second = (read_pair(image, label, (number,))[1].array for number in (1, 2))
    # Both layers use the value 1, and the segments overlap: each is whole all the same.
    assert first.sum() == second.sum() == 280
    assert np.array_equal(second, np.roll(first, 3, axis=2))
    with pytest.raises(VoxelscaleError, match="no voxel of the values"):
        read_pair(image, label, (3,))
    with pytest.raises(VoxelscaleError, match="a segmentation, not a scan"):
        read_scan(label)


def slicer_file(path: Path, values: Sequence[tuple[int, int] | None], array: NDArray[Any]) -> Path:
    """A .seg.nrrd of (layer, value) of each segment, None where an old version does not say."""
    layers = array.ndim == 4
    sizes = " ".join(map(str, reversed(array.shape)))
    lines = ["NRRD0004", "type: unsigned char", f"dimension: {array.ndim}"]
    lines += ["space: left-posterior-superior", f"sizes: {sizes}"]
    lines += [f"space directions: {'none ' * layers}(1,0,0) (0,1,0) (0,0,1)", "encoding: raw"]
    lines += ["space origin: (0,0,0)"]
    for number, place in enumerate(values):
        lines += [f"Segment{number}_ID:=S{number}"]
        if place is not None:
            lines += [f"Segment{number}_Layer:={place[0]}", f"Segment{number}_LabelValue:={place[1]}"]
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + array.astype(np.uint8).tobytes())
    return path


def test_segments_that_overlap_are_classes_or_regions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = np.zeros((4, 5, 6, 2), np.uint8)
    layers[1:3, 1:4, 1:4, 0] = layers[1:3, 2:4, 2:5, 1] = 1
    label = slicer_file(tmp_path / "a.seg.nrrd", [(0, 1), (1, 1)], layers)
    image = tmp_path / "a.nrrd"
    write_scan(Scan(np.zeros((4, 5, 6), np.int16), np.eye(4)[:, [2, 1, 0, 3]]), image)
    one, two = (layers[..., layer] > 0 for layer in (0, 1))

    def stored(labels: dict[str, int], order: tuple[int, ...] = ()) -> NDArray[Any]:
        reading = ReadingConfig(labels=labels, regions_class_order=order)
        source = Source(case="a", patient="a", image=image, labels=(label,))
        made = read_case(source, reading)[1].mask.array
        assert np.array_equal(read_truth(source, reading).array, made)
        return made

    assert np.array_equal(stored({"whole": 1, "core": 2}, (1, 2)), one + 2 * two)
    assert "warning" not in capsys.readouterr().err
    assert np.array_equal(stored({"b": 2, "a": 1}), np.where(one, 2, two)), "the later class, not segment"
    assert "a.seg.nrrd: classes overlap in 8 voxels" in capsys.readouterr().err


def test_label_values_of_segments(tmp_path: Path) -> None:
    array = np.zeros((4, 5, 6), np.uint8)
    array[1, 1, 1], array[2, 2, 2] = 7, 3
    mask = read_label(slicer_file(tmp_path / "a.seg.nrrd", [(0, 7), (0, 3)], array))
    assert np.array_equal(mask.array, array)  # their own values, as every reader sees them
    layers = np.zeros((4, 5, 6, 2), np.uint8)
    layers[1, 1, 1, 0] = layers[2, 2, 2, 1] = 1
    old = read_label(slicer_file(tmp_path / "b.seg.nrrd", [None, None], layers)).array
    assert (old[1, 1, 1], old[2, 2, 2], (old > 0).sum()) == (1, 2, 2)
    for places, problem in (([(2, 1)], "layer 2, of 2"), ([(0, 1), (0, 1)], "share one value")):
        with pytest.raises(VoxelscaleError, match=problem):
            read_label(slicer_file(tmp_path / "c.seg.nrrd", places, layers))


def boxes(
    tmp_path: Path, kind: str, start: Sequence[float], shape: tuple[int, int, int]
) -> tuple[Path, Path]:
    """An image, and a mask on another box of its lattice."""
    image = Scan(np.full((10, 12, 14), -800, np.int16), np.diag([2.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]])
    mask = np.zeros(shape, np.uint8)
    mask[1, 2, 3] = mask[-1, -1, -1] = 1
    paths = tmp_path / f"image{kind}", tmp_path / f"mask{kind}"
    write_scan(image, paths[0])
    affine = image.affine.copy()
    affine[:3, 3] = image.grid.index_to_mm(start)
    write_scan(Scan(mask, affine), paths[1])
    return paths


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_mask_of_a_part_of_the_image(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, mask = read_pair(*boxes(tmp_path, kind, (2, 3, 4), (4, 5, 6)))
    assert np.argwhere(mask.array).tolist() == [[3, 5, 7], [5, 7, 9]]
    assert "6 x 5 x 4 voxels that begin at voxel (4, 3, 2) of the 14 x 12 x 10" in capsys.readouterr().err
    _, mask = read_pair(*boxes(tmp_path, kind, (2, -1, 0), (14, 14, 16)))
    assert np.argwhere(mask.array).tolist() == [[3, 1, 3]]
    assert "1 of 2 voxels lie outside image" in capsys.readouterr().err


def test_a_mask_a_slice_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError, match=r"lies up to 2\.00 mm away"):
        read_pair(*boxes(tmp_path, ".nrrd", (1, 0, 0), (10, 12, 14)))


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        ((40, 0, 0), "lies outside image"),
        ((0, 0, 0), "6 x 5 x 4 voxels, but"),
        ((0.5, 3, 4), "voxels, but"),
    ],
)
def test_a_mask_of_another_place_is_refused(tmp_path: Path, start: Sequence[float], problem: str) -> None:
    # With the first voxel in common it may be another scan's, whose position was lost.
    with pytest.raises(VoxelscaleError, match=problem):
        read_pair(*boxes(tmp_path, ".nrrd", start, (4, 5, 6)))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may be longer, as by ``ulimit -f``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise() -> Scan:
    random = np.random.default_rng(0)
    return Scan(random.integers(-1000, 400, (20, 40, 40)).astype(np.int16), np.eye(4))


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_scan_that_is_cut_replaces_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a{kind}"
    write_scan(noise(), path)
    whole = path.read_bytes()
    other = Scan(noise().array[::-1].copy(), np.eye(4))
    for size in (len(whole) - 100, len(whole) // 2, 100, 0):
        with largest_file(size), pytest.raises(VoxelscaleError, match="cannot be written"):
            write_scan(other, path)
        assert path.read_bytes() == whole
        assert list(tmp_path.iterdir()) == [path]


def test_a_case_that_is_cut_replaces_nothing(tmp_path: Path, store: Store) -> None:
    info = store.cases[0]
    image, mask = store.read(info.case)
    write_case(tmp_path, info, image, mask, [])
    path = case_path(tmp_path, info.case)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 200, len(whole) // 2, 100, 0):
        with largest_file(size), pytest.raises(VoxelscaleError, match="cannot be written"):
            write_case(tmp_path, info, image + 1, mask, [])
        assert path.read_bytes() == whole
        assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_that_is_cut_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_sealed(path, b"whole" * 1000)
    whole = path.read_bytes()
    with largest_file(4096), pytest.raises(VoxelscaleError, match="cannot be written"):
        write_sealed(path, b"other" * 1000)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("cold_starts")  # limits are those of the process that starts another
def test_phantoms_under_a_limit_of_file_size(tmp_path: Path, voxelscale: Command) -> None:
    small = ["phantom.spacing=[5,4,4]", "phantom.size_mm=[180,200,260]", "phantom.diameter_mm=[14,30]"]
    options = [word for key in (*small, "prepare.workers=1") for word in ("--set", key)]
    arguments = ["phantom", str(tmp_path / "lim"), "--cases", "1", *options]
    command = [sys.executable, "-m", "voxelscale.cli", *arguments]
    with largest_file(40_000):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, errors = done.returncode, done.stderr
    assert code == 2
    assert "cannot be written" in errors
    assert "Traceback" not in errors
    assert "NWAD" not in errors  # what ITK prints by itself
    left = [path.name for path in (tmp_path / "lim").rglob("*") if path.is_file()]
    assert left in ([], ["phantom.json"])  # a small one, and whole
    code, _, errors = voxelscale(*arguments)
    assert code == 0, errors
