"""The classes of data sets: from their dataset.json, from the user, and in the masks of cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.dataset.test_layouts import AFFINE, decathlon, image, luna16, nnunet

from voxelscale.classes import LESION, NODULE, Classes
from voxelscale.config import Config, ReadingConfig, from_dict, load
from voxelscale.console import set_verbosity
from voxelscale.dataset import DataSet
from voxelscale.dataset.classes import digested, of_json, settled
from voxelscale.dataset.reading import read_case, read_truth, read_truth_labels
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan

TABLE = Path("dataset.json")


def of(labels: Any, **more: Any) -> Classes:
    return of_json(TABLE, {"labels": labels, **more})


def test_what_a_table_names() -> None:
    assert of({"0": "background", "1": "cancer"}) == Classes(names=("cancer",), values=((1,),))
    assert of({"background": 0, "cancer": 1}) == Classes(names=("cancer",), values=((1,),))
    assert of({}) == of({"0": "background"}) == LESION
    two = Classes(names=("Anterior", "Posterior"), values=((1,), (2,)))
    assert of({"background": 0, "Anterior": 1, "Posterior": 2}) == two
    assert of({"0": "background", "1": "Anterior", "2": "Posterior"}) == two
    ignoring = of({"background": [0, 4], "a": 1, "b": 2, "ignore": 3})
    assert (ignoring.ignore, ignoring.background, ignoring.names) == ((3,), (4,), ("a", "b"))
    assert of({"a": [1, 2]}) == Classes(names=("a",), values=((1, 2),)), "one class is no region"
    assert of({"background": 0, "ignore": 9}) == Classes(ignore=(9,))


def test_regions_and_their_order() -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    said = of(labels, regions_class_order=[1, 2, 3])
    assert said.regions
    assert said.order == (1, 2, 3)
    assert said.ignore == (4,)
    assert of(labels) == said, "derived"
    turned = of({"core": [2, 3], "enhancing": [3], "whole": [1, 2, 3]})
    assert turned.names == ("whole", "core", "enhancing")
    assert turned.order == (1, 2, 3)
    apart = of({"left": [1, 2], "right": [3]})
    assert apart.regions
    assert apart.order == (1, 3)


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        ({"a": 1, "b": 1}, {}, "belongs to both a and b"),
        ({"a": [1, 2], "b": [2, 3]}, {}, "which is of other regions"),
        ({"a": [1, 2], "b": [2, 1]}, {}, "value of its own"),
        ({"a": [1, 2], "b": [2]}, {"regions_class_order": [2, 1]}, "writes the value"),
        ({"a": [1, 2], "b": [2]}, {"regions_class_order": [1]}, "as many values"),
        ({"a": [1, 2], "b": [2]}, {"regions_class_order": 1}, "no list"),
        ({"a": 1, "ignore": 1}, {}, "both a class and ignore"),
        ({"a": -1}, {}, "-1 is no label value"),
        ({"a": 1.5}, {}, "has no number"),
        ({"a": True}, {}, "has no number"),
        ({"a": None}, {}, "has no number"),
        ({"a": {"b": 1}}, {}, "has no number"),
        ({"a": 10**30}, {}, "has no number"),
        ([1, 2], {}, "no table"),
    ],
)
def test_contradictions_name_the_file(labels: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(VoxelscaleError) as caught:
        of(labels, **more)
    assert words in caught.value.message
    assert caught.value.message.startswith("dataset.json: ")
    assert caught.value.hint


def said(text: str) -> ReadingConfig:
    """As ``--set reading.labels=text``."""
    return load(None, [f"reading.labels={text}"]).reading


def test_what_the_user_says() -> None:
    two = Classes(names=("lung", "lesion"), values=((1,), (2,)), ignore=(9,), background=(7,))
    assert settled(two, ReadingConfig()) == two
    assert settled(two, said("[2]")) == Classes(values=((2,),))
    one = settled(two, said("{nodule: 2}"))
    assert one == Classes(names=("nodule",), values=((2,),), ignore=(9,), background=(1, 7))
    both = settled(LESION, said("{liver: 1, tumour: [2, 3], ignore: 255, background: [0, 4]}"))
    assert both == Classes(names=("liver", "tumour"), values=((1,), (2, 3)), ignore=(255,), background=(4,))
    nested = settled(two, said("{tumour: 2, whole: [1, 2]}"))
    assert (nested.regions, nested.names, nested.order) == (True, ("whole", "tumour"), (1, 2))
    named = settled(LESION, said("{gtv: [GTV-1, 3], organ: Heart}"))
    assert named.values == (("GTV-1", 3), ("Heart",))
    assert not settled(LESION, said("{a: [1, 2], b: [3, 4]}")).regions
    ordered = ReadingConfig(labels={"a": [1, 2], "b": 2}, regions_class_order=(1, 2))
    assert settled(LESION, ordered).order == (1, 2)
    for classes, reading in ((two, said("{nodule: 2}")), (LESION, ordered), (two, said("[2]"))):
        once = settled(classes, reading)
        assert settled(once, reading) == once


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{a: 1, b: 1, c: 1}", "value of its own"),
        ("{a: [1, 2], b: [2, 3]}", "of other regions"),
        ("{a: []}", "no values"),
        ("{a: 1.5}", "no values"),
        ("{a: true}", "no values"),
        ("{1: 1}", "no name"),
        ("{ignore: 3}", "names no class"),
        ("{a: 1, ignore: b}", "whole numbers"),
        ("{a: 1, background: 1}", "both a class and background"),
        ("[0, 1]", "0 is no label value"),
        ("[-3]", "-3 is no label value"),
    ],
)
def test_what_the_user_says_wrongly(text: str, words: str) -> None:
    with pytest.raises(VoxelscaleError) as caught:
        settled(LESION, said(text))
    assert words in caught.value.message
    assert caught.value.message.startswith("reading.labels: ")
    assert caught.value.hint


def test_the_order_alone_is_for_several_classes() -> None:
    with pytest.raises(VoxelscaleError, match=r"reading\.regions_class_order"):
        settled(LESION, ReadingConfig(regions_class_order=(1,)))


def mask_of(*values: int) -> Scan:
    array = np.zeros((12, 20, 24), np.uint8)
    for at, value in enumerate(values):
        array[4:7, 2 + 3 * at : 4 + 3 * at, 6:11] = value
    return Scan(array, AFFINE)


def two_classes(folder: Path) -> Path:
    nnunet(folder)
    for name in ("a", "b"):
        write_scan(mask_of(1, 2), folder / "labelsTr" / f"{name}.nii.gz")
    return folder


def test_the_classes_of_a_data_set_reach_its_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_verbosity(1)
    data = DataSet(path=two_classes(tmp_path))
    assert data.classes.names == ("lung", "lesion")
    told = capsys.readouterr().err
    assert "classes: lung [1], lesion [2]; reading.labels=[1,2] makes one lesion of them" in told
    assert "channels" not in told, "of CT nothing is said"
    set_verbosity(0)
    for source in data.cases:
        assert source.classes == data.classes
        _, labels = read_case(source, data.reading)
        assert labels.mask.array.dtype == np.int16
        assert np.array_equal(labels.mask.array, mask_of(1, 2).array)
        assert np.array_equal(read_truth(source, data.reading).array, labels.mask.array)
    merged = DataSet(path=tmp_path, reading=ReadingConfig(labels=(1, 2)))
    assert merged.classes == Classes(values=((1, 2),))
    for source in merged.cases:
        array = read_case(source, merged.reading)[1].mask.array
        assert array.dtype == np.uint8
        assert np.array_equal(array, mask_of(1, 2).array > 0)


def test_layouts_of_nodules(tmp_path: Path) -> None:
    luna16(tmp_path)
    data = DataSet(path=tmp_path)
    assert data.classes == NODULE
    assert all(source.classes == NODULE for source in data.cases)


@pytest.mark.parametrize("labels", [None, {"lesion": 2, "lung": 1}])
def test_a_value_without_a_name_is_an_error_of_its_case(
    tmp_path: Path, labels: dict[str, Any] | None
) -> None:
    two_classes(tmp_path)
    write_scan(mask_of(1, 2, 7), tmp_path / "labelsTr" / "b.nii.gz")
    reading = ReadingConfig(labels=labels)
    whole, odd = DataSet(path=tmp_path, reading=reading).cases
    read_case(whole, reading)
    for read in (read_case, read_truth_labels):
        with pytest.raises(VoxelscaleError, match=r"b\.nii\.gz: holds the value 7") as caught:
            read(odd, reading)
        assert "background: [7]}" in caught.value.hint
    # The hint itself, as a user would type it.
    typed = caught.value.hint.split(": ", 1)[1]
    fixed = load(None, [typed]).reading
    assert read_case(DataSet(path=tmp_path, reading=fixed).cases[1], fixed)[1].mask.array.max() == 2


def test_ignored_voxels_are_stored_so(tmp_path: Path) -> None:
    two_classes(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["labels"] = {"background": 0, "lung": 1, "ignore": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = DataSet(path=tmp_path)
    array = read_case(data.cases[0], data.reading)[1].mask.array
    expected = mask_of(1, 2).array.astype(int)
    expected[expected == 2] = -1
    assert np.array_equal(array, expected)
    write_scan(mask_of(2), tmp_path / "labelsTr" / "a.nii.gz")
    with pytest.raises(VoxelscaleError, match="an empty mask"):
        read_case(data.cases[0], data.reading)


def test_several_masks_of_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scan(image(), tmp_path / "a.nii.gz")
    write_scan(mask_of(1, 0), tmp_path / "one.nii.gz")
    both = mask_of(0, 2)
    both.array[4, 2, 6:9] = 2
    write_scan(both, tmp_path / "two.nii.gz")
    (tmp_path / "cases.csv").write_text("image,label\na.nii.gz,one.nii.gz;two.nii.gz\n")
    reading = ReadingConfig(labels={"x": 1, "y": 2})
    data = DataSet(path=tmp_path / "cases.csv", reading=reading)
    array = read_case(data.cases[0], reading)[1].mask.array
    assert np.array_equal(array, np.where(both.array > 0, both.array, mask_of(1, 0).array))
    assert "classes overlap in 3 voxels: the later class is taken there" in capsys.readouterr().err
    nested = ReadingConfig(labels={"whole": [1, 2], "core": 2})
    array = read_case(data.cases[0], nested)[1].mask.array
    assert np.array_equal(array, np.where(both.array > 0, 3, mask_of(1, 0).array))
    assert "overlap" not in capsys.readouterr().err


def test_healthy_cases_have_the_type_of_stored_labels(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    data = DataSet(path=tmp_path, reading=ReadingConfig(allow_empty=True))
    for array in (
        read_case(data.cases[1], data.reading)[1].mask.array,
        read_truth(data.cases[1], data.reading).array,
    ):
        assert array.dtype == np.int16
        assert not array.any()


def test_one_class_is_digested_as_ever(tmp_path: Path) -> None:
    """By what was there before there were several: nothing."""
    decathlon(tmp_path)
    assert digested(DataSet(path=tmp_path).classes, ReadingConfig()) is None
    assert digested(LESION, ReadingConfig()) is None
    assert digested(Classes(values=((2,),)), ReadingConfig(labels=(2,))) is None
    assert digested(Classes(names=("a",), values=((2,),)), ReadingConfig()) == [2]
    mapped = digested(LESION, ReadingConfig(labels={"a": 1, "b": 2}))
    assert mapped["names"] == ["a", "b"]


def test_a_config_keeps_its_labels() -> None:
    config: Config = from_dict({"reading": {"labels": {"a": 1, "b": [2, 3]}}})
    assert settled(LESION, config.reading).names == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "Anterior": 1, "Posterior": 2}, None),
        ({"background": 0, "a": 3, "b": 1, "c": 2}, None),
        ({"background": 0, "a": 1, "b": 2, "ignore": 3}, None),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3]),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enh": [3], "ignore": 4}, [1, 2, 3]),
    ],
)
def test_against_nnunet(labels: dict[str, Any], order: list[int] | None) -> None:
    handling = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")
    theirs = handling.LabelManager(labels, order)
    more = {} if order is None else {"regions_class_order": order}
    ours = of_json(TABLE, {"labels": labels, **more})
    assert ours.regions == theirs.has_regions
    assert ours.outputs == theirs.num_segmentation_heads
    assert ours.ignore == (() if theirs.ignore_label is None else (theirs.ignore_label,))
    assert len(ours.names) == len(theirs.foreground_regions if ours.regions else theirs.foreground_labels)
    random = np.random.default_rng(0)
    import torch

    probabilities = random.random((ours.outputs, 4, 5, 6)).astype(np.float32)
    written = theirs.convert_probabilities_to_segmentation(torch.from_numpy(probabilities)).numpy()
    if ours.regions:
        stored = sum((probabilities[at] > 0.5).astype(np.int16) << at for at in range(len(ours.names)))
        assert np.array_equal(ours.written(np.asarray(stored)), written)
    else:
        # Theirs is the number of the output, which they take for the value.
        stored = probabilities.argmax(0).astype(np.int16)
        assert np.array_equal(stored, written)
