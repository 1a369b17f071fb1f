from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.model.test_shipped import made_up_crop
from voxelscale.config import Config, dump
from voxelscale.formats import write_scan
from voxelscale.quickstart import QuickstartResult, quickstart_config


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
