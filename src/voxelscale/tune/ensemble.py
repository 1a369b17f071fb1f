"""Several trained networks in one file, whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from voxelscale.errors import VoxelscaleError
from voxelscale.model.bundle import MOST_NETWORKS, Bundle, read_bundle, write_bundle


def ensemble(models: Sequence[Path], out: Path) -> Bundle:
    """Combine models; windows and thresholds are the first one's.

    Networks of different shapes, patches and spacings go together. A calibration is of one model's scores
    and is left behind. Ensembles among the models give all their networks.

    Args:
        models: runs' folders or model files.
        out: the file to write, ``*.vxs``.

    Raises:
        VoxelscaleError: a model cannot be read or comes twice, there is only one, or `out` is no name for
            a model file.
    """
    if out.suffix != ".vxs" or out.is_dir():
        raise VoxelscaleError(f"{out}: no name for a model file", "name a file that ends in .vxs")
    networks: list[Bundle] = []
    known: dict[str, Path] = {}
    for path in models:
        for network in read_bundle(path).networks:
            if (identity := network.identity) in known:
                raise VoxelscaleError(
                    f"{path}: holds the same weights as {known[identity]}", "name each model once"
                )
            known[identity] = path
            networks.append(network)
    if not 2 <= len(networks) <= MOST_NETWORKS:
        raise VoxelscaleError(
            f"{out}: an ensemble of {len(networks)}", f"name 2 to {MOST_NETWORKS} trained models"
        )
    first, *others = (replace(network, digest="") for network in networks)
    bundle = replace(first, others=tuple(others))
    write_bundle(out, bundle)
    return bundle
