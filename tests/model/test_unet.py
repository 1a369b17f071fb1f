from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from voxelscale.config import ModelConfig, from_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_model
from voxelscale.model.fast.convolution import Conv3d, convolution
from voxelscale.model.fast.join import unpack_strides
from voxelscale.model.norm import SyncBatchNorm, make_norm
from voxelscale.model.unet import (
    ConvBlock,
    Decoder,
    DecoderLevel,
    Encoder,
    UNet,
    fold_batch_norms,
    plan_kernels,
    plan_pooling,
    without_supervision,
)


@settings(max_examples=25)
@given(
    st.sampled_from([2, 3]),
    st.integers(1, 4),
    st.sampled_from([1, 3, 5]),
    st.sampled_from(["instance", "batch", "sync_batch", "group", "none"]),
    st.booleans(),
    st.lists(st.integers(3, 21), min_size=3, max_size=3),
)
def test_any_size_depth_kernel_and_norm(
    dims: int, depth: int, kernel: int, norm: str, residual: bool, size: list[int]
) -> None:
    torch.manual_seed(0)
    model = UNet(dims=dims, depth=depth, filters=4, kernel_size=kernel, norm=norm, residual=residual)
    x = torch.randn(2, 1, *size[:dims])
    if norm in ("batch", "sync_batch"):
        model.eval()  # a batch of single voxels may be too few for its statistics
    y = model(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_parameters_are_those_of_the_paper() -> None:
    """By hand: depth 2, 8 filters, kernel 3, no norm (so biases), 3-D."""
    model = UNet(dims=3, depth=2, filters=8, norm="none")
    level1 = (27 * 1 * 8 + 8) + (27 * 8 * 8 + 8)
    level2 = (27 * 8 * 16 + 16) + (27 * 16 * 16 + 16)
    up = 16 * 8 * 8 + 8 * 8
    decode = (27 * 16 * 8 + 8) + (27 * 8 * 8 + 8)
    assert sum(p.numel() for p in model.parameters()) == level1 + level2 + up + decode + 8 + 1
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(ConvBlock) == 3
    assert (kinds.count(Encoder), kinds.count(Decoder), kinds.count(DecoderLevel)) == (1, 1, 1)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (1, 1, 2), (2, 2)])
def test_upsampling_is_a_transposed_convolution(stride: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    make = nn.ConvTranspose2d if len(stride) == 2 else nn.ConvTranspose3d
    reference = make(6, 4, stride, stride)  # type: ignore[arg-type]
    x = torch.randn(2, 6, *[3, 4, 5][: len(stride)])
    count = int(torch.tensor(stride).prod())
    # (in, out, *stride) to rows (*stride, out) of a 1-wide convolution.
    weight = reference.weight.movedim(1, -1).reshape(6, count * 4).T
    shape = [1, -1, *[1] * len(stride)]
    assert reference.bias is not None
    packed = torch.einsum("oc,bc...->bo...", weight, x) + reference.bias.repeat(count).view(shape)
    assert torch.allclose(unpack_strides(packed, stride), reference(x), atol=1e-5)


def test_a_2d_network_takes_slices_of_volumes() -> None:
    model = UNet(dims=2, depth=2, filters=4).eval()
    x = torch.randn(3, 1, 16, 18)
    assert torch.equal(model(x[:, :, None])[:, :, 0], model(x))


def test_it_starts_from_the_prior() -> None:
    model = UNet(dims=3, depth=3, filters=4, prior=0.02).eval()
    probability = model(torch.randn(1, 1, 16, 16, 16)).sigmoid()
    assert 0.002 < probability.median() < 0.2


def test_anisotropic_patches_are_pooled_towards_isotropy() -> None:
    assert plan_pooling((32, 128, 128), (5.0, 1.0, 1.0), 5) == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert plan_pooling((1, 64, 64), (5.0, 1.0, 1.0), 3) == ((1, 2, 2), (1, 2, 2))
    for depth, size in itertools.product(range(1, 6), (8, 24, 64)):
        bottom = size
        for stride in plan_pooling((size,) * 3, (1.0,) * 3, depth):
            bottom = -(-bottom // stride[0])
        assert bottom >= 4


def test_a_patch_too_small_for_the_depth_is_reported() -> None:
    with pytest.raises(VoxelscaleError, match="cannot be pooled 5 times") as caught:
        build_model(ModelConfig(depth=6), (16, 16, 16), (1, 1, 1))
    assert "model.depth=3" in caught.value.hint
    build_model(ModelConfig(depth=3), (16, 16, 16), (1, 1, 1))


def test_instance_norm_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours, theirs = make_norm("instance", 5), nn.InstanceNorm3d(5, affine=True)
    theirs.load_state_dict({"weight": torch.rand(5), "bias": torch.rand(5)})
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 3, 4, 2)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    one = ours(torch.randn(2, 5, 1, 1, 1))
    assert torch.equal(one.flatten(1), theirs.bias.expand(2, 5))


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        UNet(kernel_size=4)


def test_sync_batch_norm_alone_is_batch_norm() -> None:
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm(5), nn.BatchNorm3d(5)
    x = torch.randn(4, 5, 3, 4, 2)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert ours.running_var is not None
    assert theirs.running_var is not None
    assert torch.allclose(ours.running_var, theirs.running_var)


def test_channels_last_changes_nothing() -> None:
    from voxelscale.device import to_channels_last

    torch.manual_seed(0)
    model = UNet(dims=3, depth=3, filters=4).eval()
    x = torch.randn(1, 1, 12, 14, 16)
    before = model(x)
    after = to_channels_last(model)(x.contiguous(memory_format=torch.channels_last_3d))
    assert torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("size", [(4, 6, 5), (5, 4, 6)])
def test_a_small_float32_map_is_convolved_in_halves(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = Conv3d(3, 4, 3, padding=1)
    mine = torch.randn(1, 3, *size, requires_grad=True)
    reference = mine.detach().double().requires_grad_()
    y = conv(mine)
    weight, bias = conv.weight.detach().double(), conv.bias.detach().double()  # type: ignore[union-attr]
    wanted = nn.functional.conv3d(reference, weight, bias, padding=1)
    y.square().sum().backward()
    wanted.square().sum().backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    assert reference.grad is not None
    assert torch.allclose(y.double(), wanted, atol=1e-5)
    assert torch.allclose(mine.grad.double(), reference.grad, atol=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["batch", "sync_batch", "instance", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_folded_batch_norms_change_nothing(dims: int, norm: str, residual: bool) -> None:
    torch.manual_seed(0)
    model = UNet(dims=dims, depth=3, filters=4, norm=norm, residual=residual)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    image = torch.randn(2, 1, *[16] * dims)
    with torch.inference_mode():
        before = model.eval()(image)
    folded = fold_batch_norms(model)
    with torch.inference_mode():
        assert torch.allclose(folded(image), before, rtol=1e-4, atol=1e-4)
    left = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not left


# Channels, classes, kernels, deep supervision


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch", "sync_batch", "group", "none"])
@pytest.mark.parametrize("kind", ["plain", "residual", "residual encoder"])
def test_any_channels_and_outputs_with_deep_supervision(dims: int, norm: str, kind: str) -> None:
    """Every weight has a gradient, and none of the lower logits is left out of the list."""
    torch.manual_seed(0)
    config = ModelConfig(
        dims=dims,  # type: ignore[arg-type]
        depth=5,
        filters=4,
        norm=norm,  # type: ignore[arg-type]
        residual=kind == "residual",
        blocks=(1, 2, 1, 1, 1) if kind == "residual encoder" else (),
        deep_supervision=True,
    )
    patch = (1, 64, 80) if dims == 2 else (64, 64, 80)
    model = build_model(config, patch, (1, 1, 1), 2, 3)
    size = (1, 30, 44) if dims == 2 else (17, 30, 44)
    outputs = model(torch.randn(2, 2, *size))
    halves = [[-(-n // 2**level) for n in size] for level in range(3)]
    if dims == 2:
        halves = [[1, *half[1:]] for half in halves]
    assert [list(y.shape) for y in outputs] == [[2, 3, *half] for half in halves]
    torch.stack([y.square().mean() for y in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(torch.randn(2, 2, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_shallow_network_has_few_levels_to_supervise(depth: int) -> None:
    outputs = UNet(depth=depth, filters=2, deep_supervision=True)(torch.randn(1, 1, 16, 16, 16))
    assert len(outputs) == max(1, depth - 2), "the lowest of its decoder is left out"


def test_deep_supervision_changes_no_other_weight_and_can_be_left_out() -> None:
    built = []
    for supervised in (False, True):
        torch.manual_seed(0)
        built.append(UNet(depth=5, filters=4, classes=3, deep_supervision=supervised))
    plain, deep = built
    kept = without_supervision(deep.state_dict())
    more = deep.state_dict().keys() - kept.keys()
    assert more
    assert all(name.startswith("supervision.") for name in more)
    assert list(kept) == list(plain.state_dict())
    assert all(torch.equal(kept[name], value) for name, value in plain.state_dict().items())
    plain.load_state_dict(kept)
    image = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(plain.eval()(image), deep.eval()(image))


def test_deep_supervision_compiled_and_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = UNet(depth=4, filters=4, classes=2, deep_supervision=True)
    image = torch.randn(1, 1, 16, 16, 16)
    wanted = model(image)
    compiled = torch.compile(model, backend="aot_eager")(image)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(wanted, compiled, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert [y.dtype for y in model(image)] == [torch.bfloat16] * 2


def test_classes_share_the_prior_and_regions_have_it_each() -> None:
    config = ModelConfig(depth=4, filters=4, deep_supervision=True)
    softmax = build_model(config, (32, 32, 32), (1, 1, 1), outputs=4)
    regions = build_model(config, (32, 32, 32), (1, 1, 1), outputs=4, regions=True)
    assert isinstance(softmax, UNet)
    assert isinstance(regions, UNet)
    for head in (softmax.head, *softmax.supervision):
        assert head.bias.softmax(0).tolist() == pytest.approx([0.99, *[0.01 / 3] * 3])
    for head in (regions.head, *regions.supervision):
        assert head.bias.sigmoid().tolist() == pytest.approx([0.01] * 4)


@pytest.mark.parametrize("dims", [2, 3])
def test_each_level_has_its_own_kernel(dims: int) -> None:
    config = ModelConfig(dims=dims, depth=3, filters=4, kernels=((1, 3, 5), (3, 1, 3), (3, 3, 3)))  # type: ignore[arg-type]
    model = build_model(config, (1, 32, 32) if dims == 2 else (32, 32, 32), (1, 1, 1))
    assert isinstance(model, UNet)
    encoder = [level.conv1.kernel_size for level in model.encode.levels]  # type: ignore[union-attr]
    decoder = [level.level.conv2.kernel_size for level in model.decode.levels]  # type: ignore[union-attr]
    assert encoder == [kernel[-dims:] for kernel in config.kernels]
    assert decoder == [kernel[-dims:] for kernel in (config.kernels[1], config.kernels[0])]
    x = torch.randn(1, 1, *(1, 21, 18) if dims == 2 else (9, 21, 18))
    assert model(x).shape == x.shape


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 1), (3, 1, 3)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("size", [(4, 6, 5), (7, 4, 6), (6, 5, 5)])
def test_convolutions_in_halves_of_any_kernel_and_stride(
    kernel: tuple[int, ...], stride: tuple[int, ...], size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    conv = convolution(3, 3, 4, kernel, bias=True, stride=stride)
    x = torch.randn(1, 3, *size)
    wanted = nn.functional.conv3d(
        x.double(),
        conv.weight.double(),
        conv.bias.double(),  # type: ignore[union-attr]
        stride,
        tuple(edge // 2 for edge in kernel),
    )
    assert torch.allclose(conv(x).double(), wanted, atol=1e-5)


def test_kernels_of_coarse_axes() -> None:
    pools = plan_pooling((32, 128, 128), (5.0, 1.0, 1.0), 5)
    assert plan_kernels(pools, (5.0, 1.0, 1.0)) == ((1, 3, 3), (1, 3, 3), *[(3, 3, 3)] * 3)
    assert plan_kernels(pools, (1.9, 1.0, 1.0), 5) == ((5, 5, 5),) * 5


def test_lists_of_levels_that_do_not_fit_the_depth_are_reported() -> None:
    config = ModelConfig(depth=3, kernels=((3, 3, 3),) * 2)
    with pytest.raises(VoxelscaleError, match=r"model\.kernels is of 2 levels, model\.depth 3"):
        build_model(config, (32, 32, 32), (1, 1, 1))
    for wrong in ({"kernels": [[3, 3, 3]]}, {"kernels": [[3, 3, 2]] * 4}, {"blocks": [0, 1, 1, 1]}):
        with pytest.raises(VoxelscaleError, match=rf"model\.{next(iter(wrong))}"):
            from_dict({"model": wrong})
