"""Linear maps that act along one axis after the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from voxelscale.device import upload


def along_axes(volume: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    """A separable linear map of (z, y, x); `matrix` gives the (n, n) map of a line of n voxels.

    Matrix products of a patch's size take a fraction of the time of one-channel convolutions.
    """
    along = {n: upload(matrix(n), volume.device) for n in sorted(set(volume.shape))}
    along_z, along_y, along_x = (along[n] for n in volume.shape)
    out = (along_z @ volume.flatten(1)).view(volume.shape)
    return along_y @ out @ along_x.T
