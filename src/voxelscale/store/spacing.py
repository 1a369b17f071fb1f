"""The spacing that a data set is stored at.

The rule follows Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical
image segmentation" (2021), in its supplementary note on dynamic design choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from voxelscale.geometry import IntTriple, Triple

ANISOTROPIC = 3.0
"""How many times coarser than the others an axis must be to be treated separately."""


def target_spacing(spacings: Sequence[Triple], shapes: Sequence[IntTriple] = ()) -> tuple[Triple, str]:
    """The spacing (z, y, x) in mm, to the hundredth, that a data set is best stored at, and why.

    The median along each axis; along one that is more than three times as coarse as the others, and has as
    many times fewer voxels, the 10th percentile, so that thin-slice scans are not blurred to thick ones.

    Args:
        spacings: of the scans, mm (z, y, x).
        shapes: of the scans, voxels (z, y, x); (): not known, so that the spacing alone decides.
    """
    each = np.asarray(spacings, np.float64)
    chosen = np.median(each, axis=0)
    why = "the median of the data set along every axis"
    worst = int(np.argmax(chosen))
    others = [axis for axis in range(3) if axis != worst]
    coarse = chosen[worst] > ANISOTROPIC * chosen[others].max()
    if shapes:
        voxels = np.median(np.asarray(shapes, np.float64), axis=0)
        coarse &= voxels[worst] * ANISOTROPIC < voxels[others].min()
    if coarse:
        finer = float(np.percentile(each[:, worst], 10))
        median, chosen[worst] = chosen[worst], max(finer, float(chosen[others].max()))
        why = (
            f"the median of the data set; along {'zyx'[worst]}, where its median of {median:.2f} mm is "
            f"over {ANISOTROPIC:g} times the others', the 10th percentile"
        )
    z, y, x = (round(float(v), 2) for v in chosen)
    return (z, y, x), why
