"""Folds that a data set or its user gives, folds by patient, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import SHARED, Command
from tests.dataset.test_layouts import decathlon, image, mask, nnunet

from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.dataset.folds import Fold, folds_of, kfold
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import write_scan
from voxelscale.geometry import to_itk
from voxelscale.store import open_store

TWO = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]


def with_splits(folder: Path, content: Any) -> DataSet:
    nnunet(folder)
    (folder / "splits_final.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return DataSet(path=folder)


def test_the_file_beside_a_data_set(tmp_path: Path) -> None:
    data = with_splits(tmp_path, TWO)
    assert data.folds == (Fold(train=("a",), val=("b",)), Fold(train=("b",), val=("a",)))
    (tmp_path / "splits_final.json").rename(tmp_path / "mine.json")
    assert DataSet(path=tmp_path).folds == ()
    assert DataSet(path=tmp_path, splits=str(tmp_path / "mine.json")).folds == data.folds
    with pytest.raises(VoxelscaleError, match=r"none\.json: no such file"):
        _ = DataSet(path=tmp_path, splits=str(tmp_path / "none.json")).folds


def test_luna16s_subsets_are_its_folds(tmp_path: Path) -> None:
    uids = [luna16_scan(tmp_path / f"subset{number % 10}", f"1.2.{number}") for number in range(12)]
    data = DataSet(path=tmp_path)
    assert [fold.val for fold in data.folds] == [
        (uids[0], uids[10]),
        (uids[1], uids[11]),
        *((uid,) for uid in uids[2:10]),
    ]
    assert all(sorted(fold.train + fold.val) == sorted(uids) for fold in data.folds)
    single = DataSet(path=tmp_path / "subset0", layout="luna16")
    assert single.folds == (), "one part alone is no cross-validation"


def test_a_store_of_luna16_has_its_folds(tmp_path: Path, voxelscale: Command) -> None:
    for number in range(4):
        luna16_scan(tmp_path / "luna" / f"subset{number % 2}", f"1.2.{number}")
    centre = image().grid.index_to_mm((5, 8, 9))
    rows = [f"1.2.{number},{','.join(map(str, centre))},6.0" for number in range(4)]
    header = "seriesuid,coordX,coordY,coordZ,diameter_mm"
    (tmp_path / "luna" / "annotations.csv").write_text("\n".join([header, *rows]) + "\n")
    sets = ["--set", "prepare.workers=1", "--set", "prepare.plan=false", "--set", "prepare.spacing=[2,1,1]"]
    code, _, errors = voxelscale("-v", "prepare", tmp_path / "luna", tmp_path / "store", *sets)
    assert code == 0, errors
    assert "2 folds as the data set says" in errors
    store = open_store(tmp_path / "store")
    assert [fold.val for fold in store.folds] == [("1.2.0", "1.2.2"), ("1.2.1", "1.2.3")]
    assert {info.case: info.split for info in store.cases} == store.folds[0].split_of


def test_luna16s_table_says_the_folds_of_scans_that_lie_elsewhere(tmp_path: Path) -> None:
    for number in range(3):
        luna16_scan(tmp_path / "scans", f"1.2.{number}")
    table = tmp_path / "folds.json"
    table.write_text(json.dumps({"1": ["1.2.0"], "0": ["1.2.2", "1.2.1"]}))
    reading = ReadingConfig(names="hash")
    data = DataSet(path=tmp_path / "scans", layout="luna16", splits=str(table), reading=reading)
    called = {source.series: source.case for source in data.cases}
    assert [fold.val for fold in data.folds] == [(called["1.2.2"], called["1.2.1"]), (called["1.2.0"],)]


@pytest.mark.skipif(not (SHARED / "luna16").is_dir(), reason="no real tables beside the checkout")
def test_the_real_table_of_luna16() -> None:
    content = json.loads((SHARED / "luna16" / "subset_to_filenames.json").read_text())
    folds = folds_of("table", content, lambda name: name)
    assert [len(fold.val) for fold in folds] == [89] * 8 + [88] * 2
    assert {len(fold.train) + len(fold.val) for fold in folds} == {888}


def luna16_scan(folder: Path, uid: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(to_itk(image()), str(folder / f"{uid}.mhd"))
    return uid


def test_folds_name_cases_as_files_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cases are called here."""
    monkeypatch.setenv("VOXELSCALE_NAME_KEY", "a key for tests")
    decathlon(tmp_path)
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind / "lung_001.nii.gz").rename(tmp_path / kind / "lung 001.nii.gz")
    text = (tmp_path / "dataset.json").read_text().replace("lung_001", "lung 001")
    (tmp_path / "dataset.json").write_text(text)
    content = [{"train": ["lung 001"], "val": ["lung_002"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(content))
    assert DataSet(path=tmp_path).folds == (Fold(train=("lung_001",), val=("lung_002",)),)
    hashed = DataSet(path=tmp_path, reading=ReadingConfig(names="hash"))
    one, two = (source.case for source in hashed.cases)
    assert one.startswith("case-")
    assert hashed.folds == (Fold(train=(one,), val=(two,)),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"train": ["a"], "val": ["c"]}], "fold 0 names c, which the data set does not list"),
        ([*TWO, {"train": ["x", "y"], "val": ["b"]}], r"fold 2 names x \(and 1 more\)"),
        ([{"train": ["a", "b"], "val": ["b"]}], "fold 0 has b in both train and val"),
        ([{"train": ["a"]}], "fold 0 has no list 'val'"),
        ([{"train": "ab", "val": ["b"]}], "fold 0 has no list 'train'"),
        ([{"train": ["a"], "val": [1]}], "fold 0 has no list 'val'"),
        ([{"train": ["a"], "val": []}], "fold 0 has no case in 'val'"),
        ([["a"], ["b"]], "fold 0 has no list 'train'"),
        ({"train": ["a"], "val": ["b"]}, "no list of 1 to 1000 folds"),
        ({"0": ["a", "b"], "1": ["b"]}, "b is in fold 0 and in fold 1"),
        ({"0": ["a"], "1": "b"}, "fold 1 is no list of names"),
        ({"0": ["a"], "1": ["b", "c"]}, "names c, which the data set does not list"),
        ({"0": ["a", "b"]}, "fold 0 has no case in 'train'"),
        ([], "no list of 1 to 1000 folds"),
        ([TWO[0]] * 1001, "no list of 1 to 1000 folds"),
        ("[{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_folds_that_cannot_be_are_one_line(tmp_path: Path, content: Any, words: str) -> None:
    data = with_splits(tmp_path, content)
    assert len(data.cases) == 2, "the data set itself can be read"
    with pytest.raises(VoxelscaleError, match=words) as caught:
        _ = data.folds
    assert "splits_final.json: " in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def table(folder: Path, header: str, *rows: str) -> DataSet:
    write_scan(image(), folder / "i.nii.gz")
    write_scan(mask(), folder / "m.nii.gz")
    lines = [f"case,image,label,{header}", *(f"c{n},i.nii.gz,m.nii.gz,{row}" for n, row in enumerate(rows))]
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    return DataSet(path=folder / "cases.csv")


def test_a_column_split(tmp_path: Path) -> None:
    data = table(tmp_path, "split", "train", "VAL", "test", "training")
    assert [source.split for source in data.cases] == ["train", "val", "test", "train"]
    assert data.folds == ()
    assert all(source.split == "" for source in data.scans), "of scans to predict nothing is asked"


def test_a_column_fold(tmp_path: Path) -> None:
    data = table(tmp_path, "patient,fold", "p,2", "p,2", "q,0", "r,0", "s,1", "t,")
    assert data.folds == (
        Fold(train=("c0", "c1", "c4"), val=("c2", "c3")),
        Fold(train=("c0", "c1", "c2", "c3"), val=("c4",)),
        Fold(train=("c2", "c3", "c4"), val=("c0", "c1")),
    )
    tested = table(tmp_path, "split,fold", "train,0", "train,1", "test,1")
    assert tested.folds == (Fold(train=("c1",), val=("c0",)), Fold(train=("c0",), val=("c1",)))


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("split", ("train", "tain"), "line 3: split is 'tain'"),
        ("split", ("train", ""), "line 3: split is ''"),
        ("patient,split", ("p,train", "p,val"), r"c0 \(train\) and c1 \(val\) are of one patient"),
        ("patient,split", ("p,train", "p,test"), r"c0 \(train\) and c1 \(test\) are of one patient"),
        ("fold", ("0", "1.5"), "line 3: fold is '1.5'"),
        ("fold", ("0", "-1"), "line 3: fold is '-1'"),
        ("fold", ("3", "3"), "one number only"),
    ],
)
def test_columns_that_cannot_be(tmp_path: Path, header: str, rows: tuple[str, ...], words: str) -> None:
    with pytest.raises(VoxelscaleError, match=words) as caught:
        _ = table(tmp_path, header, *rows).cases
    assert "cases.csv" in caught.value.message


def test_a_patient_on_both_sides_of_a_fold(tmp_path: Path) -> None:
    data = table(tmp_path, "patient,fold", "p,0", "p,1", "q,1")
    with pytest.raises(VoxelscaleError, match=r"its folds: fold 0: c1 \(train\) and c0 \(val\) are of one"):
        _ = data.folds
    (tmp_path / "mine.json").write_text(json.dumps([{"train": ["c0"], "val": ["c1"]}]))
    mine = DataSet(path=tmp_path / "cases.csv", splits=str(tmp_path / "mine.json"))
    with pytest.raises(VoxelscaleError, match=r"mine\.json: fold 0: c0 \(train\) and c1 \(val\)"):
        _ = mine.folds


@given(
    patients=st.dictionaries(
        st.text("abc", min_size=1, max_size=4), st.sampled_from("pqrstuvw"), min_size=1
    ),
    k=st.integers(2, 6),
    seed=st.integers(0, 2**32),
)
def test_folds_by_patient(patients: dict[str, str], k: int, seed: int) -> None:
    every = set(patients.values())
    if len(every) < k:
        with pytest.raises(VoxelscaleError, match=f"{k} folds of {len(every)} patients"):
            kfold(patients, k, seed)
        return
    folds = kfold(patients, k, seed)
    assert len(folds) == k
    held = []
    for fold in folds:
        assert not {patients[case] for case in fold.train} & {patients[case] for case in fold.val}
        assert sorted([*fold.train, *fold.val]) == sorted(patients)
        held.append({patients[case] for case in fold.val})
    assert set.union(*held) == every
    assert sum(map(len, held)) == len(every), "each patient validates once"
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert kfold(dict(reversed(patients.items())), k, seed)[0].val == tuple(
        case for case in reversed(patients) if case in folds[0].val
    )


def test_folds_do_not_depend_on_what_patients_are_called(tmp_path: Path) -> None:
    patients = {f"c{n}": f"p{n // 2}" for n in range(20)}
    renamed = {case: f"x{hash((patient, 7))}" for case, patient in patients.items()}
    order = {renamed[case]: patient for case, patient in patients.items()}
    assert kfold(patients, 5, 3) == kfold(renamed, 5, 3, order)
    assert kfold(patients, 5, 3) != kfold(patients, 5, 4)


@pytest.mark.skipif(not (SHARED / "msd_hippocampus").is_dir(), reason="the data set is not here")
def test_the_folds_of_the_hippocampus() -> None:
    data = DataSet(path=SHARED / "msd_hippocampus")
    assert data.classes.names == ("Anterior", "Posterior")
    assert [channel.scheme for channel in data.channels] == ["zscore"]
    given_folds = json.loads((SHARED / "msd_hippocampus" / "splits_final.json").read_text())
    assert [list(fold.val) for fold in data.folds] == [fold["val"] for fold in given_folds]
    assert [list(fold.train) for fold in data.folds] == [fold["train"] for fold in given_folds]
