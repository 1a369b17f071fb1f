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

from voxelscale.channels import ONE_CT, Channel
from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, IntTriple, Triple, from_stored, to_dict
from voxelscale.device import to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.files import read_sealed, seal_of, write_sealed
from voxelscale.model.build import build_model
from voxelscale.model.false_positives import FalsePositiveNet
from voxelscale.model.nnunet import NnunetRules
from voxelscale.model.registry import check_name
from voxelscale.model.shipped import shipped
from voxelscale.model.unet import fold_batch_norms, without_supervision
from voxelscale.samples.batch import Normalisation
from voxelscale.store.plausible import TrainedOn

FORMAT, FORMAT_OF_MORE, FORMAT_OF_ANY, FORMAT_OF_NNUNET = 1, 2, 3, 4
"""Of a file with one network; with more, which a reader of the first kind would take for one; of other
images than one channel of CT, or other classes than one; and of a model from nnU-Net."""

MOST_NETWORKS = 100

RETRAIN = "name a model.vxs that voxelscale train wrote"

FINEST_MM, COARSEST_MM = 0.01, 100.0
"""Spacings of a scan of a person; a finer one would be a trap for memory."""

MOST_PATCH = 2**28
"""Voxels of a window, times its channels; more is no model that anybody trained."""

MOST_LOGITS = 2**32
"""The same times the network's outputs."""

LONGEST_NAME = 200
"""Characters of a class's or channel's name."""

MOST_VALUES = 2**16
"""Label values of all classes."""

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
        weights: the network's state; what only deep supervision needs is left out.
        spacing: (z, y, x) mm that scans are resampled to.
        normalisation: HU to network input, of the first channel of CT; not used where there is none.
        trained: facts for a person: samples seen, validation Dice, version, data set; ``data_set`` is what
            `voxelscale.store.plausible.TrainedOn` reads, and is not in older models.
        digest: of the file it was read from; "" where it was not.
        calibration: of the findings' confidence; None: none was made.
        false_positives: weights of a `FalsePositiveNet`; None: there is none.
        others: further networks whose probabilities are averaged with this one's, each a bundle of its own
            without others or calibration.
        classes: what its outputs are.
        channels: of its input.
        normalisations: of each channel of CT, None of others, which are normalised by the case; (): all of
            CT by `normalisation`.
        nnunet: of a model from nnU-Net how it is used, alike for all of its networks; None: as ours are.
    """

    config: Config
    weights: dict[str, Tensor]
    spacing: Triple
    normalisation: Normalisation
    trained: dict[str, Any]
    digest: str = ""
    calibration: Calibration | None = None
    false_positives: dict[str, Tensor] | None = None
    others: tuple[Bundle, ...] = ()
    classes: Classes = LESION
    channels: tuple[Channel, ...] = ONE_CT
    normalisations: tuple[Normalisation | None, ...] = ()
    nnunet: NnunetRules | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", without_supervision(self.weights))

    @property
    def of_ct(self) -> bool:
        """Whether its first channel is CT."""
        return self.channels[0].scheme == "ct"

    @property
    def plain(self) -> bool:
        """Whether it finds one class in one channel of CT; its file says neither name."""
        return self.classes.plain and self.of_ct and len(self.channels) == 1

    def normalisation_at(self, channel: int) -> Normalisation | None:
        """Of a channel by its number, where it is CT."""
        if self.channels[channel].scheme != "ct":
            return None
        return self.normalisations[channel] if self.normalisations else self.normalisation

    @property
    def networks(self) -> tuple[Bundle, ...]:
        """Itself alone, then the others."""
        return replace(self, others=(), calibration=None), *self.others

    @cached_property
    def identity(self) -> str:
        """Of what makes its scores: all weights, spacing, classes, channels and normalisation; not of its
        calibration."""
        digest = hashlib.sha256()
        for one in self.networks:
            digest.update(repr((one.spacing, one.normalisation)).encode())
            if not one.plain:
                each = [one.normalisation_at(number) for number in range(len(one.channels))]
                digest.update(repr((one.classes, one.channels, each)).encode())
            if one.nnunet:
                digest.update(repr(one.nnunet).encode())
            for weights in (one.weights, one.false_positives or {}):
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
    def looks_at_lungs(self) -> bool:
        """Whether it predicts only in and around the lungs, where nothing else is said."""
        return self.of_ct and self.classes.single and self.of_chests

    @property
    def patch(self) -> IntTriple:
        """Voxels (z, y, x) of a window."""
        return self.config.predict.patch_size or self.config.data.patch_size

    def network(self, device: torch.device) -> nn.Module:
        """The trained network, in evaluation mode, on a device."""
        # The poolings are planned from the training patch, whatever window is used now.
        model = _built(self)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise VoxelscaleError(
                f"the model's weights are of another network ({reason})", RETRAIN
            ) from None
        return to_channels_last(fold_batch_norms(model.eval()).to(device))

    def false_positive_network(self, device: torch.device) -> nn.Module | None:
        """The second network, in evaluation mode, on a device; None where there is none."""
        if self.false_positives is None:
            return None
        network = FalsePositiveNet()
        network.load_state_dict(self.false_positives)
        return to_channels_last(network.eval().to(device))


def _built(bundle: Bundle) -> nn.Module:
    """Its network, untrained and without deep supervision."""
    config = replace(bundle.config.model, deep_supervision=False)
    return build_model(
        config,
        bundle.config.data.patch_size,
        bundle.spacing,
        channels=len(bundle.channels),
        outputs=bundle.classes.outputs,
    )


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write it, atomically and with a checksum."""
    buffer = io.BytesIO()
    kind = FORMAT_OF_MORE if bundle.others or bundle.false_positives else FORMAT
    kind = kind if bundle.plain else FORMAT_OF_ANY
    content = {
        "format": FORMAT_OF_NNUNET if bundle.nnunet else kind,
        **_content(bundle),
        "calibration": None if bundle.calibration is None else asdict(bundle.calibration),
    }
    if bundle.others:
        content["others"] = [_content(one) for one in bundle.others]
    torch.save(content, buffer)
    write_sealed(path, buffer.getvalue())


def _content(bundle: Bundle) -> dict[str, Any]:
    """One network's part of a file."""
    content: dict[str, Any] = {
        "config": to_dict(bundle.config),
        "weights": {name: value.detach().cpu() for name, value in bundle.weights.items()},
        "spacing": list(bundle.spacing),
        "normalisation": asdict(bundle.normalisation),
        "trained": bundle.trained,
        "judge": None
        if bundle.false_positives is None
        else {n: v.detach().cpu() for n, v in bundle.false_positives.items()},
    }
    if bundle.nnunet:
        content["nnunet"] = bundle.nnunet.to_dict()
    if bundle.nnunet or not bundle.plain:
        each = [bundle.normalisation_at(number) for number in range(len(bundle.channels))]
        content["classes"] = bundle.classes.to_dict()
        content["channels"] = [channel.to_dict() for channel in bundle.channels]
        content["normalisations"] = [None if one is None else asdict(one) for one in each]
    return content


def bundle_path(path: Path) -> Path:
    """The bundle's file, of itself or of a run's folder.

    Raises:
        VoxelscaleError: the folder has none, or the model comes with the package, which nothing changes.
    """
    if (packaged := shipped(path)) is not None:
        raise VoxelscaleError(f"{path}: comes with voxelscale and is not changed", f"copy {packaged} first")
    if not path.is_dir():
        return path
    if not (path / "model.vxs").is_file():
        raise VoxelscaleError(f"{path}: holds no model.vxs", "train first, or name a model file")
    return path / "model.vxs"


def read_bundle(path: Path) -> Bundle:
    """The bundle in a file, in a run's folder, or one that comes with the package (`shipped`).

    Raises:
        VoxelscaleError: there is none, it is damaged, or of another version.
    """
    path = shipped(path) or bundle_path(path)
    content = load_untrusted(path)
    try:
        kind = content["format"]
        if kind not in (FORMAT, FORMAT_OF_MORE, FORMAT_OF_ANY, FORMAT_OF_NNUNET):
            known = f"{FORMAT} to {FORMAT_OF_NNUNET}"
            raise VoxelscaleError(f"{path}: format {kind}, not {known}", "train again")
        several = content.get("others", [])
        if not isinstance(several, list) or len(several) >= MOST_NETWORKS:
            raise ValueError("its networks are no list, or too many")
        bundle = replace(
            _of_content(content, path, kind),
            digest=seal_of(path),
            calibration=_calibration(content.get("calibration")),
            others=tuple(_of_content(one, path, kind) for one in several),
        )
        if any(not same_task(bundle, other) for other in bundle.others):
            raise ValueError("its networks have different classes or channels")
        if any(use_of(bundle) != use_of(other) for other in bundle.others if bundle.nnunet or other.nnunet):
            raise ValueError("networks of nnU-Net that are used in different ways")
        if bundle.calibration is not None and not bundle.classes.single:
            raise ValueError("a calibration is of one class")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VoxelscaleError(f"{path}: not a model bundle ({reason})", RETRAIN) from None
    return bundle


def same_task(one: Bundle, other: Bundle) -> bool:
    """Whether two models have the same classes and channels."""
    return (one.plain and other.plain) or (one.classes, one.channels) == (other.classes, other.channels)


def use_of(bundle: Bundle) -> tuple[Any, ...]:
    """What is alike of networks whose logits nnU-Net averages."""
    each = tuple(bundle.normalisation_at(number) for number in range(len(bundle.channels)))
    return bundle.nnunet, bundle.spacing, bundle.patch, bundle.config.model.dims, bundle.channels, each


def one_class(bundle: Bundle, path: Path, what: str) -> None:
    """Raise a VoxelscaleError where a model is of several classes."""
    names = bundle.classes.names
    if not bundle.classes.single:
        raise VoxelscaleError(
            f"{path}: {what} is only for one class; the model has {len(names)}",
            "train on one class: list its values in reading.labels, and prepare the data set again",
        )


def _of_content(content: Mapping[str, Any], path: Path, kind: int) -> Bundle:
    """What `_content` made; raise a KeyError, TypeError, ValueError or the like where it is none.

    Args:
        kind: the file's format.
    """
    z, y, x = (float(step) for step in content["spacing"])
    bundle = Bundle(
        config=from_stored(content["config"], str(path)),
        weights=content["weights"],
        spacing=(z, y, x),
        normalisation=Normalisation(**content["normalisation"]),
        trained=content["trained"],
        false_positives=content.get("judge"),
        **(_task_of(content) if kind in (FORMAT_OF_ANY, FORMAT_OF_NNUNET) else {}),
        nnunet=NnunetRules.from_dict(content["nnunet"]) if kind == FORMAT_OF_NNUNET else None,
    )
    check_bundle(bundle)
    return bundle


def _task_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Classes and channels; raise a KeyError, TypeError or ValueError where they are none."""
    if sum(map(len, content["classes"]["values"])) > MOST_VALUES:
        raise ValueError("its classes have too many values")
    classes = Classes.from_dict(content["classes"])
    channels = tuple(Channel.from_dict(one) for one in content["channels"])
    each = tuple(None if one is None else Normalisation(**one) for one in content["normalisations"])
    if not channels or len(channels) != len(each):
        raise ValueError(f"{len(channels)} channels with {len(each)} normalisations")
    names = (*classes.names, *(channel.name for channel in channels))
    if not all(0 < len(name) <= LONGEST_NAME for name in names):
        raise ValueError("a class's or channel's name is empty or too long")
    for channel, one in zip(channels, each, strict=True):
        if (one is None) == (channel.scheme == "ct"):
            raise ValueError(f"the channel {channel.name} has a normalisation too many or too few")
    return {"classes": classes, "channels": channels, "normalisations": each}


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


def check_bundle(bundle: Bundle) -> None:
    """Raise a ValueError or TypeError where what was read cannot be what a training wrote.

    All of it is found before anything is made as large as the file says.
    """
    for normal in filter(None, (bundle.normalisation, *bundle.normalisations)):
        numbers = list(asdict(normal).values())
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
            raise ValueError("its normalisation is not finite")
        if normal.std <= 0 or normal.low > normal.high:
            raise ValueError("its normalisation is not valid")
    if not all(FINEST_MM <= step <= COARSEST_MM for step in bundle.spacing):
        raise ValueError(f"a spacing of {bundle.spacing} mm")
    voxels, outputs = math.prod(bundle.patch), bundle.classes.outputs
    if voxels * len(bundle.channels) > MOST_PATCH or voxels * outputs > MOST_LOGITS:
        raise ValueError(f"a patch of {bundle.patch} voxels")
    if bundle.nnunet and (len(bundle.nnunet.masked) != len(bundle.channels) or bundle.false_positives):
        raise ValueError("its rules of nnU-Net are of another model")
    if not isinstance(bundle.trained, dict):
        raise TypeError("its record of the training is no table")
    _check_plain(bundle.weights)
    _check_network(bundle)
    _check_finite(bundle.weights)
    if bundle.false_positives is not None:
        if not bundle.classes.single or not bundle.of_ct:
            raise ValueError("false-positive reduction is of one class in CT")
        _check_plain(bundle.false_positives)
        with torch.device("meta"):
            _check_same(FalsePositiveNet().state_dict(), bundle.false_positives)
        _check_finite(bundle.false_positives)


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
        levels = config.depth + sum(config.blocks)
        if levels > len(bundle.weights):
            raise ValueError(f"{len(bundle.weights)} weights for {levels} levels and blocks")
        with torch.device("meta"):
            wanted = _built(bundle).state_dict()
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
