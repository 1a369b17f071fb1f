"""The commands, inputs that lie, and what must not get out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pydicom
import pytest
from tests.conftest import Command
from tests.dicom_out.conftest import Judge
from tests.dicom_out.made import predict_by_hand, source_of
from tests.dicom_out.test_objects import BALLS, ct_of
from tests.formats.test_dicom import slices, write
from tests.labels.test_drawn import SERIES, places
from tests.pages import checked
from tests.predict.test_several_classes import made

from voxelscale.channels import ONE_CT
from voxelscale.classes import NODULE
from voxelscale.config import Config, load
from voxelscale.config.export import ExportConfig
from voxelscale.console import set_verbosity
from voxelscale.dicom_out.export import export_case
from voxelscale.dicom_out.kinds import ALL_KINDS
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_label, write_scan
from voxelscale.geometry import Scan
from voxelscale.model.bundle import write_bundle
from voxelscale.phantom.dataset import write_phantoms

PHI = {
    "PatientName": "Planted^Priscilla",
    "PatientID": "PHI-4711",
    "PatientBirthDate": "19330303",
    "ReferringPhysicianName": "Planted^Referrer",
    "AccessionNumber": "PHI-ACC-1",
    "StudyDescription": "PHI study text",
}
"""Goes into the DICOM objects, and nowhere else."""

NEVER = {
    "PatientComments": "PHI comments",
    "PatientAddress": "PHI street 1",
    "InstitutionName": "PHI hospital",
    "OperatorsName": "Planted^Operator",
    "SeriesDescription": "PHI series text",
    "ProtocolName": "PHI protocol",
    "StationName": "PHISTATION",
    "ImageComments": "PHI image",
}
"""Goes nowhere."""


def planted(folder: Path) -> Path:
    files = ct_of("prone", folder)
    for file in files:
        for keyword, value in (PHI | NEVER).items():
            setattr(file, keyword, value)
        block = file.private_block(0x0011, "PHI PRIVATE", create=True)
        block.add_new(1, "LO", "PHI private value")
    return write(files, folder)


def texts(*files: Path) -> str:
    return "\n".join(file.read_bytes().decode("latin-1") for file in files)


def test_what_identifies_stays_where_it_belongs(
    tmp_path: Path, voxelscale: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    ct, out = planted(tmp_path / "ct"), tmp_path / "out"
    predict_by_hand(out, source_of(ct), [BALLS], probabilities=True)
    code, stdout, stderr = voxelscale("--verbose", "export-dicom", out, ct, "--kinds", ",".join(ALL_KINDS))
    assert code == 0, stderr
    assert "5 files of 1 case" in stdout
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    objects = sorted(folder.glob("*.dcm"))
    assert len(objects) == 4
    said = stdout + stderr + "".join(path.name for path in out.rglob("*")) + texts(folder / "page.html")
    assert not re.search("PHI|Planted|Priscilla|19330303|1933-03-03", said)
    assert not [value for value in NEVER.values() if value in texts(*objects)]
    for path in objects:
        made = pydicom.dcmread(path)
        assert "private value" not in str(made)
        for keyword, value in PHI.items():
            assert str(made[keyword].value) == value
    again = voxelscale("export-dicom", out, ct, "--kinds", "page", "--set", "export.patient_names=true")
    assert again[0] == 0
    page = (folder / "page.html").read_text()
    assert "Planted Priscilla" in page
    assert "PHI-4711" in page
    assert "1933-03-03" in page


def test_values_that_break_the_rules_are_left_empty_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: Judge
) -> None:
    ct = planted(tmp_path / "ct")
    for path in ct.iterdir():
        file = pydicom.dcmread(path)
        for tag, value in ((0x00100030, "PHI birth"), (0x00100040, "PHI sex "), (0x00080030, "25 o'clock")):
            del file[tag]
            file.add_new(tag, "LO", value)
        del file.PatientName
        file.ReferringPhysicianName = ["PHI^A", "PHI^B"]  # one is allowed
        file.save_as(path)
    predict_by_hand(tmp_path / "out", source_of(ct), [BALLS])
    capsys.readouterr()
    made = export_case(tmp_path / "out", source_of(ct), tmp_path / "out", ["seg", "sr", "rtstruct"])
    err = capsys.readouterr().err
    assert "PatientBirthDate, PatientSex, StudyTime, ReferringPhysicianName" in err
    assert "PHI" not in err
    for path in made:
        judge(path)
        assert pydicom.dcmread(path).PatientBirthDate == ""


@pytest.mark.parametrize(
    ("sets", "name"),
    [
        ("ISO_IR 100", "Größe^Ünal"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 192", "Ψ^Ω"),
    ],
)
def test_names_in_any_alphabet(sets: str | list[str], name: str, tmp_path: Path, judge: Judge) -> None:
    files = ct_of("prone", tmp_path / "ct")
    for file in files:
        file.SpecificCharacterSet, file.PatientName, file.StudyDate = sets, name, "20240231"
    write(files, tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    predict_by_hand(tmp_path / "out", source, [BALLS])
    for path in export_case(tmp_path / "out", source, tmp_path / "out", ["seg", "sr", "rtstruct"]):
        judge(path)
        made = pydicom.dcmread(path)
        assert made.PatientName == name
        assert made.StudyDate == "", "there is no such day"


def faulty(ct: Path, change: Callable[[int, pydicom.FileDataset], None]) -> None:
    for number, path in enumerate(sorted(ct.iterdir())):
        file = pydicom.dcmread(path)
        change(number, file)
        file.save_as(path, enforce_file_format=False)


def no_uid(number: int, file: pydicom.FileDataset) -> None:
    if number == 4:
        del file.SOPInstanceUID


def one_uid(number: int, file: pydicom.FileDataset) -> None:
    file.SOPInstanceUID = "1.2.3.4"


def long_uid(number: int, file: pydicom.FileDataset) -> None:
    file.SOPInstanceUID = f"1.2.3.{number}." + "4" * 70


def no_study(number: int, file: pydicom.FileDataset) -> None:
    file.StudyInstanceUID = ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_uid, "without a valid SOPInstanceUID"),
        (long_uid, "without a valid SOPInstanceUID"),
        (one_uid, "two of its slices have one SOPInstanceUID"),
        (no_study, "no valid StudyInstanceUID"),
    ],
)
@pytest.mark.filterwarnings("ignore:The value length")
def test_what_a_result_cannot_refer_to_is_refused(
    change: Callable[[int, pydicom.FileDataset], None], words: str, tmp_path: Path
) -> None:
    ct_of("prone", tmp_path / "ct")
    faulty(tmp_path / "ct", change)
    source = source_of(tmp_path / "ct")
    predict_by_hand(tmp_path / "out", source, [BALLS])
    with pytest.raises(VoxelscaleError) as caught:
        export_case(tmp_path / "out", source, tmp_path / "dicom", ["seg"])
    assert words in caught.value.message
    assert caught.value.message.startswith(source.case)
    assert "export the series again" in caught.value.hint
    assert not (tmp_path / "dicom").exists()


def test_a_source_without_a_frame_of_reference_or_dates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: Judge
) -> None:
    steps, axes, shift = SERIES["prone"]
    hu = np.random.default_rng(0).integers(-900, 200, (10, 24, 30)).astype(np.int16)
    write(slices(hu, places(steps, axes, shift), axes), tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    predict_by_hand(tmp_path / "out", source, [BALLS])
    made = export_case(tmp_path / "out", source, tmp_path / "out", ["seg", "sr", "rtstruct"])
    assert "no frame of reference" in capsys.readouterr().err
    for path in made:
        judge(path)
    frames = {pydicom.dcmread(path).FrameOfReferenceUID for path in (made[0], made[2])}
    assert len(frames) == 1
    assert pydicom.dcmread(made[0]).ContentDate == "19000101"


def test_a_scan_without_pixel_spacing(tmp_path: Path, voxelscale: Command) -> None:
    ct_of("prone", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    predict_by_hand(tmp_path / "out", source, [BALLS])
    faulty(tmp_path / "ct", lambda number, file: delattr(file, "PixelSpacing"))
    (tmp_path / "out" / source.case / "case.json").unlink()  # as if it were the scan that was predicted
    code, _, err = voxelscale("export-dicom", tmp_path / "out", tmp_path / "ct")
    assert code == 2
    assert f"error: {source.case}: slices without a pixel spacing" in err
    assert "hint: export the series again" in err


def test_another_scans_prediction_is_refused(tmp_path: Path) -> None:
    ct_of("prone", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    folder = predict_by_hand(tmp_path / "out", source, [BALLS])
    stamp = json.loads((folder / "case.json").read_text())
    (folder / "case.json").write_text(json.dumps(stamp | {"scan": "another"}))
    with pytest.raises(VoxelscaleError, match="predicted from another scan"):
        export_case(tmp_path / "out", source, tmp_path / "out", ["seg"])
    (folder / "case.json").unlink()
    mask = read_label(folder / "mask.nii.gz")
    affine = mask.affine.copy()
    affine[:3, 3] += 5
    write_scan(Scan(mask.array, affine), folder / "mask.nii.gz")
    with pytest.raises(VoxelscaleError, match=r"mask\.nii\.gz does not lie on the scan"):
        export_case(tmp_path / "out", source, tmp_path / "out", ["seg"])
    assert not list(folder.glob("*.dcm"))


def test_a_mask_that_is_none_of_the_findings_is_refused(tmp_path: Path) -> None:
    ct_of("prone", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    folder = predict_by_hand(tmp_path / "out", source, [BALLS])
    mask = read_label(folder / "mask.nii.gz")
    mask.array[0, 0, 0] = 1
    write_scan(mask, folder / "mask.nii.gz")
    with pytest.raises(VoxelscaleError, match="what is none of its findings") as caught:
        export_case(tmp_path / "out", source, tmp_path / "out", ["seg"])
    assert caught.value.hint == "run voxelscale predict again"


def test_a_code_of_no_class_is_refused(tmp_path: Path, voxelscale: Command) -> None:
    ct_of("prone", tmp_path / "ct")
    predict_by_hand(tmp_path / "out", source_of(tmp_path / "ct"), [BALLS])
    codes = "export.codes={nodul: [SCT, 27925004, Nodule]}"
    code, _, err = voxelscale("export-dicom", tmp_path / "out", tmp_path / "ct", "--set", codes)
    assert code == 2
    assert "export.codes names nodul, but its classes are lesion" in err


@pytest.mark.parametrize("facts", [{"merge_mm": "much"}, {"merge_mm": None}, {"classes": 5}])
def test_facts_that_are_none(facts: dict[str, object], tmp_path: Path) -> None:
    ct_of("prone", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    folder = predict_by_hand(tmp_path / "out", source, [BALLS])
    content = json.loads((folder / "findings.json").read_text())
    (folder / "findings.json").write_text(json.dumps(content | facts))
    with pytest.raises(VoxelscaleError):
        export_case(tmp_path / "out", source, tmp_path / "out", ["seg"])


def test_probabilities_that_were_not_kept(tmp_path: Path) -> None:
    ct_of("prone", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    predict_by_hand(tmp_path / "out", source, [BALLS])
    with pytest.raises(VoxelscaleError, match="probabilities were not kept") as caught:
        export_case(tmp_path / "out", source, tmp_path / "out", ["seg", "probability"])
    assert "predict.probabilities=true" in caught.value.hint


@pytest.mark.parametrize(
    ("kinds", "words"),
    [("seg,tiff", "tiff"), ("", "''"), ("SEG, sr", "")],
    ids=["unknown", "none", "right"],
)
def test_kinds(kinds: str, words: str, tmp_path: Path, voxelscale: Command) -> None:
    ct_of("prone", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    folder = predict_by_hand(tmp_path / "out", source, [BALLS])
    code, _, err = voxelscale("export-dicom", tmp_path / "out", tmp_path / "ct", "--kinds", kinds)
    if words:
        assert code == 2
        assert f"error: {words}: nothing that can be written" in err
        assert "seg, probability, sr, rtstruct, page" in err
    else:
        assert code == 0
        assert sorted(path.name for path in folder.glob("*.dcm")) == ["seg.dcm", "sr.dcm"]


def test_without_highdicom(tmp_path: Path, voxelscale: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    code, _, err = voxelscale("export-dicom", tmp_path, tmp_path)
    assert code == 2
    assert "hint: pip install 'voxelscale[hospital]'" in err


@pytest.fixture
def model(tiny: Config, tmp_path: Path) -> Path:
    """A network of nodules that was never trained, but is sure of itself."""
    sets = ["data.patch_size=[16,32,32]", "predict.refuse_unusable=false", "predict.lungs=false"]
    config = load(sets=[*sets, "predict.skip_air=false", "predict.min_volume_mm3=300"], base=tiny)
    write_bundle(tmp_path / "model.vxs", made(config, NODULE, ONE_CT, sharp=40.0))
    return tmp_path / "model.vxs"


def test_predict_writes_dicom(
    model: Path, tiny: Config, tmp_path: Path, voxelscale: Command, judge: Judge
) -> None:
    data, out = tmp_path / "scans", tmp_path / "out"
    ct_of("coronal", data / "a")
    ct_of("tilted", data / "b")
    kinds = ",".join(ALL_KINDS)
    code, stdout, err = voxelscale("predict", model, data, out, "--dicom-out", kinds)
    assert code == 0, err
    assert "10 files of 2 cases" in stdout
    folders = [path for path in out.iterdir() if path.is_dir()]
    for folder in folders:
        found = sorted(path.name for path in folder.iterdir())
        assert found == [
            *("case.json", "findings.csv", "findings.json", "mask.nii.gz", "page.html", "probability.dcm"),
            *("probability.nii.gz", "rtstruct.dcm", "seg.dcm", "sr.dcm"),
        ]
        for path in folder.glob("*.dcm"):
            judge(path)
        kept = read_label(folder / "probability.nii.gz").array
        mask = read_label(folder / "mask.nii.gz").array
        assert mask.any()
        assert kept[mask > 0].min() >= 127
        content = json.loads((folder / "findings.json").read_text())
        assert (content["class"], content["merge_mm"]) == ("lesion", 0.0)
    before = {path: path.read_bytes() for path in out.rglob("*.dcm")}
    again = voxelscale("predict", model, data, out, "--dicom-out", kinds)
    assert again[0] == 0
    assert {path: path.read_bytes() for path in out.rglob("*.dcm")} == before
    shutil.rmtree(out)
    assert voxelscale("predict", model, data, out, "--dicom-out", kinds)[0] == 0
    assert {path: path.read_bytes() for path in out.rglob("*.dcm")} == before, "from the first step on"
    _, _, err = voxelscale("predict", model, data, out, "--set", "predict.probabilities=true")
    assert "earlier" not in err, "the same prediction is kept"
    _, _, err = voxelscale("predict", model, data, out, "--set", "predict.threshold=0.45")
    assert f"files of earlier predictions: {folders[0].name}/" in err or f": {folders[1].name}/" in err
    assert "seg.dcm" in err


def test_findings_are_as_the_schema_says(model: Path, tmp_path: Path, voxelscale: Command) -> None:
    schema = json.loads(files("voxelscale.findings").joinpath("findings.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    ct_of("coronal", tmp_path / "ct")
    assert voxelscale("predict", model, tmp_path / "ct", tmp_path / "out")[0] == 0
    (path,) = (tmp_path / "out").glob("*/findings.json")
    content = json.loads(path.read_text())
    assert content["findings"]
    judge.validate(content)
    known = set(schema["$defs"]["finding"]["properties"]) - {"label"}
    assert set(content["findings"][0]) == known, "all that is written is described"
    assert set(content) <= set(schema["properties"])
    for change in ({"probability": 1.5}, {"x": "1"}, {"axial_ends": [[1, 2]]}, {"other": 1}):
        wrong = content | {"findings": [content["findings"][0] | change]}
        assert not judge.is_valid(wrong), change


def test_scans_that_are_no_dicom(model: Path, tiny: Config, tmp_path: Path, voxelscale: Command) -> None:
    write_phantoms(load(sets=["phantom.cases=1"], base=tiny).phantom, tmp_path / "ph", workers=1)
    image = next((tmp_path / "ph" / "images").iterdir())
    code, _, err = voxelscale("predict", model, image, tmp_path / "out", "--dicom-out", "seg")
    assert code == 2
    assert "did not come as DICOM" in err
    assert "hint: give the DICOM series that it was converted from" in err
    assert not (tmp_path / "out").exists(), "nothing was predicted in vain"
    ct_of("prone", tmp_path / "ct")
    table = tmp_path / "both.csv"
    table.write_text(f"image\n{image}\n{tmp_path / 'ct'}\n")
    code, stdout, err = voxelscale("predict", model, table, tmp_path / "out", "--dicom-out", "seg")
    assert code == 0, err
    name = image.name.split(".")[0]
    assert f"warning: did not come as DICOM, so no DICOM is written of {name}: give the DICOM series" in err
    assert "1 file of 1 case" in stdout


def test_the_page_fits_on_one_sheet(tmp_path: Path) -> None:
    ct_of("prone", tmp_path / "ct")
    source = source_of(tmp_path / "ct")
    balls = [[(0.1 + 0.2 * (i % 5), 0.1 + 0.25 * (i % 4), 0.05 + 0.07 * i, 1.6) for i in range(14)]]
    folder = predict_by_hand(tmp_path / "out", source, balls)
    content = json.loads((folder / "findings.json").read_text())
    content["warnings"] = ["<b>a long warning</b> " * 12] * 5
    (folder / "findings.json").write_text(json.dumps(content))
    options = ExportConfig(patient_names=True)
    (page,) = export_case(tmp_path / "out", source, tmp_path / "out", ["page"], options)
    html = page.read_text()
    checked(html)
    assert "and 3 more in findings.json" in html
    assert "<b>a long" not in html
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium to print with")
    set_verbosity(0)
    pdf = tmp_path / "page.pdf"
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer", f"--print-to-pdf={pdf}"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    subprocess.run([chromium, *how, profile, page.as_uri()], check=True, capture_output=True, timeout=120)
    printed = pdf.read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1
    box = re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", printed)
    assert box is not None
    assert [round(float(n)) for n in box.groups()] == [595, 842], "A4"
