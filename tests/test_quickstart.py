from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.model.test_shipped import made_up_crop
from voxelscale.config import Config, dump
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import write_scan
from voxelscale.quickstart import QuickstartResult, quickstart, quickstart_config
from voxelscale.store import open_store


def test_the_packaged_config_is_whole() -> None:
    config = quickstart_config(None, ("train.samples=8",))
    assert config.train.samples == 8
    assert config.train.ranks == 2
    assert config.phantom.spacing == config.prepare.spacing


def test_the_whole_job_in_one_command_and_again(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump(tiny))
    command = [sys.executable, "-m", "voxelscale.cli", "quickstart", "all", "--config", "tiny.yaml"]
    command += ["--set", "train.ranks=2", "--set", "train.samples=120", "--set", "optim.lr=0.01"]
    write_scan(made_up_crop(), tmp_path / "real.nii.gz")
    summaries = []
    for more in ([], ["--scan", "real.nii.gz"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        summaries.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = summaries
    assert first.keys() == {"dice", "sensitivity_at_1_fp", "seconds", "report"}
    assert (first["dice"], first["sensitivity_at_1_fp"]) == (second["dice"], second["sensitivity_at_1_fp"])
    assert 0 <= first["dice"] <= 1
    assert second["seconds"] < first["seconds"]
    assert "starter: the lung nodule model" in done.stderr
    assert (tmp_path / "all" / "scan" / "real" / "findings.json").is_file()
    assert "<svg" in (tmp_path / first["report"]).read_text()


def test_a_scan_that_fails_at_the_end_is_the_exit_code(
    voxelscale: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = QuickstartResult(dice=0.5, sensitivity_at_1_fp=None, seconds={}, report=tmp_path / "a.html")
    monkeypatch.setattr("voxelscale.quickstart.quickstart", lambda *_: result)
    monkeypatch.setattr("voxelscale.cli.predict.predict", lambda *_: 2)
    code, out, _ = voxelscale("quickstart", tmp_path / "all", "--scan", tmp_path)
    assert (code, json.loads(out.splitlines()[-1])["dice"]) == (2, 0.5)


def test_phantoms_without_nodules_are_left_out_of_nothing_silently(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voxelscale.train.launch.start", lambda *_: False)  # far enough
    small = replace(tiny.phantom, cases=3, spacing=(12, 12, 12), nodules=(0, 1), diameter_mm=(30, 30))
    config = replace(tiny, phantom=small, prepare=replace(tiny.prepare, workers=1, plan=False))
    with pytest.raises(VoxelscaleError, match="an empty mask") as error:
        quickstart(tmp_path, config)
    assert "reading.allow_empty=true" in error.value.hint
    with pytest.raises(VoxelscaleError, match="stopped"):
        quickstart(tmp_path, replace(config, reading=replace(config.reading, allow_empty=True)))
    cases = open_store(tmp_path / "store").cases
    assert sorted(len(info.lesion_volumes_mm3) for info in cases)[0] == 0
    assert len(cases) == 3
