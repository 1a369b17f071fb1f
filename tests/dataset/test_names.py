"""The key of the hashed names: where it comes from, who may read it, what it decides."""

from __future__ import annotations

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from voxelscale.dataset.listing import Source
from voxelscale.dataset.names import KEY_FILE, LEAST_BYTES, VARIABLE, Names
from voxelscale.dataset.names_table import TABLE, write_names
from voxelscale.errors import VoxelscaleError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of settings of a user who has no key yet."""
    folder = tmp_path_factory.mktemp("settings")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return folder


def test_a_made_key_is_kept_for_its_owner_only_and_found_again(tmp_path: Path) -> None:
    first = Names(folder=tmp_path).case("1.2.3")
    assert Names(folder=tmp_path).case("1.2.3") == first
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_of_several_at_once_one_key_stays(tmp_path: Path) -> None:
    barrier = Barrier(8)

    def name(_: int) -> str:
        barrier.wait()
        return Names(folder=tmp_path).case("1.2.3")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(name, range(8)))) == 1


def test_file_wins_over_variable_and_variable_over_the_kept_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Names(folder=tmp_path).case("1.2.3")
    monkeypatch.setenv(VARIABLE, "k" * 32)
    by_variable = Names(folder=tmp_path).case("1.2.3")
    (tmp_path / "own").write_text("o" * 32 + "\n")
    by_file = Names(folder=tmp_path, key_file=str(tmp_path / "own")).case("1.2.3")
    assert len({kept, by_variable, by_file}) == 3


def test_a_short_key_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "k" * (LEAST_BYTES - 1))
    with pytest.raises(VoxelscaleError, match="too short"):
        Names(folder=tmp_path).case("1.2.3")


def test_another_key_in_the_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(folder=tmp_path / "a")
    names.case("1.2.3")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    Names(folder=tmp_path / "b").case("1.2.3")
    with pytest.raises(VoxelscaleError, match="another key"):
        names.keep_in(tmp_path / "b")


def test_a_user_has_one_key_in_every_command(tmp_path: Path, user: Path) -> None:
    first = Names().case("1.2.3")
    assert (user / "voxelscale" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert Names(folder=tmp_path / "store").case("1.2.3") == first
    assert Names(folder=tmp_path / "predictions").case("1.2.3") == first


def test_an_old_store_keeps_its_names(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("old" * 12 + "\n")
    (tmp_path / "own").write_text("old" * 12)
    old = Names(key_file=str(tmp_path / "own")).case("1.2.3")
    assert Names(folder=tmp_path).case("1.2.3") == old != Names().case("1.2.3")


def test_settings_that_cannot_be_written_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    folder = Names(folder=tmp_path / "store")
    assert Names(folder=tmp_path / "store").case("1.2.3") == folder.case("1.2.3"), "the store keeps it"
    assert VARIABLE in capsys.readouterr().err
    assert Names().case("1.2.3") != Names().case("1.2.3")


def test_the_table_of_names_grows_and_is_its_owners(tmp_path: Path) -> None:
    one, two = (Source(case=c, patient=c, image=tmp_path / f"张,{c}", series=f"1.{c}") for c in "ab")
    write_names([one], tmp_path)
    path = write_names([two, one], tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["case", "path", "seriesuid"]
    assert rows[1:] == [[s.case, str(s.image), s.series] for s in (one, two)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [TABLE]


def test_the_table_takes_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"caf" + bytes([0xE9]) + b".nii.gz")
    one, two = (Source(case=case, patient=case, image=image) for case in "ab")
    write_names([one], tmp_path)
    text = write_names([two], tmp_path).read_text(encoding="utf-8")
    assert [line.partition(",")[0] for line in text.splitlines()] == ["case", "a", "b"]
