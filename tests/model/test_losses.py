from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceLoss
from numpy.typing import NDArray
from scipy import ndimage, special
from torch.nn import functional as F

from voxelscale.classes import LESION, Classes
from voxelscale.config import LossConfig
from voxelscale.model.build import build_loss
from voxelscale.model.losses import AROUND, dice_cross_entropy, small_lesion_weight, soft_dice


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 1, 6, 7, 8), (torch.rand(3, 1, 6, 7, 8) > 0.8).float()


def test_soft_dice_is_monais(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, target = batch
    theirs = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none")(logits, target)
    assert torch.allclose(1 - soft_dice(logits, target), theirs.flatten(), atol=1e-6)


def test_the_sum(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, target = batch
    loss, dice = dice_cross_entropy(logits, target, dice=0.7, cross_entropy=2.0)
    wanted = 0.7 * (1 - soft_dice(logits, target).mean()) + 2 * F.binary_cross_entropy_with_logits(
        logits, target
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert not dice.requires_grad


def test_the_objective_does_not_change_with_the_number_of_workers(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, target = batch
    whole, _ = dice_cross_entropy(logits, target)
    parts = [dice_cross_entropy(logits[i : i + 1], target[i : i + 1])[0] for i in range(3)]
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-6)


def test_empty_patches() -> None:
    zeros = torch.zeros(1, 1, 4, 4, 4)
    assert soft_dice(zeros - 30, zeros).item() == pytest.approx(1.0, abs=1e-6)
    assert soft_dice(zeros + 30, zeros).item() < 0.05


def test_half_precision_logits_are_computed_in_float32(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, target = batch
    loss, _ = dice_cross_entropy(logits.bfloat16(), target)
    assert loss.dtype == torch.float32


def test_gradient_of_the_sum() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 1, 2, 3, 2) > 0.7
    assert torch.autograd.gradcheck(
        lambda x: dice_cross_entropy(x, target, dice=0.7, cross_entropy=1.3)[0], logits
    )


@pytest.mark.parametrize(("small", "top_k"), [(0.7, 1.0), (0.0, 0.2), (1.0, 0.1)])
def test_gradient_with_weights(small: float, top_k: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 1, 4, 3, 5) > 0.7
    assert torch.autograd.gradcheck(
        lambda x: dice_cross_entropy(x, target, small=small, top_k=top_k)[0], logits
    )


def test_the_hardest_voxels_of_each_sample(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, target = batch
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1)
    count = round(0.1 * entropy.shape[1])
    wanted = entropy.sort(descending=True).values[:, :count].mean()
    loss, _ = dice_cross_entropy(logits, target, dice=0.0, top_k=0.1)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 30, 22), (26, 17)])
def test_the_weight_is_of_the_cube_about_each_voxel(shape: tuple[int, ...]) -> None:
    """Against SciPy's mean filter, for samples with lesions here, there and nowhere."""
    random = np.random.default_rng(0)
    masks = np.zeros((3, *shape), bool)
    masks[0] = ndimage.binary_dilation(random.random(shape) > 0.995, iterations=2)
    masks[1].flat[-1] = True  # in a corner
    share = [ndimage.uniform_filter(mask.astype(float), AROUND, mode="constant") for mask in masks]
    wanted = np.where(masks, (0.5 / np.maximum(share, 1e-9)) ** 0.7, 1).clip(1)
    weight = small_lesion_weight(torch.from_numpy(masks[:, None]).float(), 0.7)
    assert weight[:, 0].numpy() == pytest.approx(wanted, rel=1e-4)


def test_voxels_of_small_lesions_weigh_more() -> None:
    target = torch.zeros(1, 1, 40, 40, 40)
    target[0, 0, 10, 10, 10] = 1  # alone in its cube of 9 x 9 x 9
    target[0, 0, 20:40, 20:40, 20:40] = 1
    weight = small_lesion_weight(target, 0.5)[0, 0]
    assert weight[10, 10, 10].item() == pytest.approx((0.5 * 9**3) ** 0.5, rel=1e-5)
    assert weight[30, 30, 30] == 1
    assert weight[target[0, 0] == 0].eq(1).all()
    flat = small_lesion_weight(target[:, :, 10], 1.0)[0, 0]
    assert flat[10, 10].item() == pytest.approx(0.5 * 9**2, rel=1e-5)
    one = target.clone().requires_grad_()
    loss, _ = dice_cross_entropy(one - 0.5, target, dice=0.0, small=0.5)
    (slope,) = torch.autograd.grad(loss, one)
    ratio = slope[0, 0, 10, 10, 10] / slope[0, 0, 30, 30, 30]
    assert ratio.item() == pytest.approx((0.5 * 9**3) ** 0.5, rel=1e-4)


# Several classes, regions and ignored voxels

THREE = Classes(names=("liver", "vessel", "tumour"), values=((1,), (2,), (3,)), ignore=(9,))
REGIONS = Classes(
    names=("whole", "core", "rim"),
    values=((1, 2, 3), (2, 3), (3,)),
    regions=True,
    order=(1, 2, 3),
    ignore=(9,),
)
ONE = Classes(ignore=(9,))
LOSS = LossConfig(dice=0.7, cross_entropy=1.3, smooth=0.5, small=0.0, top_k=1.0)


def without_ignored(classes: Classes) -> Classes:
    return replace(classes, ignore=())


def stored_labels(classes: Classes, shape: tuple[int, ...], share: float = 0.2) -> torch.Tensor:
    """``(batch, 1, ...)`` float32 of blobs; a share of the voxels is ignored where classes have that."""
    random = np.random.default_rng(1)
    smooth = np.stack([ndimage.gaussian_filter(random.random(shape[1:]), 1.5) for _ in range(shape[0])])
    rank = np.argsort(np.argsort(smooth.ravel())).reshape(shape) / smooth.size
    values = np.digitize(rank, [0.6, 0.75, 0.9])
    if classes.single:
        values = np.minimum(values, 1)
    if classes.ignore:
        values[random.random(shape) < share] = classes.ignore[0]
    return torch.from_numpy(classes.stored(values).astype(np.float32))[:, None]


def some_logits(classes: Classes, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return 2 * torch.randn(shape[0], classes.outputs, *shape[1:], generator=generator)


def small_weight(mask: NDArray[np.bool_], exponent: float) -> NDArray[np.float64]:
    if len(mask) == 1:  # a slice: the square about each pixel
        return small_weight(mask[0], exponent)[None]
    share = ndimage.uniform_filter(mask.astype(float), AROUND, mode="constant")
    return np.where(mask, (0.5 / np.maximum(share, 1e-9)) ** exponent, 1).clip(1)


def soft_dice_of(p: NDArray[np.float64], t: NDArray[np.bool_], smooth: float) -> float:
    return float((2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth))


def hardest(entropy: NDArray[np.float64], top_k: float) -> float:
    """The mean of the largest, of the voxels that are not ignored."""
    count = max(1, round(top_k * entropy.size))
    return float(np.sort(entropy)[::-1][:count].mean()) if entropy.size else 0.0


def by_definition(
    logits: torch.Tensor, target: torch.Tensor, classes: Classes, config: LossConfig
) -> tuple[float, list[float]]:
    """Loss, and Dice of each sample, in float64 with NumPy and SciPy."""
    losses, scores = [], []
    for x, labels in zip(logits.double().numpy(), target[:, 0].numpy().astype(int), strict=True):
        kept = labels >= 0
        if classes.single or classes.regions:
            p = special.expit(x)
            masks = [(labels >= 0) & (labels >> k & 1).astype(bool) for k in range(len(x))]
            entropies = [
                -np.log(np.where(mask, one, 1 - one)) * small_weight(mask, config.small)
                for one, mask in zip(p, masks, strict=True)
            ]
        else:
            p = special.softmax(x, 0)
            masks = [labels == k + 1 for k in range(len(x) - 1)]
            own = np.take_along_axis(p, labels.clip(0)[None], 0)[0]
            weight = np.ones(labels.shape)
            for mask in masks:
                weight = np.where(mask, small_weight(mask, config.small), weight)
            entropies = [-np.log(own) * weight]
            p = p[1:]
        dice = [soft_dice_of(o[kept], m[kept], config.smooth) for o, m in zip(p, masks, strict=True)]
        entropy = np.mean([hardest(one[kept], config.top_k) for one in entropies])
        scores.append(float(np.mean(dice)))
        losses.append(config.dice * (1 - scores[-1]) + config.cross_entropy * entropy)
    return float(np.mean(losses)), scores


KINDS = [ONE, THREE, without_ignored(THREE), REGIONS, without_ignored(REGIONS)]


@pytest.mark.parametrize("classes", KINDS)
@pytest.mark.parametrize(("small", "top_k"), [(0.0, 1.0), (0.7, 1.0), (0.0, 0.2), (0.5, 0.1)])
@pytest.mark.parametrize("shape", [(3, 12, 14, 10), (2, 1, 24, 30)])
def test_the_loss_of_each_kind_of_classes(
    classes: Classes, small: float, top_k: float, shape: tuple[int, ...]
) -> None:
    config = replace(LOSS, small=small, top_k=top_k)
    logits, target = some_logits(classes, shape), stored_labels(classes, shape)
    loss, dice = build_loss(config, classes)(logits, target)
    wanted, scores = by_definition(logits, target, classes, config)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert dice.tolist() == pytest.approx(scores, rel=1e-5)
    assert not dice.requires_grad
    assert build_loss(config, classes)(logits.bfloat16(), target)[0].dtype == torch.float32


@pytest.mark.parametrize("classes", KINDS)
@pytest.mark.parametrize(("small", "top_k"), [(0.0, 1.0), (0.7, 0.2)])
def test_gradients_of_each_kind_of_classes(classes: Classes, small: float, top_k: float) -> None:
    shape = (2, 4, 3, 5)
    target = stored_labels(classes, shape)
    loss = build_loss(replace(LOSS, small=small, top_k=top_k), classes)
    logits = some_logits(classes, shape).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target)[0], logits)
    loss(logits, target)[0].backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[(target < 0).expand_as(logits)].eq(0).all()


@pytest.mark.parametrize("classes", KINDS)
def test_memory_format_changes_nothing(classes: Classes) -> None:
    shape = (2, 8, 9, 10)
    logits, target = some_logits(classes, shape), stored_labels(classes, shape)
    last = logits.clone(memory_format=torch.channels_last_3d).requires_grad_()
    first = logits.clone().requires_grad_()
    for each in (first, last):
        build_loss(LossConfig(), classes)(each, target)[0].backward()  # type: ignore[no-untyped-call]
    assert first.grad is not None
    assert last.grad is not None
    assert torch.allclose(first.grad, last.grad, atol=1e-8)


@pytest.mark.parametrize("classes", KINDS)
def test_one_class_with_ignored_voxels_and_every_kind_is_a_mean_over_samples(classes: Classes) -> None:
    """Samples differ in how many voxels are ignored; one is ignored throughout."""
    shape = (4, 8, 9, 10)
    logits, target = some_logits(classes, shape), stored_labels(classes, shape)
    if classes.ignore:
        target[1, :, :5], target[2] = -1, -1
    loss = build_loss(LossConfig(), classes)
    whole, dice = loss(logits, target)
    parts = [loss(logits[i : i + 1], target[i : i + 1]) for i in range(4)]
    assert whole.item() == pytest.approx(np.mean([part.item() for part, _ in parts]), rel=1e-5)
    assert dice.tolist() == pytest.approx([one.item() for _, one in parts], rel=1e-5)
    if classes.ignore:
        assert parts[2][0].item() == pytest.approx(0, abs=1e-6)


def test_where_nothing_is_ignored_one_class_has_the_plain_loss() -> None:
    shape = (2, 8, 9, 10)
    target = stored_labels(without_ignored(ONE), shape)
    logits = some_logits(ONE, shape)
    plain, marked = (build_loss(LossConfig(), kind)(logits, target) for kind in (LESION, ONE))
    assert marked[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
    assert torch.allclose(marked[1], plain[1])


def test_lower_resolutions_have_half_the_weight_each() -> None:
    shape = (2, 8, 12, 16)
    sizes = [(8, 12, 16), (4, 6, 8), (4, 3, 4)]
    target = stored_labels(THREE, shape)
    logits = [some_logits(THREE, (2, *size)) for size in sizes]
    # Of two voxels the nearest to their middle is either; nnU-Net takes the second.
    targets = [target, target[..., 1::2, 1::2, 1::2], target[..., 1::2, 2::4, 2::4]]
    wanted = [by_definition(x, t, THREE, LOSS) for x, t in zip(logits, targets, strict=True)]
    loss, dice = build_loss(LOSS, THREE)(logits, target)
    assert loss.item() == pytest.approx((4 * wanted[0][0] + 2 * wanted[1][0] + wanted[2][0]) / 7, rel=1e-5)
    assert dice.tolist() == pytest.approx(wanted[0][1], rel=1e-5)


# Against nnU-Net


def nnunet(**options: object) -> dict[str, object]:
    return {"batch_dice": False, "smooth": LOSS.smooth, "ddp": False, **options}


@pytest.mark.parametrize("ignored", [False, True])
def test_classes_are_nnunets(ignored: bool) -> None:
    """Its cross-entropy is a mean over the batch's voxels, so with ignored ones samples go one by one."""
    losses = pytest.importorskip("nnunetv2.training.loss.compound_losses")
    dice = pytest.importorskip("nnunetv2.training.loss.dice")
    classes = THREE if ignored else without_ignored(THREE)
    shape = (1 if ignored else 3, 8, 9, 10)
    logits, target = some_logits(classes, shape), stored_labels(classes, shape)
    theirs = losses.DC_and_CE_loss(
        nnunet(do_bg=False),
        {},
        weight_ce=LOSS.cross_entropy,
        weight_dice=LOSS.dice,
        ignore_label=9 if ignored else None,
        dice_class=dice.MemoryEfficientSoftDiceLoss,
    )
    wanted = theirs(logits, torch.where(target < 0, 9, target)) + LOSS.dice  # theirs is of -Dice
    assert build_loss(LOSS, classes)(logits, target)[0].item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("ignored", [False, True])
def test_regions_are_nnunets(ignored: bool) -> None:
    """With ignored voxels theirs is the sum of the regions' cross-entropies, not their mean."""
    losses = pytest.importorskip("nnunetv2.training.loss.compound_losses")
    dice = pytest.importorskip("nnunetv2.training.loss.dice")
    classes = REGIONS if ignored else without_ignored(REGIONS)
    shape = (1 if ignored else 3, 8, 9, 10)
    logits, target = some_logits(classes, shape), stored_labels(classes, shape)
    stored = target[:, 0].numpy().astype(np.int16)
    each = [torch.from_numpy(mask) for _, mask in classes.each(stored)]
    both = [*each, target[:, 0] < 0] if ignored else each
    theirs = losses.DC_and_BCE_loss(
        {},
        nnunet(do_bg=True),
        weight_ce=LOSS.cross_entropy / (len(each) if ignored else 1),
        weight_dice=LOSS.dice,
        use_ignore_label=ignored,
        dice_class=dice.MemoryEfficientSoftDiceLoss,
    )
    wanted = theirs(logits, torch.stack(both, 1).float()) + LOSS.dice
    assert build_loss(LOSS, classes)(logits, target)[0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_targets_of_lower_resolutions_and_their_weights_are_nnunets() -> None:
    name = "nnunetv2.training.data_augmentation.custom_transforms.deep_supervision_donwsampling"
    older = pytest.importorskip(name)
    newer = pytest.importorskip("batchgeneratorsv2.transforms.utils.deep_supervision_downsampling")
    wrapper = pytest.importorskip("nnunetv2.training.loss.deep_supervision")
    scales = [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.5, 0.25, 0.25)]
    target = stored_labels(THREE, (2, 8, 12, 16))
    small = older.DownsampleSegForDSTransform2(scales)(seg=target.numpy())["seg"]
    again = [newer.DownsampleSegForDSTransform(scales)(segmentation=one)["segmentation"] for one in target]
    logits = [some_logits(THREE, (2, *seg.shape[2:])) for seg in small]
    one = build_loss(LOSS, THREE)
    # The lowest of their decoder's levels, here a fourth, has no weight.
    weights = np.array([1, 1 / 2, 1 / 4, 0])
    theirs = wrapper.DeepSupervisionWrapper(lambda x, t: one(x, t)[0], weights / weights.sum())
    for seg in (small, [np.stack(level) for level in zip(*again, strict=True)]):
        targets = [torch.from_numpy(np.asarray(level)) for level in seg]
        wanted = theirs([*logits, logits[-1]], [*targets, targets[-1]])
        assert one(logits, target)[0].item() == pytest.approx(wanted.item(), rel=1e-6)
