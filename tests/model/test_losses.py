from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceLoss
from scipy import ndimage
from torch.nn import functional as F

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
