"""Scans that a model was not made for: `predict` refuses them, or warns beside the findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import SHARED, Command
from tests.formats.test_formats import write_series

from voxelscale.config import Config, ReadingConfig
from voxelscale.console import set_verbosity
from voxelscale.dataset.listing import Source, list_sources
from voxelscale.dataset.reading import read_case
from voxelscale.findings import components, read_prediction
from voxelscale.findings.depth import lung_depth, outside_mm
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan, reorient
from voxelscale.lungs import lung_field
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, read_bundle, write_bundle
from voxelscale.predict.predictor import LUNG_MARGIN_MM, Predictor
from voxelscale.samples.batch import Normalisation
from voxelscale.store import Store
from voxelscale.store.plausible import TrainedOn, about, against, compared, looks_like_labels, remarks
from voxelscale.train.loop import _write_bundle

Change = Callable[[NDArray[np.int16]], NDArray[np.int16]]
SPACING = (5.0, 4.0, 4.0)
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")


def untrained(config: Config, **trained: object) -> Bundle:
    torch.manual_seed(0)
    network = build_model(config.model, config.data.patch_size, SPACING)
    return Bundle(
        config=config,
        weights=network.state_dict(),
        spacing=SPACING,
        normalisation=Normalisation(low=-1000.0, high=400.0, mean=-400.0, std=300.0),
        trained=dict(trained),
    )


@pytest.fixture
def model(tiny: Config, store: Store, tmp_path: Path) -> Path:
    """A network that was not trained, but says that it was on the tiny phantoms."""
    write_bundle(tmp_path / "model.vxs", untrained(tiny, data_set=store.kept_by_model))
    return tmp_path / "model.vxs"


def phantom(scans: Path) -> Scan:
    return read_scan(list_sources(scans)[0].image)


def as_ct(kept: dict[str, object], **changes: object) -> TrainedOn:
    """What a model of the tiny phantoms says, with some of it changed."""
    facts = TrainedOn.of(kept)
    assert facts is not None
    return replace(facts, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a model was trained on


def test_a_store_and_its_models_keep_what_the_scans_are(tiny: Config, store: Store, tmp_path: Path) -> None:
    network = build_model(tiny.model, tiny.data.patch_size, store.spacing)
    _write_bundle(tmp_path / "model.vxs", tiny, store, network, {"samples": 1})
    bundle = read_bundle(tmp_path / "model.vxs")
    (facts,) = bundle.trained_on
    assert facts is not None
    training = [info for info in store.cases if info.split == "train"]
    assert (facts.cases, facts.lungs, facts.synthetic) == (len(training), 1, 1)
    assert facts.chest
    assert facts.ct
    assert bundle.of_chests
    steps = np.array([info.source_spacing for info in training])
    assert np.allclose(facts.spacing, [steps.min(axis=0), steps.max(axis=0)], atol=1e-4)
    assert bundle.trained["data_set"]["lesion_hu"] == store.fingerprint["lesion_hu"]
    extents = [np.multiply(info.shape, info.grid.spacing) for info in training]
    assert facts.extent_mm[1] == pytest.approx(np.max(extents, axis=0), abs=0.1)
    lowest = min(info.scan["values"][0] for info in training)
    assert facts.values[0][0] == pytest.approx(lowest, abs=1e-3)


def test_stores_and_models_of_older_versions(tiny: Config, store: Store) -> None:
    old = {name: value for name, value in store.kept_by_model.items() if name != "scans"}
    for kept in (None, {}, old, {**old, "scans": {}}, {**old, "scans": {"known": 0}}, [1], "x"):
        assert TrainedOn.of(kept) is None
    bundle = untrained(tiny)
    assert bundle.trained_on == (None,)
    assert not bundle.of_chests


# ---------------------------------------------------------------- refused


def mask_of(scan: NDArray[np.int16]) -> NDArray[np.int16]:
    return (scan > 0).astype(np.int16)


def labels_of(scan: NDArray[np.int16]) -> NDArray[np.int16]:
    return np.digitize(scan, [-900, -600, -300, 20, 200]).astype(np.int16) * 23


def grey_levels(scan: NDArray[np.int16]) -> NDArray[np.int16]:
    return (np.clip(scan + 1000, 0, 2000) * (255 / 2000)).astype(np.int16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (mask_of, "a mask or a label map"),
        (lambda scan: labels_of(np.repeat(scan, 6, axis=2)), "a mask or a label map"),
        (grey_levels, "grey levels"),
        (lambda scan: np.clip(scan + 1024, 0, None), "rescale intercept"),
        (lambda scan: scan[:2], "too few slices"),
        (lambda scan: np.full_like(scan, -1000), "every voxel is -1000"),
    ],
    ids=["mask", "label map", "picture", "no intercept", "two slices", "one value"],
)
def test_what_is_no_scan_for_the_model_is_refused(
    voxelscale: Command, model: Path, scans: Path, tmp_path: Path, change: Change, words: str
) -> None:
    scan = phantom(scans)
    write_scan(Scan(change(scan.array).astype(np.int16), scan.affine), tmp_path / "odd.nii.gz")
    code, out, err = voxelscale("predict", model, tmp_path / "odd.nii.gz", tmp_path / "out")
    assert code == 2
    assert words in err
    assert "predict.refuse_unusable=false" in err
    assert "0 findings" not in out
    assert not (tmp_path / "out" / "odd").exists()
    insist = ["--set", "predict.refuse_unusable=false"]
    code, _, err = voxelscale("-q", "predict", model, tmp_path / "odd.nii.gz", tmp_path / "out", *insist)
    assert code == 0
    assert err.startswith("warning: odd: ")
    _, facts = read_prediction(tmp_path / "out" / "odd" / "findings.json")
    assert any(words in text for text in facts["warnings"])


@real
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lung_tumour/lung1_label.nrrd", "a mask or a label map"),
        ("totalsegmentator/example_seg.nii.gz", "a mask or a label map"),
        ("thorax_small/crop_ct_2slices.nrrd", "too few slices"),
    ],
)
def test_real_masks_and_two_slices_are_refused(
    voxelscale: Command, model: Path, tmp_path: Path, path: str, words: str
) -> None:
    code, out, err = voxelscale("predict", model, SHARED / path, tmp_path / "out")
    assert (code, out) == (2, "")
    assert words in err


@real
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("thorax_small/ct-64.nrrd", []),
        ("thorax_small/ct-64Dicom", []),
        ("totalsegmentator/example_ct_sm.nii.gz", []),
        ("lidc/LIDC-IDRI-0002/ct", ["covers 15 mm along z"]),
        ("totalsegmentator/example_ct_dicom", ["no lungs found", "covers 40 mm along z"]),
    ],
)
def test_real_cts_are_not_refused(
    voxelscale: Command, model: Path, tmp_path: Path, path: str, words: list[str]
) -> None:
    """Cropped ones, and one of the abdomen, get a warning."""
    code, out, err = voxelscale("-q", "predict", model, SHARED / path, tmp_path / "out")
    assert code == 0, err
    (case,) = (folder for folder in (tmp_path / "out").iterdir() if folder.is_dir())
    _, facts = read_prediction(case / "findings.json")
    for expected in ["synthetic scans only", *words]:
        assert any(expected in text for text in facts["warnings"]), facts["warnings"]
        assert err.count(expected) == 1
    assert facts["lungs"]["found"] == ("no lungs found" not in words)
    assert ("in and around the lungs" in out) == facts["lungs"]["found"]


@real
def test_masks_and_scans_are_distinguished() -> None:
    """Of every real data set there is."""
    for folder in ("lidc_nodule_cubes", "lidc_nodule_vois", "msd_hippocampus"):
        images, labels = ("imagesTr", "labelsTr") if "msd" in folder else ("images", "labels")
        for path in sorted((SHARED / folder / images).iterdir())[:5]:
            assert not looks_like_labels(read_scan(path).array), path
        for path in sorted((SHARED / folder / labels).iterdir())[:5]:
            assert looks_like_labels(read_scan(path).array), path


@real
def test_other_modalities_are_not_held_against_hounsfield_units(
    voxelscale: Command, tiny: Config, tmp_path: Path
) -> None:
    """MRI of the hippocampus: no value below 0, some scans within 0 to 255, 35 mm along x."""
    images = sorted((SHARED / "msd_hippocampus" / "imagesTr").iterdir())[:4]
    scans = [reorient(read_scan(path)) for path in images]
    lungs = [lung_field(scan) for scan in scans]
    values = np.array([about(scan, lung).values for scan, lung in zip(scans, lungs, strict=True)])
    ends = {"least": values.min(0).tolist(), "greatest": values.max(0).tolist()}
    of_scans = {"known": 4, "values": ends, "modalities": {}, "body_parts": {}, "lungs": 0, "synthetic": 0}
    size = {"least": [35.0, 50.0, 34.0], "greatest": [40.0, 55.0, 40.0]}
    kept = {"scans": of_scans, "source_spacing": dict.fromkeys(size, [1.0] * 3), "extent_mm": size}
    write_bundle(tmp_path / "mri.vxs", untrained(tiny, data_set=kept))
    code, _, err = voxelscale("-q", "predict", tmp_path / "mri.vxs", images[0], tmp_path / "out")
    assert (code, err) == (0, "")
    _, facts = read_prediction(next((tmp_path / "out").glob("*/findings.json")))
    assert facts["warnings"] == []
    assert facts["lungs"] is None


# ---------------------------------------------------------------- compared


def test_a_scan_is_compared_with_those_trained_on(store: Store, scans: Path) -> None:
    image = reorient(phantom(scans))
    one = about(image, lung_field(image), list_sources(scans)[0])
    assert one.synthetic
    trained = as_ct(store.kept_by_model, modalities=("CT",), body_parts=("CHEST",))
    assert compared(one, trained) == []
    changes: list[tuple[dict[str, Any], str]] = [
        ({"synthetic": False}, "synthetic scans only"),
        ({"lungs": False, "problem": "why"}, "no lungs found (why)"),
        ({"modality": "PT"}, "modality PT; the model was trained on CT"),
        ({"body_part": "HEAD"}, "body part HEAD; the model was trained on CHEST"),
        ({"spacing": (10.0, 4.0, 4.0)}, "spacing 10 mm along z; the model was trained on"),
        ({"shape": (4, 50, 65)}, f"covers {4 * one.spacing[0]:.0f} mm along z"),
        ({"values": (-1000.0, -900.0, 700.0, 800.0, 900.0)}, "median 700 HU"),
        ({"values": (-500.0, -490.0, -400.0, 40.0, 900.0)}, "darkest 1 % of its voxels: up to -490 HU"),
        (
            {"values": (-1000.0, -980.0, -400.0, 1900.0, 3000.0)},
            "brightest 1 % of its voxels: from 1900 HU",
        ),
    ]
    for change, words in changes:
        assert words in " ".join(text for _, text in compared(replace(one, **change), trained)), words
    for part in ("THORAX", "CHEST_ABDOMEN"):
        assert compared(replace(one, body_part=part, modality="CT"), trained) == []


def test_a_model_that_says_nothing_is_distinguished(scans: Path) -> None:
    image = reorient(phantom(scans))
    one = replace(about(image, lung_field(image)), lungs=False, problem="why")
    (known,) = against(one, [None], low=-900.0, depth=16)
    assert known[0] == "warning"
    assert "no lungs found: why; the model does not say what it was trained on" in known[1]
    assert against(one, [None], low=0.0, depth=16) == []
    assert ("note", "no lungs found: why") in remarks(one)


# ---------------------------------------------------------------- lungs


def test_every_lesion_of_the_phantoms_is_in_reach_of_the_lungs(scans: Path) -> None:
    for source in list_sources(scans):
        image, labels = read_case(source, ReadingConfig())
        assert lesions_away(image, labels.mask) == []


def lesions_away(image: Scan, mask: Scan) -> list[float]:
    """Distances from the lungs of those lesions that predict would leave out."""
    lungs, depth = lung_field(image), lung_depth(image)
    assert depth is not None
    far = []
    for voxels in components(mask.array > 0):
        away = outside_mm(voxels, image.grid, depth)
        inside = all(
            ((voxels[:, axis] >= side.start) & (voxels[:, axis] < side.stop)).any()
            for axis, side in enumerate(lungs.slices)
        )
        far += [away] * (away > LUNG_MARGIN_MM or not inside)
    return far


@pytest.mark.parametrize("seed", range(4))
def test_a_large_tumour_across_the_lungs_border_is_in_reach(scans: Path, seed: int) -> None:
    """45 mm of soft tissue, as pyradiomics' lung2 has it, half in the lung and half outside."""
    image = reorient(phantom(scans))
    depth = lung_depth(image)
    assert depth is not None
    border = np.argwhere(np.abs(depth.array) < 3)
    centre = depth.grid.index_to_mm(border[np.random.default_rng(seed).integers(len(border))])
    places = image.grid.index_to_mm(np.argwhere(np.ones(image.array.shape)))
    ball = (np.linalg.norm(places - centre, axis=1) < 22.5).reshape(image.array.shape)
    ill = Scan(np.where(ball, 40, image.array).astype(np.int16), image.affine)
    assert lung_field(ill).ok
    assert lesions_away(ill, Scan(ball.astype(np.uint8), image.affine)) == []


@real
@pytest.mark.slow
@pytest.mark.parametrize("place", ["lung_tumour", "lidc_whole", "lidc"])
def test_every_real_lesion_is_in_reach_of_the_lungs(place: str, tmp_path: Path) -> None:
    if place == "lung_tumour":
        files = [SHARED / place / f"lung1_{what}.nrrd" for what in ("image", "label")]
        sources = [Source(case="lung1", patient="lung1", image=files[0], labels=(files[1],))]
    else:
        sources = list_sources(SHARED / place)
    for source in sources:
        image, labels = read_case(source, ReadingConfig())
        assert labels.mask.array.any()
        assert lesions_away(image, labels.mask) == []


def test_findings_outside_the_lungs_are_left_out_and_counted(
    tiny: Config, store: Store, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that marks a true nodule, and a place in the shoulder's soft tissue."""
    source = list_sources(scans)[0]
    image, labels = read_case(source, ReadingConfig())
    depth = lung_depth(image)
    assert depth is not None
    truth = labels.mask.array.astype(np.float32)
    count = len(components(truth > 0))
    body = np.argwhere((image.array > -100) & (np.arange(image.array.shape[0])[:, None, None] > 2))
    far = max(body[::7], key=lambda place: outside_mm(place[None], image.grid, depth))
    assert outside_mm(far[None], image.grid, depth) > LUNG_MARGIN_MM
    z, y, x = (slice(max(0, n - 1), n + 2) for n in far)
    marked = truth.copy()
    marked[z, y, x] = 0.9

    def looked(*arguments: object) -> tuple[NDArray[np.float32], dict[object, object]]:
        return marked, {}

    monkeypatch.setattr(Predictor, "_look", looked)
    bundle = untrained(tiny, data_set=store.kept_by_model)
    cpu, config = torch.device("cpu"), tiny.predict
    for lungs, listed, left_out in ((None, count, 1), (True, count, 1), (False, count + 1, 0)):
        seen = Predictor(bundle, replace(config, lungs=lungs), cpu, torch.float32).see("a", image)
        assert len(seen.findings) == listed
        assert seen.left_out == left_out
        assert bool(seen.mask.array[tuple(far)]) == (lungs is False)
        assert (seen.mask.array[truth > 0] == 1).all()
    unknown = Predictor(untrained(tiny), config, cpu, torch.float32).see("a", image)
    assert (len(unknown.findings), unknown.lungs) == (count + 1, None)


def test_averaged_copies_are_mirrored_as_the_training_did(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that never saw a mirrored patch, or saw it mirrored along x alone."""
    set_verbosity(1)
    size = tiny.data.patch_size
    noise = np.random.default_rng(0).integers(-900, 300, size).astype(np.int16)
    affine = np.eye(4)[[2, 1, 0, 3]] * [*SPACING, 1]
    scan = Scan(noise, affine)
    config = replace(tiny.predict, skip_air=False, lungs=False)

    def probability(image: Scan, flip_axes: str, average: bool) -> NDArray[np.float32]:
        augment = replace(tiny.augment, flip=bool(flip_axes), flip_axes=flip_axes or "zyx")
        bundle = untrained(replace(tiny, augment=augment))
        chosen = replace(config, test_time_augmentation=average)
        return Predictor(bundle, chosen, torch.device("cpu"), torch.float32).probability(image)

    plain = probability(scan, "x", False)
    assert "warning" not in capsys.readouterr().err
    other = probability(replace(scan, array=np.ascontiguousarray(noise[..., ::-1])), "x", False)[..., ::-1]
    averaged = probability(scan, "x", True)
    logit = [np.log(p / (1 - p)) for p in (plain, other)]
    np.testing.assert_allclose(averaged, 1 / (1 + np.exp(-np.mean(logit, axis=0))), atol=1e-5)
    assert np.abs(averaged - plain).max() > 1e-4
    assert (probability(scan, "", True) == plain).all()
    assert "trained without mirroring" in capsys.readouterr().err


# ---------------------------------------------------------------- said in the files, and on the screen


def test_the_file_says_what_was_looked_at(
    voxelscale: Command, model: Path, scans: Path, tmp_path: Path
) -> None:
    image = list_sources(scans)[0].image
    code, out, err = voxelscale("-q", "predict", model, image, tmp_path / "out")
    assert (code, err) == (0, "")
    assert "in and around the lungs" in out
    assert "0.05 (predict.candidates)" in out
    path = tmp_path / "out" / image.name.split(".")[0] / "findings.json"
    findings, facts = read_prediction(path)
    assert facts["warnings"] == []
    assert 0 < facts["looked_at"] < 1
    assert facts["lungs"]["found"]
    assert facts["lungs"]["volume_ml"] == pytest.approx(
        lung_field(reorient(read_scan(image))).volume_ml, abs=0.1
    )
    assert facts["thresholds"] == {"threshold": 0.5, "low": None, "candidates": 0.05}
    assert facts["fill_gaps"] == 0
    assert facts["model"] == read_bundle(model).identity
    rows = json.loads(path.read_text())["findings"]
    assert [row["index_zyx"] for row in rows] == [list(f.index) for f in findings]
    kept, told, _ = voxelscale("-q", "predict", model, image, tmp_path / "out")
    assert (kept, told) == (0, out)
    assert read_prediction(path) == (findings, facts)


def test_a_warning_for_several_scans_is_printed_once(
    voxelscale: Command, model: Path, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    for source in list_sources(scans)[:2]:  # elsewhere nothing says that they are synthetic
        (tmp_path / "two" / source.image.name).write_bytes(source.image.read_bytes())
    code, _, err = voxelscale("-q", "predict", model, tmp_path / "two", tmp_path / "out")
    assert code == 0
    assert err.count("warning: 2 scans: the model was trained on synthetic scans only") == 1
    assert err.count("warning") == 1


def test_another_scan_of_the_same_name_is_said_to_be_replaced(
    voxelscale: Command, model: Path, scans: Path, tmp_path: Path
) -> None:
    first, second = (source.image for source in list_sources(scans)[:2])
    for folder, image in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scan.nii.gz").write_bytes(image.read_bytes())
    assert (
        "replaces" not in voxelscale("predict", model, tmp_path / "a" / "scan.nii.gz", tmp_path / "out")[2]
    )
    again = ["--set", "predict.overlap=0.5"]
    assert "replaces" not in voxelscale("predict", model, tmp_path / "a", tmp_path / "out", *again)[2]
    _, _, err = voxelscale("predict", model, tmp_path / "b" / "scan.nii.gz", tmp_path / "out")
    assert "scan: replaces the prediction of another scan" in err


def test_missing_slices_are_filled_where_the_reading_rules_say_so(
    voxelscale: Command, tiny: Config, store: Store, scans: Path, tmp_path: Path
) -> None:
    write_series(tmp_path / "series", phantom(scans), drop=10)
    kept = store.kept_by_model
    filling = replace(tiny, reading=replace(tiny.reading, fill_gaps=1))
    write_bundle(tmp_path / "plain.vxs", untrained(tiny, data_set=kept))
    write_bundle(tmp_path / "filling.vxs", untrained(filling, data_set=kept))
    series, fill = tmp_path / "series", ["--set", "reading.fill_gaps=1"]
    code, _, err = voxelscale("predict", tmp_path / "plain.vxs", series, tmp_path / "no")
    assert code == 2
    assert "reading.fill_gaps=1" in err
    for name, sets in (("plain", fill), ("filling", [])):
        assert voxelscale("predict", tmp_path / f"{name}.vxs", series, tmp_path / name, *sets)[0] == 0
        _, facts = read_prediction(next((tmp_path / name).glob("*/findings.json")))
        assert facts["fill_gaps"] == 1


def test_values_that_are_no_hu_show_in_the_air(scans: Path) -> None:
    """Half of HU, with padding as of a real scanner: neither end nor middle of the values is odd."""
    image = reorient(phantom(scans))
    halved = np.where(image.array > -1020, image.array / 2, -2048).astype(np.int16)
    halved[:, :3] = -2048
    for array, odd in ((image.array, False), (halved, True)):
        scan = Scan(array, image.affine)
        texts = [text for _, text in remarks(about(scan, lung_field(scan)))]
        assert any("hardly in HU" in text for text in texts) is odd, texts
