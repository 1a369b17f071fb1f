"""Training: the loop, its workers, its checkpoints and its log.

``from voxelscale.train import fit`` trains any network; PyTorch is imported then, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from voxelscale.train.engine import Result
    from voxelscale.train.fitting import fit, load_weights

__all__ = ["Result", "fit", "load_weights"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from voxelscale.train import fitting

    return getattr(fitting, name)
