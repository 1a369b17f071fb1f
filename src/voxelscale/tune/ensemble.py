"""Several trained networks in one file, whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from voxelscale.config import PredictConfig
from voxelscale.console import first_and_more
from voxelscale.errors import VoxelscaleError
from voxelscale.model.bundle import MOST_NETWORKS, Bundle, read_bundle, same_task, use_of, write_bundle

MOST_NAMED = 5
"""Classes that a message names."""


def ensemble(models: Sequence[Path], out: Path, predict: PredictConfig | None = None) -> Bundle:
    """Combine models; windows and thresholds are the first one's, or those of `predict`.

    Networks of different shapes, patches and spacings go together. A calibration is of one model's scores
    and is left behind. Ensembles among the models give all their networks.

    Args:
        models: runs' folders or model files.
        out: the file to write, ``*.vxs``.

    Raises:
        VoxelscaleError: a model cannot be read, comes twice, or has other classes or channels than the
            first; there is only one; or `out` is no name for a model file.
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
            if networks and not same_task(networks[0], network):
                before = known[networks[0].identity]
                hint = "combine models that were trained on one data set"
                raise VoxelscaleError(
                    f"{path}: finds {_task(network)}; {before}: {_task(networks[0])}", hint
                )
            if (
                networks
                and (networks[0].nnunet or network.nnunet)
                and use_of(networks[0]) != use_of(network)
            ):
                what = f"{path}: a model of nnU-Net goes together only with those that are used like it"
                raise VoxelscaleError(what, "name folds of one nnU-Net configuration")
            known[identity] = path
            networks.append(network)
    if not 2 <= len(networks) <= MOST_NETWORKS:
        raise VoxelscaleError(
            f"{out}: an ensemble of {len(networks)}", f"name 2 to {MOST_NETWORKS} trained models"
        )
    first, *others = (replace(network, digest="") for network in networks)
    if predict is not None:
        first = replace(first, config=replace(first.config, predict=predict))
    bundle = replace(first, others=tuple(others))
    write_bundle(out, bundle)
    return bundle


def _task(bundle: Bundle) -> str:
    """What a model finds in what, for a message."""
    channels = ", ".join(channel.name for channel in bundle.channels)
    named = first_and_more(bundle.classes.names, MOST_NAMED)
    kind = "regions" if bundle.classes.regions else "classes" if len(bundle.classes.names) > 1 else "class"
    return f"the {kind} {named} in {channels}"
