"""Whether the device computes what it should: against float64 on the processor."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_phases.common import BF16, FP32, Record, Setting, channels_last, relative
from benchmarks.gpu_phases.subject import balls, make_store
from torch import Tensor, nn

from voxelscale.classes import LESION, Classes
from voxelscale.config import AugmentConfig, DataConfig, IntTriple, LossConfig, OptimConfig
from voxelscale.device import autocast, policy, to_channels_last
from voxelscale.infer.sliding_window import Windows, gaussian_profile, predict_volume, window_starts
from voxelscale.model.build import build_loss
from voxelscale.model.norm import SLOPE, make_norm
from voxelscale.model.unet import UNet
from voxelscale.samples.batch import Normalisation, make_batch, normalisations
from voxelscale.samples.patches import PatchSource
from voxelscale.store import open_store
from voxelscale.train.optim import make_optimizer

LESS_EXACT = 1.5
"""How many times the processor's own error in bf16 the device's may be."""
KINKS = 1e-2
"""Largest difference of float32 gradients behind maxima and leaky ReLUs: where rounding lets one fall the
other way, its gradient goes elsewhere. The processor's own reach 0.003."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual": {"residual": True},
    "residual encoder": {"blocks": (1, 2, 2)},
}
NORMS = ("instance", "group", "batch", "none")
CT = Normalisation(low=-1000, high=400, mean=-300, std=400)
ORTHOGONAL = 1e-3
"""Largest difference of Muon's updates, which are computed in float32 by an iteration."""


def correctness(setting: Setting, record: Record) -> None:
    """Norms, losses, optimisers, augmentation, sliding window and networks."""
    worst: dict[str, float] = {}
    with policy(setting.device):
        for part in (of_norms, of_losses, of_optimisers, of_samples, of_windows, of_networks):
            rows = part(setting)
            for name, found, limit in rows:
                record.check(name, found, limit)
            nearest = max(rows, key=lambda row: row[1] / row[2])
            worst[part.__name__[3:]] = nearest[1] / nearest[2]
            record.put(**{part.__name__[3:]: {name: [found, limit] for name, found, limit in rows}})
    record.put(worst_share_of_limit=worst)
    shares = ", ".join(f"{name} {share:.2f}" for name, share in worst.items())
    record.says = f"largest difference, as a share of its limit: {shares}"


Checks = list[tuple[str, float, float]]
"""Name, difference, limit."""


def of_norms(setting: Setting) -> Checks:
    """Every norm by itself: output and gradients of input, scale and shift."""
    checks: Checks = []
    edge = 12 if setting.tiny else 32
    sizes = [[edge + 1, edge, edge + 3], [2 * edge, 3 * edge + 1]]
    every = itertools.product(
        NORMS, sizes, (8, 32), (1.0, SLOPE), (torch.float32, torch.bfloat16), (True, False)
    )
    for norm, size, channels, slope, kind, last in every:
        torch.manual_seed(0)
        layer = make_norm(norm, channels)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        x, g = (torch.randn(2, channels, *size).to(kind) for _ in range(2))
        right = normed(copy.deepcopy(layer).double(), x.double() + 0, g.double(), slope)
        x, g = x.to(setting.device), g.to(setting.device)
        if last:
            x, g = channels_last(x), channels_last(g)
        found = normed(layer.to(setting.device), x, g, slope)
        half = kind == torch.bfloat16
        limits = (BF16 if half else FP32, BF16 if half else KINKS if slope < 1 else FP32)
        words = f"{norm}, {channels} x {'x'.join(map(str, size))}, slope {slope}, {str(kind)[6:]}"
        for what, a, b, limit in zip(("output", "gradient"), found, right, limits, strict=True):
            checks.append((f"{words}, {'last' if last else 'contiguous'}: {what}", relative(a, b), limit))
    return checks


def normed(layer: nn.Module, x: Tensor, g: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """A norm's output; the gradients of its input and its weights in a row, each by its own length."""
    leaf = x.requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(leaf * 1, slope)  # it may change what it is given
    slopes = torch.autograd.grad(y, [leaf, *layer.parameters()], g.to(y.dtype))
    return y.detach(), torch.cat([s.flatten().double().cpu() / len(s.flatten()) ** 0.5 for s in slopes])


def of_networks(setting: Setting) -> Checks:
    """Outputs and gradients of every norm and kind, 2-D and 3-D, even and odd sizes, both formats."""
    every = [*itertools.product(NORMS, KINDS, (3, 2), (True,)), *((n, "plain", 3, False) for n in NORMS)]
    if setting.tiny:
        every = [(norm, kind, 3, True) for norm, kind in zip(NORMS, [*KINDS, "plain"], strict=True)]
    checks: Checks = []
    for norm, kind, dims, odd in every:
        edge = (12 if setting.tiny else 24) if dims == 3 else 48
        size = [edge + 4 * axis - odd * (axis != 1) for axis in range(dims)]
        name = f"{norm}, {kind}, {'x'.join(map(str, size))}"
        options = {"dims": dims, "depth": 3, "filters": 8, "norm": norm, **KINDS[kind]}
        checks += of_network(name, options, size, setting.device)
    if not setting.tiny:  # maps so large that the fast kernels take them
        options = {"depth": 4, "filters": 16, "deep_supervision": True}
        checks += of_network("instance, supervised, 48^3", options, [48] * 3, setting.device)
    return checks


def of_network(name: str, options: dict[str, Any], size: Sequence[int], device: torch.device) -> Checks:
    """One network's outputs and gradients, in float32 and bf16, both memory formats."""
    torch.manual_seed(0)
    model = UNet(prior=0.5, **options)
    image = torch.randn(2, 1, *size)
    right = passed(copy.deepcopy(model).double(), image.double(), torch.float32)
    half = passed(copy.deepcopy(model), image, torch.bfloat16)
    checks: Checks = []
    for precision, last in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        one: nn.Module = copy.deepcopy(model).to(device)
        x = image.to(device)
        if last:
            one, x = to_channels_last(one), channels_last(x)
        found = passed(one, x, precision)
        for what, a, b, c in zip(("output", "gradient"), found, right, half, strict=True):
            if precision == torch.float32:
                limit = FP32 if what == "output" else KINKS
            else:  # how much rounding changes a network is the network's; the processor says how much
                limit = max(BF16, LESS_EXACT * relative(c, b))
            words = f"{name}, {str(precision)[6:]}, {'last' if last else 'contiguous'}: {what}"
            checks.append((words, relative(a, b), limit))
    return checks


def passed(model: nn.Module, image: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits, and the gradients of all weights in a row."""
    with autocast(image.device, precision):
        outputs = model(image)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs]
    torch.stack([x.square().mean() for x in wide]).sum().backward()  # type: ignore[no-untyped-call]
    slopes = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return wide[0].detach(), torch.cat(slopes)


def of_losses(setting: Setting) -> Checks:
    """Value and gradient of every loss, from the same float32 logits."""
    three = Classes(names=("a", "b", "c"), values=((1,), (2,), (3,)))
    regions = Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2))
    plain = LossConfig(small=0.0, top_k=1.0)
    cases = {"plain": plain, "small and top-k": LossConfig()}
    sets = {
        "one class": LESION,
        "classes": three,
        "regions": regions,
        "one class, ignored": replace(LESION, ignore=(9,)),
        "classes, ignored": replace(three, ignore=(9,)),
        "regions, ignored": replace(regions, ignore=(9,)),
    }
    checks: Checks = []
    edge = 12 if setting.tiny else 40
    for (kind, classes), (how, config), deep in itertools.product(
        sets.items(), cases.items(), (False, True)
    ):
        random = torch.Generator().manual_seed(0)
        sizes = [edge, edge // 2] if deep else [edge]
        logits = [torch.randn(2, classes.outputs, n, n, n, generator=random) for n in sizes]
        highest = 1 if classes.plain else 3
        target = torch.from_numpy(np.stack([balls((edge,) * 3, 1 + seed, highest) for seed in (0, 1)]))[
            :, None
        ]
        target = target.float()
        if classes.ignore:
            target[:, :, :2] = -1
        loss = build_loss(config, classes)
        right = slopes_of(loss, [x.double() for x in logits], target)
        found = slopes_of(loss, [x.to(setting.device) for x in logits], target.to(setting.device))
        name = f"{kind}, {how}{', supervised' * deep}"
        checks += [
            (f"{name}: {what}", relative(a, b), FP32)
            for what, a, b in zip(("value", "gradient"), found, right, strict=True)
        ]
    return checks


def slopes_of(loss: Callable[..., Any], logits: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """A loss's value and Dice, and its gradients."""
    for part in logits:
        part.requires_grad_()
    value, dice = loss(logits if len(logits) > 1 else logits[0], target)
    slopes = torch.autograd.grad(value, logits)
    return torch.cat([value.detach()[None], dice.detach()]), torch.cat([s.flatten() for s in slopes])


def of_optimisers(setting: Setting) -> Checks:
    """What five steps of every update rule change, with the same gradients."""
    checks: Checks = []
    for name in ("adamw", "sgd", "lars", "lamb", "muon"):
        config = OptimConfig(name=name, lr=1e-2)
        right = stepped(config, torch.device("cpu"), torch.float64)
        found = stepped(config, setting.device, torch.float32)
        checks.append((name, relative(found, right), ORTHOGONAL if name == "muon" else FP32))
    return checks


def stepped(config: OptimConfig, device: torch.device, kind: torch.dtype) -> Tensor:
    """What five steps change in a network's weights."""
    torch.manual_seed(0)
    model = UNet(depth=3, filters=8)
    gradients = [[torch.randn(p.shape) for p in model.parameters()] for _ in range(5)]
    before = torch.cat([p.detach().flatten().to(device, kind) for p in model.parameters()])
    model.to(device, kind)
    optimizer = make_optimizer(model, config)
    for step in gradients:
        for weight, gradient in zip(model.parameters(), step, strict=True):
            weight.grad = gradient.to(device, kind)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def of_samples(setting: Setting) -> Checks:
    """Forty augmented samples: the device's against the processor's, and a batch's against one by one."""
    edge, size = (12, (24, 32, 32)) if setting.tiny else (48, (64, 80, 96))
    patch: IntTriple = (edge, edge + 4, edge - 2)
    folder = setting.out / "small store"
    make_store(folder, size)
    store = open_store(folder)
    source = PatchSource(store, DataConfig(patch_size=patch), AugmentConfig(strength=2.0), 0)
    samples, normalise = [source[index] for index in range(40)], normalisations(store)
    image, labels = make_batch(samples, patch, normalise, setting.device)
    single = [make_batch([sample], patch, normalise, setting.device) for sample in samples]
    with threads(2 if torch.get_num_threads() == 1 else 1):
        right, truth = make_batch(samples, patch, normalise, torch.device("cpu"))
    apart = (labels.cpu() != truth).float().mean()
    # The places between voxels are exact to about 1e-3 voxel in float32.
    return [
        ("images", relative(image, right), 1e-3),
        ("labels that differ, share", float(apart), 1e-3),
        ("images, one by one", relative(torch.cat([one for one, _ in single]), image), FP32),
        ("labels, one by one", float((torch.cat([one for _, one in single]) != labels).sum()), 0.5),
    ]


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within it PyTorch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_windows(setting: Setting) -> Checks:
    """The sliding window against plain loops in float64, in both precisions, and batches of other sizes."""
    patch: IntTriple = (8, 12, 12) if setting.tiny else (32, 32, 24)
    shape = (13, 20, 17) if setting.tiny else (70, 81, 64)
    torch.manual_seed(0)
    model = UNet(depth=2, filters=4, prior=0.5).eval()
    nn.init.normal_(model.head.weight, std=1.0)
    volume = torch.from_numpy(
        (np.random.default_rng(0).normal(-600, 100, shape) + 500.0 * balls(shape, 0, 1)).astype(np.int16)
    )
    right = by_loops(copy.deepcopy(model).double(), volume, patch)
    to_channels_last(model.to(setting.device))

    def look(batch: int, precision: torch.dtype) -> Tensor:
        windows = Windows(patch=patch, batch_size=batch, precision=precision)
        return predict_volume(model, volume, windows, prepare=CT, device=setting.device)

    whole = look(3, torch.float32)
    return [
        ("float32", relative(whole, right), FP32),
        ("bfloat16", relative(look(3, torch.bfloat16), right), BF16),
        ("one window at a time", relative(look(1, torch.float32), whole), FP32),
    ]


@torch.inference_mode()
def by_loops(model: nn.Module, volume: Tensor, patch: IntTriple) -> Tensor:
    """Probabilities (z, y, x) float64 by the definition."""
    sums, weights = (torch.zeros(volume.shape, dtype=torch.float64) for _ in range(2))
    z, y, x = (gaussian_profile(n).double() for n in patch)
    weight = z[:, None, None] * y[:, None] * x
    starts = (window_starts(n, p, 0.5) for n, p in zip(volume.shape, patch, strict=True))
    for place in itertools.product(*starts):
        box = tuple(slice(s, s + n) for s, n in zip(place, patch, strict=True))
        logits = model(CT(volume[box]).double()[None, None])[0, 0]
        sums[box] += logits * weight
        weights[box] += weight
    return (sums / weights).sigmoid()
