"""A series with a prediction, and a judge of DICOM objects that is not ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REQUIRED = "VOXELSCALE_REQUIRE_DICOM3TOOLS"

Judge = Callable[[Path], None]


@pytest.fixture(scope="session")
def judge() -> Judge:
    """Fail where dciodvfy finds an error in a file."""
    if shutil.which("dciodvfy") is None:
        if os.environ.get(REQUIRED):
            pytest.fail("no dciodvfy installed: apt-get install dicom3tools")
        pytest.skip("no dciodvfy installed: apt-get install dicom3tools")

    def check(path: Path) -> None:
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert "Error" not in said, f"{path.name}: {said}"
        assert any(kind in said for kind in ("Segmentation", "Comprehensive3DSR", "RTStructureSet")), said

    return check
