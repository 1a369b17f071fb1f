"""`predict --dicomweb` from a real Orthanc and back to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import RLELossless
from tests.archive.hospital import PASSWORD, USER, Orthanc, series, uids
from tests.conftest import Command

from voxelscale.archive.access import Access
from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.archive.study import fetch_study
from voxelscale.dataset.names import Names


def test_from_orthanc_and_back(
    start_orthanc: Callable[..., Orthanc],
    trained: Path,
    chest: list[Path],
    tmp_path: Path,
    voxelscale: Command,
) -> None:
    orthanc = start_orthanc(AuthenticationEnabled=True, RegisteredUsers={USER: PASSWORD})
    orthanc.add(chest)
    study, one = uids(chest)
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'user: {USER}\npassword: "{PASSWORD}"\n', encoding="utf-8")
    keys.chmod(0o600)
    out = tmp_path / "out"
    command = ["predict", trained, out, "--dicomweb", orthanc.web, "--study", study, "--credentials", keys]
    code, said, err = voxelscale(*command, "--send")
    assert code == 0, err
    assert "2 results sent to the archive" in said
    assert len(orthanc.headers("SEG")) == 1
    (report,) = orthanc.headers("SR")
    assert (report["PatientID"], report["StudyInstanceUID"]) == ("PATIENT7", study)
    (case,) = (folder.name for folder in (out / "scans").iterdir())
    assert pydicom.dcmread(out / case / "sr.dcm").SOPInstanceUID == report["SOPInstanceUID"]
    assert (out / case / "findings.json").is_file()
    again = voxelscale("-v", *command, "--series", one, "--send")
    assert again[0] == 0
    assert "0 results sent" in again[1]
    everything = said + err + "".join(again[1:]) + "".join(map(str, out.rglob("*")))
    assert not [w for w in ("PATIENT7", "SECRET", study, one, PASSWORD) if w in everything]


def test_a_series_whose_instances_were_replaced_is_fetched_again(orthanc: Orthanc, tmp_path: Path) -> None:
    """As many as before, but others: what was fetched is of images that the archive took back."""
    files = series(tmp_path / "a", "P1")
    orthanc.add(files)
    study, one = uids(files)
    web, names = DicomWeb(Access(url=orthanc.web)), Names(how="hash", folder=tmp_path)
    place = fetch_study(web, study, "", tmp_path / "out", names).places[one]
    first = {file.name: file.stat().st_mtime_ns for file in place.iterdir()}
    fetch_study(web, study, "", tmp_path / "out", names)
    assert {file.name: file.stat().st_mtime_ns for file in place.iterdir()} == first
    (known,) = orthanc.get("/series")
    orthanc.ask("DELETE", f"/series/{known}")

    def renew(dataset: pydicom.Dataset) -> None:
        dataset.SOPInstanceUID = f"{dataset.SOPInstanceUID}.9"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID

    orthanc.add(series(tmp_path / "b", "P1", change=renew))
    fetch_study(web, study, "", tmp_path / "out", names)
    here = {str(pydicom.dcmread(file).SOPInstanceUID) for file in place.glob("*.dcm")}
    assert here == set(web.instances(study, one))


def test_compressed_series_arrive_as_they_are(orthanc: Orthanc, tmp_path: Path) -> None:
    truth = [pydicom.dcmread(file).pixel_array for file in series(tmp_path / "a", "P1")]
    files = series(
        tmp_path / "b", "P1", change=lambda d: d.compress(RLELossless, generate_instance_uid=False)
    )
    orthanc.add(files)
    web = DicomWeb(Access(url=orthanc.web))
    (entry,) = web.series(uids(files)[0])
    web.fetch(entry, tmp_path / "out")
    fetched = sorted(
        map(pydicom.dcmread, (tmp_path / "out").iterdir()), key=lambda dataset: dataset.InstanceNumber
    )
    assert {dataset.file_meta.TransferSyntaxUID for dataset in fetched} == {RLELossless}
    assert all((one.pixel_array == other).all() for one, other in zip(fetched, truth, strict=True))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["scans", "out", "--study", "1.2"], "--study without --dicomweb"),
        (["out", "--dicomweb", "http://127.0.0.1:1/"], "--dicomweb without --study"),
        (
            ["scans", "out", "--dicomweb", "http://127.0.0.1:1/", "--study", "1.2"],
            "takes the place of SCANS",
        ),
        (["scans"], "missing argument OUT"),
        (["out", "--dicomweb", "http://127.0.0.1:1/", "--study", "1.2"], "cannot be reached"),
        (["out", "--dicomweb", "http://127.0.0.1:1/", "--study", "x/../y"], "--study: not a UID"),
    ],
)
def test_usage(
    voxelscale: Command, trained: Path, options: list[str], problem: str, tmp_path: Path
) -> None:
    placed = [tmp_path / "out" if word == "out" else word for word in options]
    code, _, err = voxelscale("predict", trained, *placed)
    assert code == 2
    assert problem in err


def test_a_study_that_is_not_there(
    orthanc: Orthanc, voxelscale: Command, trained: Path, tmp_path: Path
) -> None:
    code, _, err = voxelscale(
        "predict", trained, tmp_path / "o", "--dicomweb", orthanc.web, "--study", "1.2.3"
    )
    assert code == 2
    assert "the archive has no CT series in this study" in err
    assert "1.2.3" not in err
