"""The three-minute version of the scaling study, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.mark.slow
def test_the_quick_study_shows_the_loss_and_what_fixes_it(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "study"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "study" / "study" / "scaling.json").read_text())
    dice = {(row["recipe"], row["workers"]): row["dice"] for row in facts["rows"]}
    assert len(dice) == 4
    assert dice["unchanged", 16] < 0.9 * dice["unchanged", 1]
    assert dice["unchanged", 16] < dice["auto", 16]
    assert "ms an update predicted" in facts["notes"][-2]
