"""Masks and findings of several classes, regions and channels, against NumPy and SciPy by definition."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from tests.conftest import Command, assert_same_place
from tests.several import HU, bundle_of
from torch import Tensor

from voxelscale.channels import Channel
from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, PredictConfig, load
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import Finding
from voxelscale.formats import write_scan
from voxelscale.geometry import Grid, IntTriple, Scan, Triple, affine_from_itk, reorient, resample
from voxelscale.infer.sliding_window import Share
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, write_bundle
from voxelscale.predict.classes import classes_by, found_by, least_kept
from voxelscale.predict.maps import Maps
from voxelscale.predict.predictor import Predictor

CPU = torch.device("cpu")
ORGANS = Classes(names=("liver", "kidney", "tumour"), values=((5,), (7,), (2, 3)))
REGIONS = Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2))
PET_CT = (Channel(), Channel(name="PET", scheme="zscore"))
T1 = (Channel(name="T1", scheme="zscore"),)
SPACING = (4.0, 3.0, 3.0)


def made(
    config: Config,
    classes: Classes,
    channels: tuple[Channel, ...],
    *,
    seed: int = 0,
    spacing: Triple = SPACING,
    sharp: float = 6.0,
) -> Bundle:
    """A network that was never trained, but is sure of itself."""
    torch.manual_seed(seed)
    size = len(channels), classes.outputs
    network = build_model(config.model, config.data.patch_size, spacing, *size)
    weights = network.state_dict()
    weights["head.weight"] *= sharp
    weights["head.bias"] *= 0
    return bundle_of(config, weights, spacing, classes, channels)


@pytest.fixture
def wide(tiny: Config) -> Config:
    """One window holds the whole scan, so that logits are the network's own."""
    sets = ["data.patch_size=[16,32,32]", "model.depth=2", "predict.skip_air=false", "predict.overlap=0"]
    return load(sets=[*sets, "predict.min_volume_mm3=500", "predict.candidates=0.2"], base=tiny)


def scan(seed: int, shape: IntTriple = (16, 32, 32), scale: float = 1.0, **place: Any) -> Scan:
    """Smooth noise."""
    usual: dict[str, Any] = {"origin": (3, -7, 11), "spacing": SPACING[::-1], "direction": np.eye(3)}
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 1, shape), 1.5)
    return Scan((scale * values / values.std()).astype(np.float32), affine_from_itk(**usual | place))


def given(bundle: Bundle, images: Sequence[Scan], grid: Grid) -> Tensor:
    """Network input (1, c, z, y, x), written out without int16."""
    each = []
    for image, channel in zip(images, bundle.channels, strict=True):
        fill = -1024 if channel.scheme == "ct" else float(image.array.min())
        values = resample(image, grid, "linear", fill=fill, as_float=True).array.astype(np.float64)
        if channel.scheme == "ct":
            values = (np.clip(np.rint(values), HU.low, HU.high) - HU.mean) / HU.std
        else:
            some = values[values != 0]
            values = (values - some.mean()) / some.std()
        each.append(values)
    return torch.from_numpy(np.stack(each).astype(np.float32))[None]


def probabilities(bundle: Bundle, images: Sequence[Scan]) -> NDArray[np.float32]:
    """(output, z, y, x) on the first image's voxels."""
    grid = images[0].grid.with_spacing(bundle.spacing)
    with torch.inference_mode():
        logits = bundle.network(CPU)(given(bundle, images, grid))[0]
    made = logits.sigmoid() if bundle.classes.regions else logits.softmax(0)
    return np.stack(
        [resample(Scan(one, grid.affine), images[0].grid).array for one in made.numpy()]  # fill is 0
    )


def by_definition(
    bundle: Bundle, config: PredictConfig, images: Sequence[Scan]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The mask's values, and where the choice is clear."""
    of_each, classes = probabilities(bundle, images), bundle.classes
    mask = np.zeros(images[0].array.shape, int)
    ordered = np.sort(of_each, axis=0)
    clear = ordered[-1] - ordered[-2] > 0.03
    if classes.regions:
        clear = (np.abs(of_each - config.threshold) > 0.02).all(axis=0)
    for at, value in enumerate(classes.written_values):
        here = of_each.argmax(0) == at + 1
        if classes.regions:
            parts, count = ndimage.label(of_each[at] >= config.threshold, np.ones((3, 3, 3)))
            sizes = np.bincount(parts.ravel(), minlength=count + 1) * images[0].grid.voxel_mm3
            sizes[0] = 0
            here = np.isin(parts, np.flatnonzero(sizes >= config.min_volume_mm3))
            clear &= ~np.isin(parts, np.flatnonzero(np.abs(sizes / config.min_volume_mm3 - 1) < 0.3))
        mask[here] = value
    return mask, clear


def seen(bundle: Bundle, config: PredictConfig, images: Sequence[Scan]) -> tuple[list[Finding], Scan]:
    """Findings and mask; whether the findings are what the mask shows is looked at on the way."""
    found = Predictor(bundle, config, CPU, torch.float32).see("a", images[0], more=images[1:])
    classes, mask = bundle.classes, found.mask.array
    least = config.min_volume_mm3 / images[0].grid.voxel_mm3
    for at, (name, value) in enumerate(zip(classes.names, classes.written_values, strict=True)):
        here = np.isin(mask, classes.written_values[at:]) if classes.regions else mask == value
        parts, count = ndimage.label(here, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        own = [f for f in found.findings if f.label == name]
        wanted = sorted(sizes[sizes >= least] * images[0].grid.voxel_mm3)
        if not classes.regions:
            assert len(own) >= len(wanted)
            listed = sorted(f.volume_mm3 for f in own)
            assert all(np.isclose(listed, volume, rtol=1e-6).any() for volume in wanted)
    return found.findings, found.mask


def number_of_each(findings: Sequence[Any]) -> dict[str, int]:
    return {name: sum(f.label == name for f in findings) for name in {f.label for f in findings}}


@pytest.mark.parametrize("classes", [ORGANS, REGIONS])
@pytest.mark.parametrize("channels", [PET_CT, T1, (Channel(),)])
def test_what_is_found_on_the_networks_own_voxels(
    wide: Config, classes: Classes, channels: tuple[Channel, ...]
) -> None:
    """The second channel lies on another lattice, turned round."""
    bundle = made(wide, classes, channels)
    turned = {"spacing": (2.5, 3.5, 3.0), "direction": np.diag([-1, 1, 1]), "origin": (99, -9, 9)}
    images = [scan(1, scale=300), scan(2, (22, 30, 40), scale=0.01, **turned)][: len(channels)]
    findings, mask = seen(bundle, wide.predict, images)
    wanted, clear = by_definition(bundle, wide.predict, images)
    assert clear.mean() > 0.8
    assert np.array_equal(mask.array[clear], wanted[clear])
    assert set(np.unique(mask.array)) >= {*classes.written_values}
    assert mask.array.dtype == np.uint8
    assert mask.grid.same_as(images[0].grid)
    assert {f.label for f in findings} <= {*classes.names}
    for finding in findings:
        assert (finding.mean_hu is None) == (channels == T1)
    scores = [f.probability for f in findings]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("classes", [ORGANS, REGIONS])
def test_what_is_found_on_other_voxels(wide: Config, classes: Classes) -> None:
    """Interpolated, turned and flipped: the scan's array runs otherwise than the network's."""
    bundle = made(wide, classes, T1, spacing=(5.0, 4.0, 4.5))
    turned = np.array([[0, -1, 0], [1, 0, 0], [0, 0, -1]])
    image = scan(3, (26, 55, 58), spacing=(2.2, 2.6, 3.1), direction=turned)  # 16 x 32 x 32 there
    findings, mask = seen(bundle, wide.predict, [image])
    assert mask.grid.same_as(image.grid)
    # The reference looks at the scan turned to LPS.
    wanted, clear = by_definition(bundle, wide.predict, [reorient(image)])
    ours = reorient(mask).array
    assert clear.mean() > 0.8
    assert (ours == wanted)[clear].mean() > 0.999
    for finding in findings:
        assert np.allclose(image.grid.index_to_mm(finding.index), (finding.x, finding.y, finding.z))


@pytest.mark.parametrize("classes", [ORGANS, REGIONS])
def test_the_probabilities_that_are_kept(wide: Config, classes: Classes) -> None:
    bundle = made(wide, classes, T1, spacing=(5.0, 4.0, 4.5))
    image = scan(3, (26, 49, 65), spacing=(2.2, 2.6, 3.1))  # 16 x 32 x 32 there
    found = Predictor(bundle, wide.predict, CPU, torch.float32).see("a", image)
    kept = dict(found.probabilities)
    assert list(kept) == [f"probability_{at + 1}.nii.gz" for at in range(len(classes.names))]
    of_each = probabilities(bundle, [image])[not classes.regions :]
    for values, wanted in zip(kept.values(), of_each, strict=True):
        assert values.dtype == np.uint8
        # What is hardly probable is not kept; a voxel between two of the network's has a part of each.
        assert np.abs(values / 255 - wanted)[wanted > 0.1].max() < 0.03
        assert np.abs(values / 255 - wanted).mean() < 0.01


def test_a_network_of_one_class_and_other_channels(wide: Config) -> None:
    bundle = made(wide, LESION, T1)
    image = scan(4, scale=1e-3)
    probability = Predictor(bundle, wide.predict, CPU, torch.float32).probability(image)
    with torch.inference_mode():
        wanted = bundle.network(CPU)(given(bundle, [image], image.grid))[0, 0].sigmoid().numpy()
    assert np.abs(probability - wanted).max() < 0.02
    seen = Predictor(bundle, wide.predict, CPU, torch.float32).see("a", image)
    assert np.array_equal(seen.mask.array > 0, seen.mask.array == 1)
    assert {f.label for f in seen.findings} == {""}
    ((name, kept),) = seen.probabilities
    assert name == "probability.nii.gz"
    assert np.abs(kept / 255 - probability).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="of its own"):
        Predictor(made(wide, ORGANS, T1), wide.predict, CPU, torch.float32).probability(image)


def test_several_networks_are_averaged(wide: Config) -> None:
    each = [made(wide, ORGANS, T1, seed=seed) for seed in (0, 1)]
    image = scan(5)
    mean = np.mean([probabilities(one, [image]) for one in each], axis=0)
    both = replace(each[0], others=(each[1],))
    _, mask = seen(both, wide.predict, [image])
    ordered = np.sort(mean, axis=0)
    clear = ordered[-1] - ordered[-2] > 0.05
    values = np.array([0, *ORGANS.written_values])
    assert clear.mean() > 0.6
    assert (mask.array == values[mean.argmax(0)])[clear].mean() > 0.999


def test_several_processes_see_what_one_sees(wide: Config) -> None:
    """Played one after another: the first comes last and adds what the other would have sent."""
    sets = ["data.patch_size=[8,16,16]", "predict.overlap=0.5"]
    config = load(sets=sets, base=wide)
    predictor = Predictor(made(config, ORGANS, T1), config.predict, CPU, torch.float32)
    image = scan(6)
    alone = predictor.see("a", image)
    sent: list[Tensor] = []
    predictor.assist([image], Share(part=1, parts=2, combine=lambda sums: sent.append(sums.clone())))
    arrived = iter(sent)

    def combine(sums: Tensor) -> None:
        sums += next(arrived)

    together = predictor.see("a", image, Share(part=0, parts=2, combine=combine))
    assert (together.mask.array == alone.mask.array).mean() > 0.999
    assert next(arrived, None) is None


def test_lungs_are_asked_for_of_ct_only(wide: Config) -> None:
    with pytest.raises(VoxelscaleError, match="not in T1"):
        Predictor(made(wide, ORGANS, T1), replace(wide.predict, lungs=True), CPU, torch.float32)
    chests = made(wide, ORGANS, (Channel(),))
    assert Predictor(chests, wide.predict, CPU, torch.float32).see("a", scan(7)).lungs is None


# ------------------------------------------------------------------ the maps


@settings(max_examples=40)
@hypothesis_given(
    st.integers(2, 6),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.floats(0.01, 0.4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_maps_hold_what_counts_in_bounded_memory(
    names: int, shape: IntTriple, least: float, regions: bool, bounded: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    values = tuple((1 << at,) for at in range(names))
    labels = tuple(f"c{at}" for at in range(names))
    classes = Classes(
        names=labels,
        values=values,
        regions=regions,
        order=tuple(v for (v,) in values) if regions else (),
    )
    logits = torch.from_numpy(random.normal(0, 3, (classes.outputs, *shape)).astype(np.float32))
    dense = logits.sigmoid() if regions else logits.softmax(0)
    within = torch.from_numpy(random.random(shape) < 0.5) if bounded else None
    maps = Maps(classes, Grid(shape, np.eye(4)), least)
    cut = int(random.integers(0, shape[0] + 1))
    for box in (slice(0, cut), slice(cut, shape[0])):
        if box.stop > box.start:
            whole = (box, slice(0, shape[1]), slice(0, shape[2]))
            maps.add(whole, dense[:, *whole].clone(), within)
    wanted = dense.numpy().copy()
    kept = wanted >= least
    if not regions:
        kept |= np.arange(len(wanted))[:, None, None, None] == wanted.argmax(0)
    wanted[~kept] = 0
    if within is not None:
        wanted[:, ~within.numpy()] = 0
        if not regions:
            wanted[0, ~within.numpy()] = 1
    for at in range(classes.outputs):
        there = np.zeros(shape, np.float32)
        if (box_of_class := maps.box(at)) is not None:
            there[box_of_class] = maps.within(at, box_of_class)
            assert there.any()
        assert np.abs(there - wanted[at]).max() < 5e-4
        assert np.array_equal(there > 0, wanted[at] > 0)
    count, voxels = classes.outputs, int(np.prod(shape))
    if not regions:
        bound = voxels * (count / 8 + 2 * min(count, 1 / least + 1))
        overhead = 100 * 2 * count  # of compressed bytes, in each of two boxes
        assert maps.nbytes <= bound + overhead


def test_the_least_probability_that_is_kept() -> None:
    config = PredictConfig()
    assert least_kept(config) == 0.025
    assert least_kept(replace(config, candidates=0.02)) == 0.01
    assert least_kept(replace(config, candidates=0.9)) == 0.025
    assert least_kept(replace(config, candidates=0.0)) == 1 / 256
    assert least_kept(replace(config, low_threshold=0.03)) == 0.015


def stacked(dense: NDArray[np.float32], classes: Classes, affine: NDArray[np.float64]) -> list[Maps]:
    maps = Maps(classes, Scan(dense[0], affine).grid, 0.01)
    z, y, x = (slice(0, n) for n in dense.shape[1:])
    maps.add((z, y, x), torch.from_numpy(dense))
    return [maps]


def test_small_parts_stay_in_the_mask_of_classes_and_go_from_that_of_regions() -> None:
    """One large ball and one voxel of each; a candidate; merged fragments."""
    shape, affine = (12, 30, 30), affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3))
    grid = Grid(shape, affine)
    lesion = np.zeros(shape, np.float32)
    lesion[2:6, 2:8, 2:8] = 0.9
    lesion[9, 20, 20] = 0.9
    lesion[4:8, 15:19, 15:19] = 0.3
    config = PredictConfig(candidates=0.2, min_volume_mm3=10)
    both = Classes(names=("a", "b"), values=((1,), (2,)))
    dense = np.stack([1 - lesion, lesion, np.zeros(shape, np.float32)])
    findings, stored = classes_by(config, "x", both, stacked(dense, both, affine), grid)
    assert [(f.label, round(f.volume_mm3)) for f in findings] == [("a", 144), ("a", 64)]
    assert findings[0].index == (3.5, 4.5, 4.5)
    assert findings[0].probability == pytest.approx(0.9, abs=1e-3)
    assert findings[1].probability == pytest.approx(0.3, abs=1e-3)
    assert np.array_equal(stored, lesion > 0.5)
    only = replace(config, candidates=0.6)
    assert len(classes_by(only, "x", both, stacked(dense, both, affine), grid)[0]) == 1
    merged = replace(config, merge_mm=20.0)
    assert [
        round(f.volume_mm3) for f in classes_by(merged, "x", both, stacked(dense, both, affine), grid)[0]
    ] == [
        145,
        64,
    ]
    two = Classes(names=("a", "b"), values=((1, 2), (2,)), regions=True, order=(1, 2))
    findings, stored = classes_by(
        config, "x", two, stacked(np.stack([lesion, lesion * 0.8]), two, affine), grid
    )
    assert number_of_each(findings) == {"a": 2, "b": 2}
    large = lesion.copy()
    large[9, 20, 20] = 0
    assert np.array_equal(stored, 3 * (large > 0.5))
    nowhere, stored = classes_by(
        config, "x", both, stacked(dense, both, affine), grid, keep=lambda voxels: False
    )
    assert not nowhere
    assert not stored.any()


KINDS = {
    "one": Classes(names=("a",)),
    "classes": Classes(names=("a", "b"), values=((1,), (2,))),
    "regions": Classes(names=("a", "b"), values=((1, 2), (2,)), regions=True, order=(1, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("near", [True, False])
def test_what_is_small_or_not_the_largest_leaves_mask_and_findings_of_its_class(
    kind: str, near: bool
) -> None:
    """Components of 144, 64 and 1 voxel and a candidate; the first may be too far from the lungs."""
    classes, shape = KINDS[kind], (12, 30, 30)
    affine = affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3))
    boxes: dict[int, Any] = {144: np.s_[2:6, 2:8, 2:8], 64: np.s_[4:8, 15:19, 15:19], 1: np.s_[9, 20, 25]}
    dense = np.zeros((2, *shape), np.float32)
    for box in boxes.values():
        dense[0][box] = 0.9
    dense[0, 2:6, 25:28, 2:8] = 0.3
    dense[1, 8:12, 10:13, 2:5] = dense[1, 10:12, 20:22, 8:10] = 0.8  # the other class: 36 and 8 voxels
    single = kind == "one"
    maps = dense if kind == "regions" else np.concatenate([1 - dense.max(0, keepdims=True), dense])
    found = dense[0] if single else stacked(maps, classes, affine)

    def left(**rules: Any) -> tuple[list[int], list[int], list[int]]:
        config = PredictConfig(candidates=0.2, min_volume_mm3=0, **rules)
        findings, stored = found_by(
            config, "x", classes, found, Grid(shape, affine), keep=lambda v: near or v[:, 1].min() > 8
        )
        assert kind == "one" or number_of_each(findings)["b"] == 2, "the rules are for the other one"
        volumes = sorted(round(f.volume_mm3) for f in findings if f.label in ("", "a"))
        there = [size for size, box in boxes.items() if stored[box].all()]
        assert (classes.where(stored, 0)).sum() == sum(there)
        return volumes, there, [] if single else [int(classes.where(stored, 1).sum())]

    first = [144] * near
    others = [] if single else [44]
    assert left() == (sorted([1, 64, 72, *first]), [*first, 64, 1], others)
    assert left(smallest_mm3={"a": 64}) == (sorted([64, 72, *first]), [*first, 64], others)
    assert left(smallest_mm3={"a": 65}) == (sorted([72, *first]), first, others)
    largest = 144 if near else 64
    assert left(largest_only=("a",)) == ([largest], [largest], others)
    assert left(largest_only=("a",), smallest_mm3={"a": 145}) == ([], [], others)
    with pytest.raises(VoxelscaleError, match=r"predict\.largest_only names c, which is no class"):
        PredictConfig(largest_only=("a", "c")).check_classes(classes.names)


def test_equal_probabilities_go_to_the_first() -> None:
    both = Classes(names=("a", "b"), values=((1,), (2,)))
    dense = np.zeros((3, 1, 1, 4), np.float32)
    dense[:, 0, 0] = np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.25, 0.25, 0.5]]).T
    affine = np.eye(4)
    _, stored = classes_by(
        PredictConfig(), "x", both, stacked(dense, both, affine), Grid((1, 1, 4), affine)
    )
    assert stored.tolist() == [[[0, 1, 0, 2]]]


# ------------------------------------------------------------------ the command


def written(path: Path, image: Scan) -> Path:
    write_scan(image, path)
    return path


def nnunet(folder: Path, channels: dict[str, str], cases: Sequence[Sequence[Scan]]) -> Path:
    """A data set in nnU-Net's layout."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for number, images in enumerate(cases):
        for at, image in enumerate(images):
            written(folder / "imagesTr" / f"case{number}_{at:04d}.nii.gz", image)
        label = Scan((images[0].array > 0).astype(np.uint8), images[0].affine)
        written(folder / "labelsTr" / f"case{number}.nii.gz", label)
    content = {
        "channel_names": channels,
        "labels": {"background": 0, "liver": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_the_command_writes_classes(voxelscale: Command, wide: Config, tmp_path: Path) -> None:
    data = nnunet(tmp_path / "data", {"0": "T1", "1": "PET"}, [[scan(1), scan(2)], [scan(3), scan(4)]])
    channels = (*T1, PET_CT[1])
    write_bundle(tmp_path / "model.vxs", made(wide, ORGANS, channels))
    code, out, err = voxelscale("predict", tmp_path / "model.vxs", data, tmp_path / "out")
    assert code == 0, err
    assert "(predict.candidates)" in out
    assert "  liver  (" in out
    image = sitk.ReadImage(str(data / "imagesTr" / "case0_0000.nii.gz"))
    mask = sitk.ReadImage(str(tmp_path / "out" / "case0" / "mask.nii.gz"))
    assert_same_place(mask, image)
    assert set(np.unique(sitk.GetArrayFromImage(mask))) == {0, 5, 7, 2}
    rows = list(csv.reader((tmp_path / "out" / "findings.csv").open()))
    assert rows[0] == ["seriesuid", "coordX", "coordY", "coordZ", "probability", "class"]
    assert {row[5] for row in rows[1:]} <= {*ORGANS.names}
    content = json.loads((tmp_path / "out" / "case0" / "findings.json").read_text())
    assert content["classes"] == ORGANS.to_dict()
    assert {row["label"] for row in content["findings"]} <= {*ORGANS.names}
    assert content["lungs"] is None
    facts = json.loads((tmp_path / "out" / "case0" / "case.json").read_text())
    assert facts["classes"] == ORGANS.to_dict()
    again = voxelscale("predict", tmp_path / "model.vxs", data, tmp_path / "out")
    assert again[:2] == (0, out), "what is there already is kept"


def test_a_model_of_one_class_says_nothing_of_classes(
    voxelscale: Command, wide: Config, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "model.vxs", made(wide, LESION, T1))
    data = nnunet(tmp_path / "data", {"0": "T1"}, [[scan(1)]])
    code, out, _ = voxelscale("predict", tmp_path / "model.vxs", data, tmp_path / "out")
    assert code == 0
    assert "a finding has a lesion probability of at least" in out
    content = json.loads((tmp_path / "out" / "case0" / "findings.json").read_text())
    assert "classes" not in content
    assert not any("label" in row for row in content["findings"])
    rows = list(csv.reader((tmp_path / "out" / "findings.csv").open()))
    assert {len(row) for row in rows} == {5}


def test_other_channels_than_the_models_are_refused(
    voxelscale: Command, wide: Config, tmp_path: Path
) -> None:
    one = nnunet(tmp_path / "one", {"0": "T1"}, [[scan(1)]])
    two = nnunet(tmp_path / "two", {"0": "T1", "1": "PET"}, [[scan(1), scan(2)]])
    other = nnunet(tmp_path / "other", {"0": "PET", "1": "T1"}, [[scan(1), scan(2)]])
    t2 = nnunet(tmp_path / "t2", {"0": "T2"}, [[scan(1)]])
    for name, channels in (("t1", T1), ("both", (*T1, PET_CT[1])), ("ct", (Channel(),))):
        write_bundle(tmp_path / f"{name}.vxs", made(wide, ORGANS, channels))
    for model, data, words in (
        ("both", one, "has the channel T1, the model the channels T1, PET"),
        ("t1", two, "has the channels T1, PET, the model the channel T1"),
        ("both", other, "has the channels PET, T1, the model the channels T1, PET"),
        ("t1", t2, "has the channel T2, the model the channel T1"),
        ("ct", two, "has the channels T1, PET, the model the channel CT"),
    ):
        out = tmp_path / f"{model}{data.name}"
        code, _, err = voxelscale("predict", tmp_path / f"{model}.vxs", data, out)
        assert code == 2, (model, data.name)
        assert words in err
        assert "set reading.channels=[" in err
    code, _, err = voxelscale(
        *("predict", tmp_path / "t1.vxs", t2, tmp_path / "said", "--set", "reading.channels=[T1]")
    )
    assert code == 0, err
    image = written(tmp_path / "a.nii.gz", scan(1))
    code, _, err = voxelscale("predict", tmp_path / "t1.vxs", image, tmp_path / "file")
    assert code == 0
    assert "its channel is not named; it is taken for T1" in err


def test_a_picture(tiny: Config) -> None:
    """One slice, by a network of two dimensions; the reference is the network on the whole picture."""
    sets = ["model.dims=2", "data.patch_size=[1,40,48]", "model.depth=2", "predict.min_volume_mm3=0"]
    config = load(sets=sets, base=tiny)
    bundle = made(config, ORGANS, (Channel(name="grey", scheme="rgb"),), spacing=(1.0, 1.0, 1.0), sharp=9)
    grey = (128 + 40 * scan(1, (1, 40, 48)).array).clip(0, 255).astype(np.uint8)
    picture = Scan(grey, affine_from_itk((0, 0, 0), (1, 1, 1), np.eye(3)))
    with torch.inference_mode():
        logits = bundle.network(CPU)(torch.from_numpy(grey[None, None].astype(np.float32)) / 255)[0]
    wanted = np.array([0, *ORGANS.written_values])[logits.argmax(0).numpy()]
    _, mask = seen(bundle, config.predict, [picture])
    assert len(np.unique(wanted)) > 2
    assert (mask.array == wanted).mean() > 0.995
    with pytest.raises(VoxelscaleError, match=r"predict.patch_size is \(4, 40, 48\)"):
        load(sets=["predict.patch_size=[4,40,48]"], base=config)


def test_a_window_for_networks_of_two_and_three_dimensions(wide: Config) -> None:
    flat = load(sets=["model.dims=2", "data.patch_size=[1,32,32]"], base=wide)
    both = replace(made(wide, ORGANS, T1), others=(made(flat, ORGANS, T1, seed=1),))
    config = replace(wide.predict, patch_size=(16, 32, 32))
    windows = replace(both, config=replace(wide, predict=config))
    _, mask = seen(windows, config, [scan(1)])
    assert (mask.array == seen(both, wide.predict, [scan(1)])[1].array).all()


def test_what_is_only_for_one_class(voxelscale: Command, wide: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_bundle(tmp_path / "run" / "model.vxs", made(wide, ORGANS, T1))
    data = nnunet(tmp_path / "data", {"0": "T1"}, [[scan(1)]])
    code, _, err = voxelscale("calibrate", tmp_path / "run", tmp_path / "out", data)
    assert code == 2
    assert "only for one class" in err
    assert "reading.labels" in err
