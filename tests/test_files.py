from __future__ import annotations

import os
from pathlib import Path

import pytest

from voxelscale.errors import VoxelscaleError
from voxelscale.files import read_sealed, write_atomic, write_sealed


def test_nothing_but_the_file_stays(tmp_path: Path) -> None:
    write_atomic(tmp_path / "deep" / "a.txt", "one")
    write_atomic(tmp_path / "deep" / "a.txt", "two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "deep").iterdir()] == [("a.txt", "two")]


def test_a_path_that_is_not_utf8_is_written_as_text(tmp_path: Path) -> None:
    write_atomic(tmp_path / "page.html", f"data set {os.fsdecode(b'caf' + bytes([0xE9]))}")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "data set caf\\udce9"


def test_sealed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_sealed(path, b"payload" * 99)
    assert read_sealed(path) == b"payload" * 99


@pytest.mark.parametrize("harm", ["cut", "flip", "other", "missing"])
def test_a_damaged_seal_is_refused(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "a"
    write_sealed(path, b"payload" * 99)
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    else:
        data[-20] ^= harm == "flip"
        path.write_bytes(bytes({"cut": data[:-1], "flip": data, "other": b"x" * 500}[harm]))
    with pytest.raises(VoxelscaleError, match=str(path)):
        read_sealed(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VoxelscaleError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "a.txt", "one")
