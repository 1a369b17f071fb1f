"""Credentials and certificates, with a real Orthanc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.archive.hospital import PASSWORD, USER, Orthanc, certificate, in_front, series, uids

from voxelscale.archive.access import PASSWORD as PASSWORD_VARIABLE
from voxelscale.archive.access import TOKEN, Access
from voxelscale.archive.access import USER as USER_VARIABLE
from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.archive.troubles import AwayError
from voxelscale.errors import VoxelscaleError


def secret(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "credentials.yaml"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_basic_authentication(
    start_orthanc: Callable[..., Orthanc], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orthanc = start_orthanc(AuthenticationEnabled=True, RegisteredUsers={USER: PASSWORD})
    orthanc.add(series(tmp_path / "a", "P1"))
    with pytest.raises(AwayError, match="refuses the credentials"):
        DicomWeb(Access(url=orthanc.web)).studies()
    path = secret(tmp_path, f'user: {USER}\npassword: "{PASSWORD}"\n')
    assert len(DicomWeb(Access(url=orthanc.web, credentials=path)).studies()) == 1
    monkeypatch.setenv(USER_VARIABLE, USER)
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    web = DicomWeb(Access(url=orthanc.web))
    assert len(web.studies()) == 1
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    with pytest.raises(AwayError, match="refuses the credentials") as caught:
        web.studies()
    assert "wrong" not in caught.value.message + caught.value.hint


def test_tls(orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = series(tmp_path / "a", "P1")
    orthanc.add(files)
    certificate(tmp_path, "other")
    with in_front(orthanc.port, certificate(tmp_path)) as port:
        url = f"https://127.0.0.1:{port}/dicom-web"
        web = DicomWeb(Access(url=url, ca_file=tmp_path / "server.crt"))
        (entry,) = web.series(web.studies()[0].uid)
        assert web.fetch(entry, tmp_path / "out") == "P1"
        assert entry.series == uids(files)[1]
        with pytest.raises(AwayError, match="its certificate is not trusted"):
            DicomWeb(Access(url=url)).studies()
        # The given file counts, whatever the environment says.
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "server.crt"))
        with pytest.raises(AwayError, match="its certificate is not trusted"):
            DicomWeb(Access(url=url, ca_file=tmp_path / "other.crt")).studies()


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("user: a\n", 0o600, "not user and password"),
        ("user: a\npassword: b\ntoken: c\n", 0o600, "not user and password"),
        ("token: a\n", 0o644, "others can read it"),
        ("token: [\n", 0o600, "not readable as YAML"),
    ],
)
def test_files_of_credentials(tmp_path: Path, text: str, mode: int, problem: str) -> None:
    with pytest.raises(VoxelscaleError, match=problem):
        Access(url="http://127.0.0.1/", credentials=secret(tmp_path, text, mode))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("pacs/dicom-web", "not a URL"),
        ("ftp://pacs/", "not a URL"),
        ("https://pacs:port/", "not a URL"),
        ("https://me:hidden@pacs/", "holds a user or a password"),
    ],
)
def test_urls(url: str, problem: str) -> None:
    with pytest.raises(VoxelscaleError, match=problem) as caught:
        Access(url=url)
    assert "hidden" not in str(caught.value)


def test_one_of_two_variables(monkeypatch: pytest.MonkeyPatch, told: Callable[[], str]) -> None:
    monkeypatch.setenv(USER_VARIABLE, "a")
    with pytest.raises(VoxelscaleError, match="only one of"):
        Access(url="http://127.0.0.1/")
    monkeypatch.setenv(TOKEN, "t")
    assert Access(url="http://pacs.example.org/").secrets() == {"token": "t"}
    assert "without encryption" in told()
