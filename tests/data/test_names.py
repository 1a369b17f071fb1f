"""The key of the hashed names: where it comes from, who may read it, what it decides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from voxelscale.data.names import KEY_FILE, LEAST_BYTES, VARIABLE, Names
from voxelscale.errors import VoxelscaleError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


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


def test_a_short_key_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "k" * (LEAST_BYTES - 1))
    with pytest.raises(VoxelscaleError, match="too short"):
        Names(folder=tmp_path).case("1.2.3")


def test_another_key_in_the_folder_is_told(tmp_path: Path) -> None:
    names = Names(folder=tmp_path / "a")
    names.case("1.2.3")
    Names(folder=tmp_path / "b").case("1.2.3")
    with pytest.raises(VoxelscaleError, match="another key"):
        names.keep_in(tmp_path / "b")
