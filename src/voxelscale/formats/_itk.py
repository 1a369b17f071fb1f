"""SimpleITK with every fault of a file reported as one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from voxelscale.errors import VoxelscaleError


@contextmanager
def reported_as(path: Path, problem: str, hint: str) -> Iterator[None]:
    """Within it ITK's exceptions become a VoxelscaleError, and what it prints on stderr is kept back."""
    import SimpleITK as sitk

    warned = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        with _stderr_held():
            yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].split("): ")[-1] if lines else ""
        raise VoxelscaleError(f"{path}: {problem} ({reason[:160]})", hint) from None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warned)


@contextmanager
def _stderr_held() -> Iterator[None]:
    # NIfTI's and NRRD's C libraries print to the process's stderr past every warning switch.
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
