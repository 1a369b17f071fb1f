"""What can be wrong with an archive: it is away, or what it says contradicts itself."""

from __future__ import annotations

import logging
import warnings

from voxelscale.errors import HOSPITAL_EXTRA, VoxelscaleError


class AwayError(VoxelscaleError):
    """An archive does not answer, or lets nobody in: it may do so later."""


class UntrueError(VoxelscaleError):
    """What an archive sent is not what it said it would send, or not of one patient."""


def missing_extra(package: str) -> VoxelscaleError:
    """A package of the extra is not installed."""
    return VoxelscaleError(f"the package {package} is not installed", HOSPITAL_EXTRA)


def quiet_libraries() -> None:
    """No library quotes values of headers or UIDs on stderr; what counts becomes an error of ours."""
    # `retrying` logs each failed request with its URL, which has UIDs.
    for name in ("pydicom", "pynetdicom", "dicomweb_client", "highdicom", "urllib3", "retrying", "uvicorn"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    for module in ("pydicom", "pynetdicom", "dicomweb_client", "highdicom"):
        warnings.filterwarnings("ignore", module=module)
