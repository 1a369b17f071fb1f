"""A trained model with all that inference needs, in one file."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from voxelscale.config import Config, IntTriple, Triple, from_dict, to_dict
from voxelscale.device import to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.files import read_sealed, seal_of, write_sealed
from voxelscale.model.build import build_model
from voxelscale.model.judge import JudgeNet
from voxelscale.model.registry import check_name
from voxelscale.model.unet import fold_batch_norms
from voxelscale.samples.batch import Normalisation
from voxelscale.store.plausible import TrainedOn

FORMAT, FORMAT_OF_MORE = 1, 2
"""Of a file with one network; with more, which a reader of the first kind would take for one."""

MOST_NETWORKS = 100

RETRAIN = "name a model.vxs that voxelscale train wrote"

FINEST_MM, COARSEST_MM = 0.01, 100.0
"""Spacings of a scan of a person; a finer one would be a trap for memory."""

MOST_PATCH = 2**28
"""Voxels of a window; more is no model that anybody trained."""


MOST_KNOTS = 100_000

SLOPE = 1e-3
"""Least slope of a calibration: where its curve is flat, the more certain of two findings stays so."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A map from a finding's score to its probability of being a lesion; it always rises.

    Attributes:
        scores: from 0 to 1, rising.
        probabilities: at each of them, never falling; linear between.
    """

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __call__(self, score: ArrayLike) -> NDArray[np.float64]:
        """Probabilities in [0, 1] of scores in [0, 1], of the same shape."""
        there = np.asarray(score, np.float64)
        curve = np.interp(there, self.scores, self.probabilities)
        return np.asarray((1 - SLOPE) * curve + SLOPE * there)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a ``model.vxs`` holds.

    Attributes:
        config: of the training.
        weights: the network's state.
        spacing: (z, y, x) mm that scans are resampled to.
        normalisation: HU to network input.
        trained: facts for a person: samples seen, validation Dice, version, data set; ``data_set`` is what
            `voxelscale.store.plausible.TrainedOn` reads, and is not in older models.
        digest: of the file it was read from; "" where it was not.
        calibration: of the findings' confidence; None: none was made.
        judge: weights of a `voxelscale.model.judge.JudgeNet` for false-positive reduction;
            None: there is none.
        others: further networks whose probabilities are averaged with this one's, each a bundle of its own
            without others or calibration.
    """

    config: Config
    weights: dict[str, Tensor]
    spacing: Triple
    normalisation: Normalisation
    trained: dict[str, Any]
    digest: str = ""
    calibration: Calibration | None = None
    judge: dict[str, Tensor] | None = None
    others: tuple[Bundle, ...] = ()

    @property
    def networks(self) -> tuple[Bundle, ...]:
        """Itself alone, then the others."""
        return replace(self, others=(), calibration=None), *self.others

    @cached_property
    def identity(self) -> str:
        """Of what makes its scores: all weights, spacing and normalisation; not of its calibration."""
        digest = hashlib.sha256()
        for one in self.networks:
            digest.update(repr((one.spacing, one.normalisation)).encode())
            for weights in (one.weights, one.judge or {}):
                for name, weight in sorted(weights.items()):
                    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                    plain = weight.detach().cpu().contiguous().flatten()
                    digest.update(plain.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @cached_property
    def trained_on(self) -> tuple[TrainedOn | None, ...]:
        """What each of its networks was trained on; None of one that does not say."""
        return tuple(TrainedOn.of(one.trained.get("data_set")) for one in self.networks)

    @property
    def of_chests(self) -> bool:
        """Whether any of its networks is known to have been trained on scans with lungs."""
        return any(facts is not None and facts.chest for facts in self.trained_on)

    @property
    def patch(self) -> IntTriple:
        """Voxels (z, y, x) of a window."""
        return self.config.predict.patch_size or self.config.data.patch_size

    def network(self, device: torch.device) -> nn.Module:
        """The trained network, in evaluation mode, on a device."""
        # The poolings are planned from the training patch, whatever window is used now.
        model = build_model(self.config.model, self.config.data.patch_size, self.spacing)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise VoxelscaleError(
                f"the model's weights are of another network ({reason})", RETRAIN
            ) from None
        return to_channels_last(fold_batch_norms(model.eval()).to(device))

    def judge_network(self, device: torch.device) -> nn.Module | None:
        """The second network, in evaluation mode, on a device; None where there is none."""
        if self.judge is None:
            return None
        network = JudgeNet()
        network.load_state_dict(self.judge)
        return to_channels_last(network.eval().to(device))


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write it, atomically and with a checksum."""
    buffer = io.BytesIO()
    content = {
        "format": FORMAT_OF_MORE if bundle.others or bundle.judge else FORMAT,
        **_content(bundle),
        "calibration": None if bundle.calibration is None else asdict(bundle.calibration),
    }
    if bundle.others:
        content["others"] = [_content(one) for one in bundle.others]
    torch.save(content, buffer)
    write_sealed(path, buffer.getvalue())


def _content(bundle: Bundle) -> dict[str, Any]:
    """One network's part of a file."""
    return {
        "config": to_dict(bundle.config),
        "weights": {name: value.detach().cpu() for name, value in bundle.weights.items()},
        "spacing": list(bundle.spacing),
        "normalisation": asdict(bundle.normalisation),
        "trained": bundle.trained,
        "judge": None if bundle.judge is None else {n: v.detach().cpu() for n, v in bundle.judge.items()},
    }


def bundle_path(path: Path) -> Path:
    """The bundle's file, of itself or of a run's folder.

    Raises:
        VoxelscaleError: the folder has none.
    """
    if not path.is_dir():
        return path
    if not (path / "model.vxs").is_file():
        raise VoxelscaleError(f"{path}: holds no model.vxs", "train first, or name a model file")
    return path / "model.vxs"


def read_bundle(path: Path) -> Bundle:
    """The bundle in a file, or in a run's folder.

    Raises:
        VoxelscaleError: there is none, it is damaged, or of another version.
    """
    path = bundle_path(path)
    content = load_untrusted(path)
    try:
        if content["format"] not in (FORMAT, FORMAT_OF_MORE):
            raise VoxelscaleError(f"{path}: format {content['format']}, not {FORMAT}", "train again")
        several = content.get("others", [])
        if not isinstance(several, list) or len(several) >= MOST_NETWORKS:
            raise ValueError("its networks are no list, or too many")
        bundle = replace(
            _of_content(content, path),
            digest=seal_of(path),
            calibration=_calibration(content.get("calibration")),
            others=tuple(_of_content(one, path) for one in several),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VoxelscaleError(f"{path}: not a model bundle ({reason})", RETRAIN) from None
    return bundle


def _of_content(content: Mapping[str, Any], path: Path) -> Bundle:
    """What `_content` made; raise a KeyError, TypeError, ValueError or the like where it is none."""
    z, y, x = (float(step) for step in content["spacing"])
    bundle = Bundle(
        config=from_dict(content["config"], str(path)),
        weights=content["weights"],
        spacing=(z, y, x),
        normalisation=Normalisation(**content["normalisation"]),
        trained=content["trained"],
        judge=content.get("judge"),
    )
    _check(bundle)
    return bundle


def _calibration(content: Any) -> Calibration | None:
    """Raise a ValueError, TypeError or KeyError where it is not what `write_bundle` wrote."""
    if content is None:
        return None
    scores, probabilities = content["scores"], content["probabilities"]
    if not 2 <= len(scores) == len(probabilities) <= MOST_KNOTS:
        raise ValueError("its calibration is not valid")
    x, y = np.asarray(scores, np.float64), np.asarray(probabilities, np.float64)
    if x.ndim != 1 or y.ndim != 1 or x[0] != 0 or x[-1] != 1 or not (np.diff(x) > 0).all():
        raise ValueError("its calibration's scores do not rise from 0 to 1")
    if not (y[0] >= 0 and y[-1] <= 1 and (np.diff(y) >= 0).all()):
        raise ValueError("its calibration falls, or leaves 0 to 1")
    return Calibration(scores=tuple(x.tolist()), probabilities=tuple(y.tolist()))


def _check(bundle: Bundle) -> None:
    """Raise a ValueError or TypeError where what was read cannot be what a training wrote.

    All of it is found before anything is made as large as the file says.
    """
    normal = bundle.normalisation
    numbers = [float(value) for value in asdict(normal).values()]
    if not all(map(math.isfinite, numbers)) or normal.std <= 0 or normal.low > normal.high:
        raise ValueError("its normalisation is not valid")
    if not all(FINEST_MM <= step <= COARSEST_MM for step in bundle.spacing):
        raise ValueError(f"a spacing of {bundle.spacing} mm")
    if math.prod(bundle.patch) > MOST_PATCH:
        raise ValueError(f"a patch of {bundle.patch} voxels")
    if not isinstance(bundle.trained, dict):
        raise TypeError("its record of the training is no table")
    _check_plain(bundle.weights)
    _check_network(bundle)
    _check_finite(bundle.weights)
    if bundle.judge is not None:
        _check_plain(bundle.judge)
        with torch.device("meta"):
            _check_same(JudgeNet().state_dict(), bundle.judge)
        _check_finite(bundle.judge)


def _check_plain(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise TypeError("its weights are not valid")
        real = weight.layout == torch.strided and not weight.is_complex() and not weight.is_quantized
        if not real or weight.numel() * weight.element_size() > weight.untyped_storage().nbytes():
            raise TypeError(f"its weight {name} is not a plain array")


def _check_finite(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"its weight {name} is not finite")


def _check_network(bundle: Bundle) -> None:
    """Whether the weights are those of the network, by name and shape."""
    config = bundle.config.model
    try:
        if config.name != "unet":  # what it is made of, only its package knows
            check_name(config.name)
            return
        if config.depth > len(bundle.weights):
            raise ValueError(f"{len(bundle.weights)} weights for {config.depth} levels")
        with torch.device("meta"):
            wanted = build_model(config, bundle.config.data.patch_size, bundle.spacing).state_dict()
    except VoxelscaleError as error:
        raise ValueError(error.message) from None
    _check_same(wanted, bundle.weights)


def _check_same(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in wanted or name not in weights:
            raise ValueError(f"its weights are of another network: {name} is in one of them only")
        if wanted[name].shape != weights[name].shape:
            raise ValueError(f"its weights are of another network: {name} has another shape")


def _check_archive(payload: bytes) -> None:
    """Raise a ValueError or BadZipFile where it is not as PyTorch writes it, whole and uncompressed.

    PyTorch itself does not check the archive's checksums.
    """
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        parts = archive.infolist()
        stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not stored or sum(part.file_size for part in parts) > len(payload):
            raise ValueError("its parts are not plainly stored")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its part {damaged} is damaged")


def load_untrusted(path: Path) -> dict[str, Any]:
    """The dictionary in a sealed file, without ever executing code from it.

    Raises:
        VoxelscaleError: it is damaged, or holds anything but tensors and plain values.
    """
    payload = read_sealed(path)
    try:
        _check_archive(payload)
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever an unpickler says of a hostile file, the person needs one line.
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise VoxelscaleError(
            f"{path}: not loadable ({reason})", "use a file that voxelscale train wrote"
        ) from None
    if not isinstance(content, dict):
        raise VoxelscaleError(f"{path}: holds no dictionary", "use a file that voxelscale train wrote")
    return content
