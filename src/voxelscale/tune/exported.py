"""What is exported of a model: its network with normalisation and probabilities, and facts to use it by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelscale import __version__
from voxelscale.channels import AIR_HU, Channel
from voxelscale.config import IntTriple, PhantomConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.model.bundle import Bundle
from voxelscale.model.plain import PlainUNet
from voxelscale.model.unet import UNet, plan_pooling
from voxelscale.samples.batch import Normalisation

INPUT, OUTPUT = "image", "probability"

CHEST = "a synthetic chest"

LARGE = 2**20
"""Voxels of a window from which on one is enough to try a network on."""

UNBOUNDED = 3e38
"""Instead of infinity, which not every runtime takes as a bound."""

SCALED = {
    "ct": "HU",
    "rgb": "values of 0 to 255",
    "none": "values as they are",
    "zscore": "less the mean, over the standard deviation, both of the image's voxels that are not 0",
    "minmax": "scaled so that the image's minimum is 0 and its maximum 1",
}
"""By scheme, what the exported network takes. Statistics of an image are those of the whole image at the
model's spacing; a window's own would be others."""

NNUNET_ZSCORE = {
    False: "less the mean, over the standard deviation, both of the image cropped to what is not 0",
    True: "as z-scores of the voxels within the body (not 0, holes filled), 0 outside",
}


class Exported(nn.Module):
    """Values of a window to probabilities.

    Args:
        networks: each gives logits.
        normalisations: of each network's channels, in the unit of what it is given.
        softmax: whether the logits are those of classes that exclude each other.
        of_logits: whether the networks' logits are averaged, as nnU-Net does, and not their probabilities.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        normalisations: Sequence[Sequence[Normalisation]],
        dims: int,
        *,
        softmax: bool,
        of_logits: bool,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.softmax, self.of_logits = softmax, of_logits
        for number, each in enumerate(normalisations):
            for key in ("low", "high", "mean", "std"):
                values = [min(max(getattr(one, key), -UNBOUNDED), UNBOUNDED) for one in each]
                self.register_buffer(f"{key}{number}", torch.tensor(values).view(1, -1, *[1] * dims))

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, channel, ...)`` float32 to probabilities ``(batch, output, ...)``."""
        total: Tensor | None = None
        for number, network in enumerate(self.networks):
            low, high, mean, std = (self.get_buffer(f"{k}{number}") for k in ("low", "high", "mean", "std"))
            one = network((torch.minimum(torch.maximum(image, low), high) - mean) / std)
            one = one if self.of_logits else self._activated(one)
            total = one if total is None else total + one
        assert total is not None  # noqa: S101 (a model has a network)
        mean_of = total / len(self.networks)
        return self._activated(mean_of) if self.of_logits else mean_of

    def _activated(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.softmax else logits.sigmoid()


class _Flat(nn.Module):
    """A 2-D network of another package on ``(batch, channel, y, x)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.unsqueeze(2)).squeeze(2)
        return logits


def exported(bundle: Bundle) -> Exported:
    """The network of a model, or the mean of its networks, on the CPU.

    Raises:
        VoxelscaleError: its networks have different spacings, patches or dimensions.
    """
    dims = bundle.config.model.dims
    for one in bundle.others:
        if (one.spacing, one.patch, one.config.model.dims) != (bundle.spacing, bundle.patch, dims):
            what = "the model's networks have different spacings or patches, and a file has one of each"
            raise VoxelscaleError(what, "export the models that it was made of one by one")
    return Exported(
        [_plain(one) for one in bundle.networks],
        [
            [_given(channel, one.normalisation_at(at)) for at, channel in enumerate(one.channels)]
            for one in bundle.networks
        ],
        dims,
        softmax=softmax_of(bundle),
        of_logits=bundle.nnunet is not None,
    ).eval()


def softmax_of(bundle: Bundle) -> bool:
    """Whether its outputs are background and classes that exclude each other."""
    return not (bundle.classes.regions or bundle.classes.single)


def _plain(bundle: Bundle) -> nn.Module:
    network = bundle.network(torch.device("cpu"))
    if isinstance(network, UNet):
        return PlainUNet(network)
    return _Flat(network) if bundle.config.model.dims == 2 else network


def _given(channel: Channel, of_ct: Normalisation | None) -> Normalisation:
    """How what the exported network takes of a channel becomes the network's own input."""
    if channel.scheme == "ct" and of_ct is not None:
        return of_ct
    std = 255.0 if channel.scheme == "rgb" else 1.0
    return Normalisation(low=-math.inf, high=math.inf, mean=0.0, std=std)


def step_of(bundle: Bundle) -> tuple[int, ...]:
    """How many voxels of a window are one at the network's bottom, along each of its axes."""
    dims, depth = bundle.config.model.dims, bundle.config.model.depth
    if bundle.config.model.name != "unet":
        return (1,) * dims
    pools = plan_pooling(bundle.config.data.patch_size[-dims:], bundle.spacing[-dims:], depth)
    return tuple(math.prod(along) for along in zip((1,) * dims, *pools, strict=True))


def facts_of(bundle: Bundle, *, free: bool, multiple: Sequence[int] = ()) -> dict[str, Any]:
    """What a person or a program must know to use the exported network, of plain values.

    Args:
        multiple: of how many voxels along each axis free windows must be; (): any.
    """
    dims, classes, nnunet = bundle.config.model.dims, bundle.classes, bundle.nnunet
    names = list(classes.names)
    way = "turned to RAS" if nnunet and nnunet.ras else "as the file has it" if nnunet else "turned to LPS"
    order = "" if not nnunet or nnunet.axes == (0, 1, 2) else f", its axes in the order {list(nnunet.axes)}"
    return {
        "voxelscale": __version__,
        "model": bundle.identity,
        "networks": len(bundle.networks),
        "spacing_zyx_mm": list(bundle.spacing),
        "axes": f"batch, channel, {'z, ' * (dims == 3)}y, x of the image {way}{order}",
        "patch": list(bundle.patch[-dims:]),
        "free_patch": free,
        "free_patch_multiple_of": list(multiple or (1,) * dims),
        "input": INPUT,
        "output": OUTPUT,
        "channels": [_channel_facts(bundle, at) for at in range(len(bundle.channels))],
        "outputs": (["background"] if softmax_of(bundle) else []) + names,
        "activation": "softmax" if softmax_of(bundle) else "sigmoid",
        "classes": {
            "regions": classes.regions,
            "written_values": list(classes.written_values),
            "threshold": bundle.config.predict.threshold,
        },
        "resampling": "cubic, after the normalisation" if nnunet else "linear, before the normalisation",
        "overlap": bundle.config.predict.overlap,
        "mirrored": bundle.config.augment.mirrored,
        "notice": "For research only; not a medical device.",
    }


def _channel_facts(bundle: Bundle, at: int) -> dict[str, Any]:
    channel, of_ct = bundle.channels[at], bundle.normalisation_at(at)
    text = SCALED[channel.scheme]
    if bundle.nnunet and channel.scheme == "zscore":
        text = NNUNET_ZSCORE[bundle.nnunet.masked[at]]
    facts: dict[str, Any] = {"name": channel.name, "scheme": channel.scheme, "input": text}
    if of_ct is not None:
        facts |= {"low": of_ct.low, "high": of_ct.high, "mean": of_ct.mean, "std": of_ct.std}
        facts["beyond_the_image"] = AIR_HU
    return facts


def trial_inputs(
    bundle: Bundle, shape: Sequence[int], kinds: Sequence[str] = ("noise", CHEST)
) -> dict[str, NDArray[np.float32]]:
    """Windows to try an exported network on, ``(batch, channel, *shape)``: noise, and a synthetic chest.

    There are two of each, or one where they are large.
    """
    count, random = 2 if math.prod(shape) <= LARGE else 1, np.random.default_rng(0)
    each = {}
    for kind in kinds:
        values = random.normal(size=(count, len(bundle.channels), *shape))
        if kind == CHEST:
            chest = chest_of(tuple(shape))
            values[:] = chest if count == 1 else np.stack([chest, chest[..., ::-1]])[:, None]
        for at, channel in enumerate(bundle.channels):
            if channel.scheme == "ct":
                values[:, at] = values[:, at] if kind == CHEST else 500 * values[:, at] - 300
                continue
            scale = {"zscore": 1.0, "minmax": 0.2, "rgb": 50.0, "none": 1.0}[channel.scheme]
            spread = values[:, at].std() or 1.0
            values[:, at] = scale * ((values[:, at] - values[:, at].mean()) / spread + 1)
        each[kind] = values.astype(np.float32)
    return each


@lru_cache(maxsize=4)
def chest_of(shape: tuple[int, ...]) -> NDArray[np.int16]:
    """HU of a window; a chest that is drawn as small as the window is."""
    from voxelscale.phantom import make_phantom

    wide: IntTriple = (8, shape[0], shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])
    z, y, x = (max(60.0, n * 2.0) for n in wide)
    image = make_phantom(PhantomConfig(spacing=(2.0, 2.0, 2.0), size_mm=(z, y, x)), 0).image.array
    low = [max(0, (have - want) // 2) for have, want in zip(image.shape, wide, strict=True)]
    cut = image[tuple(slice(start, start + n) for start, n in zip(low, wide, strict=True))]
    full = np.pad(cut, [(0, n - have) for n, have in zip(wide, cut.shape, strict=True)], mode="edge")
    return full[4] if len(shape) == 2 else full
