"""A trained network, or several as one, that predicts scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelscale.channels import Channel
from voxelscale.classes import Classes
from voxelscale.config import PredictConfig
from voxelscale.console import notice
from voxelscale.device import choose_inference, policy, upload
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import Finding, ranked
from voxelscale.findings.depth import lung_depth, outside_mm
from voxelscale.geometry import SAME_MM, Grid, IntTriple, Scan, Triple, reorient, resample
from voxelscale.infer.sliding_window import Box, Share, Windows, predict_boxes, predict_volume
from voxelscale.lungs import Lungs, body_field, lung_field
from voxelscale.model.bundle import Bundle
from voxelscale.model.false_positives import crop_shape, crop_start
from voxelscale.predict.classes import found_by, kept_probabilities, least_kept
from voxelscale.predict.maps import Maps
from voxelscale.predict.nnunet import Prepared, on_scan, prepare
from voxelscale.samples.batch import normalisation_of, prepared
from voxelscale.store import AIR_HU, overlap_slices
from voxelscale.store.channels import Kept
from voxelscale.store.plausible import About, against
from voxelscale.store.prepare import on_grid

CROPS_AT_ONCE = 64
"""Findings in a batch of false-positive reduction."""

NO_LUNGS = "set predict.lungs=null"

LUNG_MARGIN_MM = 10.0
"""A finding may lie so far outside the lungs that were found: lesions of the pleura and the hilum belong to
them. Every nodule of our LIDC-IDRI scans and pyradiomics' lung1 tumour reaches into them (0 mm)."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model sees in a scan.

    Attributes:
        findings: most confident first.
        mask: of those that reach the threshold, on the scan's own voxels.
        lungs: as they were found; None: the whole scan was predicted, without regard to them.
        left_out: what was found further than `LUNG_MARGIN_MM` from the lungs, and is not listed.
        share: of the scan that was predicted.
        probabilities: the file of each class's, and these in steps of 1/255; made as they are asked for.
    """

    findings: list[Finding]
    mask: Scan
    lungs: Lungs | None
    left_out: int
    share: float
    probabilities: Iterator[tuple[str, NDArray[np.uint8]]] = field(default=iter(()), repr=False)


def check_usable(bundle: Bundle, one: About, name: str, refuse: bool) -> list[str]:
    """The warnings for a scan.

    Args:
        one: what the scan is.
        name: of the scan, for a person.
        refuse: whether it is an error where the model cannot be meant for it.

    Raises:
        VoxelscaleError: it cannot be a scan that the model is for.
    """
    found = against(one, bundle.trained_on, low=bundle.normalisation.low, depth=bundle.patch[0])
    errors = [text for severity, text in found if severity == "error"]
    if errors and refuse:
        hint = "give a scan like the training scans, or set predict.refuse_unusable=false"
        raise VoxelscaleError(f"{name}: not a scan for this model: {errors[0]}", hint)
    return [text for _, text in found]


@dataclass(frozen=True, kw_only=True)
class _Region:
    """A case as a network takes it.

    Attributes:
        channels: (channel, z, y, x) int16, all of it, at the network's spacing.
        grid: where its probabilities lie: its voxels, or the scan's where it is as nnU-Net prepares it.
        kept: how each channel was kept.
        within: (z, y, x) bool, where it is predicted; None: everywhere.
        nnunet: as nnU-Net prepares it, whose values `channels` then are; None: it is as ours are.
    """

    channels: NDArray[Any]
    grid: Grid
    kept: tuple[Kept, ...]
    within: NDArray[np.bool_] | None
    nnunet: Prepared | None = None

    @classmethod
    def of_nnunet(cls, images: Sequence[Scan], bundle: Bundle) -> _Region:
        """As nnU-Net prepares it, all of it."""
        made = prepare(images, bundle)
        return cls(channels=made.values, grid=made.grid, kept=(), within=None, nnunet=made)

    @classmethod
    def of(
        cls,
        images: Sequence[Scan],
        channels: Sequence[Channel],
        spacing: Triple,
        *,
        lungs: bool,
        skip_air: bool,
    ) -> _Region:
        """Resample the channels and bound the region to predict, by the first one where it is CT."""
        upright = reorient(images[0])
        grid = upright.grid.with_spacing(spacing)
        stored, kept = on_grid([upright, *images[1:]], channels, grid)
        del upright
        volume, within = Scan(stored[0], grid.affine), None
        if channels[0].scheme == "ct":
            within = body_field(volume) if skip_air else None
            if lungs and (found := lung_field(volume)).ok:
                box = np.zeros(volume.array.shape, bool)
                box[found.slices] = True
                within = box if within is None else within & box
        values = np.stack(stored) if len(stored) > 1 else volume.array[None]
        return cls(channels=values, grid=grid, kept=kept, within=within)

    @property
    def volume(self) -> Scan:
        """The first channel."""
        return Scan(self.channels[0], self.grid.affine)

    @property
    def share(self) -> float:
        """Share of the scan that is predicted, 0 to 1."""
        return 1.0 if self.within is None else float(self.within.mean())


def _probabilities(logits: Tensor, classes: Classes) -> Tensor:
    """Of logits (output, dz, dy, dx), in place."""
    if classes.regions or classes.single:
        return logits.sigmoid_()
    for z in range(logits.shape[1]):  # a copy of all would not fit
        logits[:, z] = logits[:, z].softmax(0)
    return logits


class _MeanOf(nn.Module):
    """The mean of several networks' logits, as nnU-Net has it of its folds."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.networks
        logits: Tensor = first(x).float()
        for network in others:
            logits = logits + network(x)
        return logits / len(self.networks)


class _Network:
    """One trained network on its device; all of a model from nnU-Net as one."""

    def __init__(
        self, bundle: Bundle, config: PredictConfig, device: torch.device, precision: torch.dtype | None
    ) -> None:
        self._bundle, self._device = bundle, device
        each = [one.network(device) for one in (bundle.networks if bundle.nnunet else (bundle,))]
        self._network: nn.Module = each[0] if len(each) == 1 else _MeanOf(each)
        self._patch = config.patch_size or bundle.patch
        if bundle.config.model.dims == 2:  # the window may be that of a 3-D network beside it
            self._patch = (1, *self._patch[1:])
        self._config = config
        self._flips = bundle.config.augment.mirrored if config.test_time_augmentation else ""
        if config.test_time_augmentation and not self._flips:
            notice("warning: no test-time augmentation: the model was trained without mirroring")
        wanted = bundle.config.train.precision
        shape = (1, len(bundle.channels), *self._patch)
        self.precision = precision or choose_inference(self._network, shape, device, wanted)

    def __call__(self, region: _Region, share: Share | None) -> NDArray[np.float32]:
        """Probability in [0, 1] of the only class at every voxel of the region; 0 where it is not
        predicted."""
        if region.nnunet is not None:
            found = np.zeros(region.grid.shape, np.float32)
            for box, probability in self._on_scan(region.nnunet, share):
                found[box] = probability[0].numpy()
            return found
        probability = predict_volume(
            self._network,
            torch.from_numpy(region.channels),
            self._windows,
            prepare=self._prepare(region),
            within=None if region.within is None else torch.from_numpy(region.within),
            device=self._device,
            share=share,
        )
        return probability.numpy()

    def maps(self, region: _Region, share: Share | None) -> Maps:
        """Probabilities of all classes at every voxel of the region; background where it is not predicted.

        Of several processes only that with part 0 has them.
        """
        classes = self._bundle.classes
        maps = Maps(classes, region.grid, least_kept(self._config))
        if region.nnunet is not None:
            for box, probability in self._on_scan(region.nnunet, share):
                maps.add(box, probability)
            return maps
        within = None if region.within is None else torch.from_numpy(region.within)
        for box, probability in predict_boxes(
            self._network,
            torch.from_numpy(region.channels),
            self._windows,
            classes.outputs,
            partial(_probabilities, classes=classes),
            prepare=self._prepare(region),
            within=within,
            device=self._device,
            share=share,
        ):
            if share is None or share.part == 0:
                maps.add(box, probability, within)
        return maps

    @torch.inference_mode()
    def _on_scan(self, prepared: Prepared, share: Share | None) -> Iterator[tuple[Box, Tensor]]:
        """Boxes of a scan and the probabilities (output, dz, dy, dx) in them, as nnU-Net makes them: it
        interpolates logits. Of several processes only that with part 0 has them."""
        outputs = self._bundle.classes.outputs
        kept = torch.empty((outputs, *prepared.values.shape[1:]), dtype=torch.float16)
        for box, logits in predict_boxes(
            self._network,
            torch.from_numpy(prepared.values),
            self._windows,
            outputs,
            Tensor.contiguous,
            device=self._device,
            share=share,
        ):
            kept[:, *box] = logits.to("cpu", torch.float16)
        if share is None or share.part == 0:
            for box, logits in on_scan(kept, prepared):
                yield box, _probabilities(logits.contiguous(), self._bundle.classes)

    def _prepare(self, region: _Region) -> Callable[[Tensor], Tensor]:
        bundle = self._bundle
        each = enumerate(zip(bundle.channels, region.kept, strict=True))
        return prepared(
            [normalisation_of(channel, kept, bundle.normalisation_at(at)) for at, (channel, kept) in each]
        )

    @property
    def _windows(self) -> Windows:
        config = self._config
        threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        return Windows(
            patch=self._patch,
            overlap=config.overlap,
            # Threads have a window each at a time: together they are a batch.
            batch_size=config.batch_size if threads == 1 else 1,
            grow=True,
            flips=self._flips,
            precision=self.precision,
            nnunet=self._bundle.nnunet is not None,
            threads=threads,
        )


class Predictor:
    """A trained network, or several as one, ready to predict scans.

    Args:
        bundle: what training wrote.
        config: windows and thresholds.
        device: where it computes.
        precision: float32 or bfloat16; None: what the training says, and the faster where it says nothing.

    Raises:
        VoxelscaleError: `config` asks for lungs in images that are no CT, or names an unknown class.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: PredictConfig,
        device: torch.device,
        precision: torch.dtype | None = None,
    ) -> None:
        self._config, self._calibration, self._device = config, bundle.calibration, device
        self._classes, self._channels, self._of_ct = bundle.classes, bundle.channels, bundle.of_ct
        self._bundle = bundle
        config.check_classes(bundle.classes.names)
        self._lungs = bundle.looks_at_lungs if config.lungs is None else config.lungs
        if self._lungs and bundle.nnunet:
            raise VoxelscaleError("predict.lungs: a model from nnU-Net looks at the whole scan", NO_LUNGS)
        if self._lungs and not self._of_ct:
            channel = bundle.channels[0].name
            raise VoxelscaleError(f"predict.lungs: lungs are found in CT, not in {channel}", NO_LUNGS)
        self._networks: dict[Triple, list[_Network]] = {}
        self._reductions = [
            _FalsePositives(network, one, device)
            for one in bundle.networks
            if (network := one.false_positive_network(device)) is not None
        ]
        for one in (bundle,) if bundle.nnunet else bundle.networks:
            same_spacing = self._networks.setdefault(one.spacing, [])
            same_spacing.append(_Network(one, config, device, precision))

    @property
    def precisions(self) -> list[torch.dtype]:
        """The precision of each network."""
        return [network.precision for networks in self._networks.values() for network in networks]

    @precisions.setter
    def precisions(self, precisions: Sequence[torch.dtype]) -> None:
        each = [network for networks in self._networks.values() for network in networks]
        for network, precision in zip(each, precisions, strict=True):
            network.precision = precision

    def probability(
        self,
        image: Scan,
        share: Share | None = None,
        lungs: Lungs | None = None,
        more: Sequence[Scan] = (),
    ) -> NDArray[np.float32]:
        """Probability in [0, 1] of the only class at every voxel of a scan, on the scan's own grid.

        Of several networks it is the mean. With a share, only the process with part 0 has it.

        Args:
            image: the first channel.
            lungs: what `lung_field` found in the image turned to LPS; None: it is computed here.
            more: the other channels.

        Raises:
            ValueError: there are several classes.
        """
        found, _ = self._look([image, *more], share, lungs)
        if isinstance(found, list):
            raise ValueError("each of several classes has a probability of its own")
        return found

    def assist(self, images: Sequence[Scan], share: Share, lungs: Lungs | None = None) -> None:
        """Do this process's share of the work for the one with part 0, which calls `see`."""
        self._look(images, share, lungs)

    def _look(
        self, images: Sequence[Scan], share: Share | None, lungs: Lungs | None
    ) -> tuple[NDArray[np.float32] | list[Maps], dict[Triple, _Region]]:
        """The only class's probability, or each network's maps of all classes; and the case as it was
        resampled to each spacing."""
        regions = self._regions(images, lungs)
        with policy(self._device):
            if self._classes.single:
                return self._mean(regions, share, images[0].grid), regions
            each = ((regions[spacing], network) for spacing, of in self._networks.items() for network in of)
            return [network.maps(region, share) for region, network in each], regions

    def _regions(self, images: Sequence[Scan], lungs: Lungs | None) -> dict[Triple, _Region]:
        if self._bundle.nnunet:
            return {self._bundle.spacing: _Region.of_nnunet(images, self._bundle)}
        rules = {"lungs": False, "skip_air": False}
        if self._of_ct:
            lungs = lungs or lung_field(reorient(images[0]))
            rules = {"lungs": self._lungs and lungs.ok, "skip_air": self._config.skip_air}
        return {spacing: _Region.of(images, self._channels, spacing, **rules) for spacing in self._networks}

    def _mean(
        self, regions: Mapping[Triple, _Region], share: Share | None, grid: Grid
    ) -> NDArray[np.float32]:
        """The only class's probability, on a lattice."""
        count = sum(map(len, self._networks.values()))
        total: NDArray[np.float32] | None = None
        for spacing, networks in self._networks.items():
            region = regions[spacing]
            mean = networks[0](region, share)
            for network in networks[1:]:
                mean += network(region, share)
            mean *= 1 / count
            mean = _on_grid(mean, region, grid)
            total = mean if total is None else np.add(total, mean, out=total)
        assert total is not None  # noqa: S101 (a bundle has a network)
        return total

    def look(self, case: str, image: Scan, share: Share | None = None) -> tuple[list[Finding], Scan]:
        """The findings in a scan, most confident first, and their mask on the scan's own voxels."""
        seen = self.see(case, image, share)
        return seen.findings, seen.mask

    def see(
        self,
        case: str,
        image: Scan,
        share: Share | None = None,
        lungs: Lungs | None = None,
        more: Sequence[Scan] = (),
    ) -> Seen:
        """What there is in a scan.

        Args:
            image: the first channel, HU of CT; axes in any order.
            share: this process's share of the work; None: all of it.
            lungs: what `lung_field` found in the image turned to LPS; None: it is computed here.
            more: the other channels, each on its own lattice.
        """
        if self._of_ct:
            lungs = lungs or lung_field(reorient(image))
        found, regions = self._look([image, *more], share, lungs)
        depth = lung_depth(image, lungs) if self._of_ct else None
        near = NearLungs(depth, image.grid) if self._lungs and depth is not None else None
        rules: dict[str, Any] = {
            "image": image.array if self._of_ct else None,
            "depth": depth,
            "keep": near,
        }
        findings, mask = found_by(self._config, case, self._classes, found, image.grid, **rules)
        if isinstance(found, list):
            mask = self._classes.written(mask)
        if self._reductions and findings:
            seconds = [second(findings, regions[second.spacing].volume) for second in self._reductions]
            findings = _with_second_score(findings, np.mean(seconds, axis=0))
        if (calibration := self._calibration) is not None:
            findings = [
                replace(f, probability=float(calibration(f.probability if f.score is None else f.score)))
                for f in findings
            ]
        return Seen(
            findings=findings,
            mask=Scan(mask, image.affine),
            lungs=lungs if self._lungs else None,
            left_out=near.left_out if near else 0,
            share=min((region.share for region in regions.values()), default=1.0),
            probabilities=kept_probabilities(self._classes, found, image.grid),
        )


class NearLungs:
    """Whether a finding lies at most `LUNG_MARGIN_MM` from the lungs; counts those that do not."""

    def __init__(self, depth: Scan, grid: Grid) -> None:
        self._depth, self._grid, self._far = depth, grid, set[bytes]()

    def __call__(self, voxels: NDArray[np.int64]) -> bool:
        """Whether a finding of these voxels (n, 3) does."""
        near = outside_mm(voxels, self._grid, self._depth) <= LUNG_MARGIN_MM
        if not near:
            self._far.add(voxels[0].tobytes())
        return near

    @property
    def left_out(self) -> int:
        """How many were not."""
        return len(self._far)


class _FalsePositives:
    """A network for false-positive reduction."""

    def __init__(self, network: nn.Module, bundle: Bundle, device: torch.device) -> None:
        self._network, self._device = network, device
        self._normalise, self.spacing = bundle.normalisation, bundle.spacing

    def __call__(self, findings: Sequence[Finding], volume: Scan) -> NDArray[np.float64]:
        """(n,) probabilities of being lesions, each the mean over crops mirrored along one axis or none."""
        centres = volume.grid.mm_to_index([(f.x, f.y, f.z) for f in findings])
        shape = crop_shape(self.spacing)
        starts = [crop_start(centre, shape) for centre in centres]
        seconds = []
        for first in range(0, len(starts), CROPS_AT_ONCE):
            crops = [_crop(volume.array, start, shape) for start in starts[first : first + CROPS_AT_ONCE]]
            batch = self._normalise(upload(torch.from_numpy(np.stack(crops)[:, None]), self._device))
            batch = batch.contiguous(memory_format=torch.channels_last_3d)
            with torch.inference_mode():
                looks = [self._network(batch.flip(axes)).sigmoid() for axes in ((), (2,), (3,), (4,))]
            seconds.append(torch.stack(looks).mean(0)[:, 0].double().cpu().numpy())
        return np.concatenate(seconds)


def _crop(volume: NDArray[np.int16], start: IntTriple, shape: IntTriple) -> NDArray[np.int16]:
    """A window of a scan; air beyond it."""
    out = np.full(shape, AIR_HU, np.int16)
    inside, target = overlap_slices(start, shape, volume.shape)
    if all(side.stop > side.start for side in inside):
        out[target] = volume[inside]
    return out


def _with_second_score(findings: Sequence[Finding], seconds: NDArray[np.float64]) -> list[Finding]:
    """Each finding's score becomes its geometric mean with the false-positive reduction network's; in the
    new order."""
    rescored = []
    for finding, second in zip(findings, seconds, strict=True):
        score = math.sqrt(finding.probability * float(second))
        rescored.append(replace(finding, probability=score, score=score))
    return ranked(rescored)


def _on_grid(probability: NDArray[np.float32], region: _Region, grid: Grid) -> NDArray[np.float32]:
    """A region's probabilities on a scan's own voxels."""
    if region.grid.same_as(grid, SAME_MM):
        return probability
    coarse = Scan(probability, region.grid.affine)
    return np.asarray(resample(coarse, grid, "linear", fill=0.0).array, np.float32)
