"""A trained model with all that inference needs, in one file."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxelscale.config import Config, IntTriple, Triple, from_dict, to_dict
from voxelscale.data.augment import Normalisation
from voxelscale.device import to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.files import read_sealed, seal_of, write_sealed
from voxelscale.model.build import build_model

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a ``model.vxs`` holds.

    Attributes:
        config: of the training.
        weights: the network's state.
        spacing: (z, y, x) mm that scans are resampled to.
        normalisation: HU to network input.
        trained: facts for a person: samples seen, validation Dice, version, data set.
        digest: of the file it was read from; "" where it was not.
    """

    config: Config
    weights: dict[str, Tensor]
    spacing: Triple
    normalisation: Normalisation
    trained: dict[str, Any]
    digest: str = ""

    @property
    def patch(self) -> IntTriple:
        """Voxels (z, y, x) of a window."""
        return self.config.predict.patch_size or self.config.data.patch_size

    def network(self, device: torch.device) -> nn.Module:
        """The trained network, in evaluation mode, on a device."""
        # The poolings are planned from the training patch, whatever window is used now.
        model = build_model(self.config.model, self.config.data.patch_size, self.spacing)
        model.load_state_dict(self.weights)
        return to_channels_last(model.eval().to(device))


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write it, atomically and with a checksum."""
    buffer = io.BytesIO()
    content = {
        "format": FORMAT,
        "config": to_dict(bundle.config),
        "weights": {name: value.detach().cpu() for name, value in bundle.weights.items()},
        "spacing": list(bundle.spacing),
        "normalisation": asdict(bundle.normalisation),
        "trained": bundle.trained,
    }
    torch.save(content, buffer)
    write_sealed(path, buffer.getvalue())


def read_bundle(path: Path) -> Bundle:
    """The bundle in a file, or in a run's folder.

    Raises:
        VoxelscaleError: there is none, it is damaged, or of another version.
    """
    if path.is_dir():
        if not (path / "model.vxs").is_file():
            raise VoxelscaleError(f"{path}: holds no model.vxs", "train first, or name a model file")
        path = path / "model.vxs"
    content = load_untrusted(path)
    try:
        if content["format"] != FORMAT:
            raise VoxelscaleError(f"{path}: format {content['format']}, not {FORMAT}", "train again")
        z, y, x = (float(step) for step in content["spacing"])
        if not all(isinstance(weight, torch.Tensor) for weight in content["weights"].values()):
            raise TypeError("its weights are none")
        return Bundle(
            config=from_dict(content["config"], str(path)),
            weights=content["weights"],
            spacing=(z, y, x),
            normalisation=Normalisation(**content["normalisation"]),
            trained=content["trained"],
            digest=seal_of(path),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VoxelscaleError(f"{path}: not a model bundle ({error})", "name a model.vxs") from None


def load_untrusted(path: Path) -> dict[str, Any]:
    """The dictionary in a sealed file, without ever executing code from it.

    Raises:
        VoxelscaleError: it is damaged, or holds anything but tensors and plain values.
    """
    payload = read_sealed(path)
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever an unpickler says of a hostile file, the person needs one line.
        reason = str(error).splitlines()[0][:120]
        raise VoxelscaleError(
            f"{path}: not loadable ({reason})", "use a file that voxelscale wrote"
        ) from None
    if not isinstance(content, dict):
        raise VoxelscaleError(f"{path}: holds no dictionary", "use a file that voxelscale wrote")
    return content
