"""The journal after kills and full disks, and which storages are taken."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import optuna
import pytest

from voxelscale.errors import VoxelscaleError
from voxelscale.search.storage import JOURNAL, open_storage, strip_password


def study_in(folder: Path) -> optuna.Study:
    return optuna.create_study(storage=open_storage("", folder), study_name="s", load_if_exists=True)


def ask_and_tell(study: optuna.Study, value: float) -> None:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, value)


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_record_that_was_cut_off_is_lost_and_nothing_else(tmp_path: Path, cut: int) -> None:
    ask_and_tell(study_in(tmp_path), 1.0)
    path = tmp_path / JOURNAL
    os.truncate(path, path.stat().st_size - cut)
    again = study_in(tmp_path)
    ask_and_tell(again, 2.0)
    ask_and_tell(study_in(tmp_path), 3.0)
    values = [t.value for t in study_in(tmp_path).get_trials() if t.state.is_finished()]
    assert values[-2:] == [2.0, 3.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_process_that_was_there_before_the_cut_goes_on_too(tmp_path: Path) -> None:
    mine, theirs = study_in(tmp_path), study_in(tmp_path)
    ask_and_tell(mine, 1.0)
    with (tmp_path / JOURNAL).open("ab") as handle:
        handle.write(b'{"op_code": 4, "worker_')
    theirs.get_trials()
    ask_and_tell(mine, 2.0)
    ask_and_tell(theirs, 3.0)
    assert [t.value for t in mine.get_trials()] == [1.0, 2.0, 3.0]
    assert [t.value for t in theirs.get_trials()] == [1.0, 2.0, 3.0]


def test_a_very_long_stump_is_cut_off(tmp_path: Path) -> None:
    mine = study_in(tmp_path)
    ask_and_tell(mine, 1.0)
    with (tmp_path / JOURNAL).open("ab") as handle:
        handle.write(b"\0" * 20_000)
    ask_and_tell(study_in(tmp_path), 2.0)
    assert [t.value for t in study_in(tmp_path).get_trials()] == [1.0, 2.0]


def test_a_journal_damaged_in_its_middle_is_reported(tmp_path: Path) -> None:
    ask_and_tell(study_in(tmp_path), 1.0)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"garbage\n", *lines[1:]]))
    with pytest.raises(VoxelscaleError, match="damaged") as told:
        study_in(tmp_path)
    assert str(path) in told.value.message


def test_a_full_disk_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    ask_and_tell(study, 1.0)
    size = (tmp_path / JOURNAL).stat().st_size
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_write_on_a_full_disk, args=(tmp_path, size + 30))
    child.start()
    child.join()
    assert child.exitcode == 0
    ask_and_tell(study_in(tmp_path), 2.0)
    assert [t.value for t in study_in(tmp_path).get_trials() if t.value is not None] == [1.0, 2.0]


def _write_on_a_full_disk(folder: Path, size: int) -> None:
    """A limit on the size of files stops writing in the middle of a record, as a full disk does."""
    import resource
    import signal

    study = study_in(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(VoxelscaleError, match="cannot be written"):
        study.ask()


def test_sqlite_and_unknown_storages_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError, match="SQLite") as told:
        open_storage("sqlite:///x.db", tmp_path)
    assert "journal" in told.value.hint
    with pytest.raises(VoxelscaleError, match="unknown storage") as told:
        open_storage("redis://me:secret@host", tmp_path)
    assert "secret" not in told.value.message


def test_a_server_that_is_not_there_is_reported_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError) as told:
        open_storage("postgresql://me:secret@127.0.0.1:1/nothing", tmp_path)
    assert "127.0.0.1" in told.value.message
    assert "secret" not in told.value.message


def test_passwords_are_left_out() -> None:
    bare = "postgresql://me@host:5/db"
    query = f"{bare}?password=s@cret"
    both = "postgresql://me:s@cret@host:5/db?password=secret"
    for url in (bare, "postgresql://me:se:cr@host:5/db", f"{bare}?password=secret", query, both):
        assert strip_password(url) == bare
    assert strip_password("postgresql://host/db") == "postgresql://host/db"
    more = "postgresql://host/db?user=me&password=secret&sslmode=require"
    assert strip_password(more) == "postgresql://host/db?user=me&sslmode=require"
