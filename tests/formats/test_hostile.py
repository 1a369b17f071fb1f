"""Every broken or hostile file is told in one line, in bounded time and memory, and crashes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.formats import corpus
from tests.formats.corpus import DICOM, SCANS, Hostile
from tests.formats.watched import Child, Outcome

SECONDS, MIB = 5.0, 300.0


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child(heavy=True) as started:
        yield started


def assert_told(outcome: Outcome, path: Path, words: str) -> None:
    """It was refused with these words in one line that names the file, or read where there are none."""
    assert outcome.kind == ("refused" if words else "read"), outcome
    assert words in outcome.message, outcome
    assert outcome.seconds < SECONDS, outcome
    assert outcome.grown_mib < MIB, outcome
    if words:
        shown = path.name.replace("\0", r"\x00")
        assert shown[:50] in outcome.message, outcome
        assert outcome.hint, outcome
        assert "\n" not in outcome.message + outcome.hint, outcome
        assert len(outcome.message) < len(str(path)) + 300, outcome
        assert "fit into memory" not in outcome.message, outcome


@pytest.mark.parametrize("hostile", SCANS, ids=[hostile.name for hostile in SCANS])
def test_hostile_scans(tmp_path: Path, child: Child, hostile: Hostile) -> None:
    path = hostile.make(tmp_path)
    assert_told(child.ask({"read": "scan", "path": str(path)}), path, hostile.words)


READABLE = {
    f"dicom-{name}" for name in ("pixels-4-gib", "nested-items", "frames-negative", "deflated-bomb")
}
"""Faults in what no reader needs: the scan may be read all the same."""


@pytest.mark.parametrize("hostile", DICOM, ids=[hostile.name for hostile in DICOM])
def test_hostile_dicom(tmp_path: Path, child: Child, hostile: Hostile) -> None:
    path = hostile.make(tmp_path)
    outcome = child.ask({"read": "scan", "path": str(path)})
    if not (hostile.name in READABLE and outcome.kind == "read"):
        assert_told(outcome, path, "/ct")


@pytest.mark.parametrize("name", corpus.CONFIGS)
def test_hostile_configs(tmp_path: Path, child: Child, name: str) -> None:
    path = corpus.config(corpus.CONFIGS[name])(tmp_path)
    outcome = child.ask({"command": ["config", "--config", str(path)]})
    assert outcome.kind == "refused", outcome
    assert outcome.seconds < SECONDS, outcome
    assert outcome.grown_mib < MIB, outcome
    assert path.name in outcome.message or outcome.message.startswith("config: "), outcome  # of values
    assert not Path("/tmp/voxelscale-was-here").exists()


@pytest.mark.parametrize("name", corpus.TABLES)
def test_hostile_tables(tmp_path: Path, child: Child, name: str) -> None:
    path = corpus.table(corpus.TABLES[name])(tmp_path)
    outcome = child.ask(
        {"command": ["prepare", str(path), str(tmp_path / "out"), "--set", "prepare.workers=1"]}
    )
    assert outcome.kind == "refused", outcome
    assert outcome.seconds < SECONDS, outcome
    assert outcome.grown_mib < MIB, outcome
    assert str(tmp_path) in outcome.message or "/dev/zero" in outcome.message, outcome


@pytest.mark.parametrize("name", corpus.STORES)
def test_hostile_stores(tmp_path: Path, child: Child, name: str) -> None:
    path = corpus.store(corpus.STORES[name])(tmp_path)
    assert_told(child.ask({"read": "store", "path": str(path)}), path / "dataset.json", " ")


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", corpus.BUNDLES)
def test_hostile_bundles(tmp_path: Path, child: Child, name: str, sealed: bool) -> None:
    path = corpus.bundle(corpus.BUNDLES[name], sealed)(tmp_path)
    assert_told(child.ask({"read": "bundle", "path": str(path)}), path, " ")
    assert not Path("/tmp/voxelscale-was-here").exists()
