"""Planted identifiers of patients are looked for in every byte that a pipeline writes."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from tests.formats.test_formats import write_series
from tests.labels.test_kinds import boundaries, write_rtstruct

from voxelscale.config import Config, ReadingConfig, dump
from voxelscale.dataset import DataSet
from voxelscale.dataset.listing import list_sources
from voxelscale.dataset.names import Names
from voxelscale.dataset.reading import read_image
from voxelscale.evaluate.evaluate import evaluate_folder
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, affine_from_itk
from voxelscale.store import open_store, read_info

PLANTED = {
    "PatientName": "Zyxwvut^Quirin",
    "PatientID": "MRN7788123",
    "PatientBirthDate": "19510203",
    "AccessionNumber": "ACC5566778",
    "InstitutionName": "Hopital Sanssouci-Nord",
    "ReferringPhysicianName": "Drxqz^Ottokar",
}


FOLDER = "DOE^JOHN_19500101"
"""Of a patient's files, with a number; archives call folders so."""


def volume(seed: int) -> tuple[Scan, Scan]:
    """Noise with a bright ball, and the ball."""
    random = np.random.default_rng(seed)
    affine = affine_from_itk((-60.0, -60.0, 100.0 * seed), (3.0, 3.0, 4.0), np.eye(3))
    z, y, x = np.indices((20, 40, 40))
    ball = (z - 9) ** 2 * 16 + (y - 18) ** 2 * 9 + (x - 21) ** 2 * 9 < 14**2
    hu = random.normal(-800, 40, ball.shape) + 850 * ball
    return Scan(hu.astype(np.int16), affine), Scan(ball.astype(np.uint8), affine)


def plant(path: Path, patient: int) -> pydicom.Dataset:
    data = pydicom.dcmread(path)
    for keyword, text in PLANTED.items():
        setattr(data, keyword, text if keyword == "PatientBirthDate" else f"{text}{patient}")
    return data


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients with an RTSTRUCT each, one series broken, in folders called after them."""
    folder = tmp_path_factory.mktemp("archive")
    for patient in range(4):
        scan, mask = volume(patient)
        uid, place = generate_uid(), folder / f"{FOLDER}{patient}"
        write_series(place / "ct", scan, uid=uid, drop=7 if patient == 3 else None)
        for path in (place / "ct").iterdir():
            plant(path, patient).save_as(path)
        write_rtstruct(place / "rt.dcm", {"Nodule": boundaries(mask)})
        structure = plant(place / "rt.dcm", patient)
        frame, study, series = (pydicom.Dataset() for _ in range(3))
        series.SeriesInstanceUID = uid
        study.RTReferencedSeriesSequence = [series]
        frame.RTReferencedStudySequence = [study]
        structure.ReferencedFrameOfReferenceSequence = [frame]
        structure.SeriesInstanceUID, structure.StudyInstanceUID = generate_uid(), generate_uid()
        structure.save_as(place / "rt.dcm")
    return folder


@pytest.fixture(scope="module", params=["auto", "series", "hash"])
def pipeline(
    request: pytest.FixtureRequest, tiny: Config, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """Everything that the commands wrote into files, and what they said on stdout and on stderr."""
    out = tmp_path_factory.mktemp("out")
    (out / "config.yaml").write_text(dump(tiny))
    sets = [
        f"reading.names={request.param}",
        "prepare.split=[1,1,1]",
        "train.samples=8",
        "prepare.plan=false",
    ]
    steps: list[tuple[int, list[object]]] = [
        (0, ["inspect", archive, out / "page.html"]),
        (0, ["inspect", archive, "--json"]),
        (2, ["prepare", archive, out / "store"]),
        (0, ["train", out / "store", out / "run"]),
        (
            0,
            [
                "predict",
                out / "run",
                archive,
                out / "predictions",
                "--store",
                out / "store",
                "--split",
                "test",
            ],
        ),
        (0, ["evaluate", out / "predictions", archive]),
        (0, ["report", out / "predictions", archive, "--out", out / "report.html"]),
    ]
    if request.param != "auto":
        steps = steps[1:3]
    said, told = "", ""
    for code, step in steps:
        command = [sys.executable, "-m", "voxelscale.cli", "--verbose", *map(str, step)]
        command += ["--config", str(out / "config.yaml"), *(w for s in sets for w in ("--set", s))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        said += done.stdout
        told += done.stderr
    return out, said, told


def everything_written(out: Path, said: str) -> dict[str, bytes]:
    """Every byte of files, of their names, and of stdout, by where it is."""
    everything = {"stdout": said.encode()}
    for case in open_store(out / "store").cases:  # its file keeps them compressed
        everything[f"the metadata of {case.case}"] = repr(read_info(out / "store", case.case)).encode()
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            everything[str(path)] = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            everything[f"the name {path}"] = str(path).encode()
    assert len(everything) > 9
    return everything


def is_text(content: bytes) -> bool:
    """Whether these bytes are UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_no_identifier_is_in_any_output(pipeline: tuple[Path, str, str], archive: Path) -> None:
    out, said, told = pipeline
    everything = everything_written(out, said) | {"stderr": told.encode()}
    taken = b"".join(path.read_bytes() for path in archive.rglob("*.dcm"))
    assert all(text.encode() in taken for text in PLANTED.values()), "what is looked for can be found"
    for where, content in everything.items():
        for text in PLANTED.values():
            parts = {text, *text.split("^")}
            for part in parts:
                for form in (part.encode(), part.encode().hex().encode(), part.encode("utf-16-le")):
                    assert form.lower() not in content.lower(), (where, part)


def test_no_folders_name_is_in_any_output(pipeline: tuple[Path, str, str], archive: Path) -> None:
    """But in errors on stderr, where who is to correct a file must learn its place, and in names.csv."""
    out, said, told = pipeline
    assert (archive / f"{FOLDER}0").is_dir()
    everything = everything_written(out, said)
    for folder in ("store", "predictions") if (out / "predictions").is_dir() else ("store",):
        private = out / folder / "names.csv"
        assert private.stat().st_mode & 0o777 == 0o600
        assert FOLDER.encode() in everything.pop(str(private))
    for where, content in everything.items():
        # Three letters are in any few megabytes of weights by chance.
        short = ["DOE"] if is_text(content) else []
        for form in (FOLDER, "DOE^", "DOE_", "JOHN_", "19500101", FOLDER.encode().hex(), *short):
            assert form.lower().encode() not in content.lower(), (where, form)
    kept = [line for line in told.splitlines() if not line.startswith("error: ")]
    assert not any("DOE" in line for line in kept)


def test_the_names_agree_from_command_to_command(pipeline: tuple[Path, str, str]) -> None:
    out, _, told = pipeline
    store = open_store(out / "store")
    assert len(store.cases) == 3
    assert all(case.patient.startswith("patient-") for case in store.cases)
    assert "missing" in told, "the broken series is told"
    if (out / "predictions").is_dir():
        (case,) = (case.case for case in store.split("test"))
        assert (out / "predictions" / case / "mask.nii.gz").is_file()
        assert (out / "predictions" / "evaluation.json").is_file()
        assert (out / "store" / "names.key").read_bytes() == (
            out / "predictions" / "names.key"
        ).read_bytes()
        assert (out / "store" / "names.key").stat().st_mode & 0o777 == 0o600


def test_what_an_evaluation_keeps_of_a_fault_names_the_case(archive: Path, tmp_path: Path) -> None:
    data, predictions = tmp_path / "data", tmp_path / "predictions"
    shutil.copytree(archive, data, ignore=shutil.ignore_patterns(f"{FOLDER}3"))
    for path in data.glob("*/rt.dcm"):
        path.rename(path.with_name("DOE^JOHN.dcm"))
    (tmp_path / "key").write_text("of this test alone")
    config = ReadingConfig(names="hash", name_key=str(tmp_path / "key"))
    sources = list_sources(data, names=Names(how="hash", key_file=config.name_key))
    for source in sources:
        image = read_image(source, ReadingConfig())
        # The first one's mask lies elsewhere.
        shift = np.zeros((4, 4))
        shift[0, 3] = 50.0 * (source is sources[0])
        empty = Scan(np.zeros(image.array.shape, np.uint8), image.affine + shift)
        write_scan(empty, predictions / source.case / "mask.nii.gz")
        (predictions / source.case / "findings.json").write_text("[]")
    summary = evaluate_folder(predictions, DataSet(path=data, reading=config), tmp_path / "out")
    (fault,) = summary["failed"]
    assert "DOE^JOHN.dcm" in fault["error"], "who mends it now is told the file"
    kept = (tmp_path / "out" / "evaluation.json").read_text()
    assert sources[0].case in json.loads(kept)["failed"][0]["error"]
    assert "DOE" not in kept
