"""Residual encoders against nnU-Net's own network (``dynamic-network-architectures``) and its planner."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from voxelscale.config import ModelConfig, from_dict
from voxelscale.device import to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_model
from voxelscale.model.checkpointing import checkpoint_activations
from voxelscale.model.fast.join import mean_pool
from voxelscale.model.resenc import ResidualBlock
from voxelscale.model.unet import fold_batch_norms, plan_kernels, plan_pooling

BRAIN, CHEST, PROSTATE = (1.0, 1.0, 1.0), (1.24, 0.79, 0.79), (3.6, 0.625, 0.625)


@dataclass(frozen=True)
class Planned:
    """What nnU-Net's planner says, and what its network then has.

    From ``nnUNetPlannerResEncM``, ``L`` and ``XL`` (``nnunetv2`` 2.8.1) by their method
    ``get_plans_for_configuration``, for three data sets by median shape: brain MRI (140 x 171 x 137 voxels,
    four channels, three classes), chest CT (252 x 512 x 512, one, one), prostate MRI (20 x 320 x 319, two,
    two). Parameters (but the auxiliary heads') and FLOP of one sample's forward pass are those of
    ``ResidualEncoderUNet`` (``dynamic-network-architectures`` 0.4.4) by PyTorch's ``FlopCounterMode``.
    """

    preset: str
    spacing: tuple[float, float, float]
    channels: int
    outputs: int
    patch: tuple[int, int, int]
    depth: int
    parameters: int
    flop: int


PLANS = [
    Planned("resenc_m", BRAIN, 4, 4, (128, 128, 128), 6, 102_350_884, 1_445_946_458_112),
    Planned("resenc_m", CHEST, 1, 2, (80, 192, 160), 6, 101_938_626, 1_686_390_374_400),
    Planned("resenc_m", PROSTATE, 2, 3, (20, 256, 256), 7, 140_400_323, 1_606_785_433_600),
    Planned("resenc_l", BRAIN, 4, 4, (160, 192, 160), 6, 102_350_884, 3_388_937_011_200),
    Planned("resenc_l", CHEST, 1, 2, (112, 256, 256), 7, 141_068_226, 5_049_163_972_608),
    Planned("resenc_l", PROSTATE, 2, 3, (20, 320, 320), 7, 140_400_323, 2_510_602_240_000),
    Planned("resenc_xl", BRAIN, 4, 4, (160, 192, 160), 6, 102_350_884, 3_388_937_011_200),
    Planned("resenc_xl", CHEST, 1, 2, (128, 320, 320), 7, 141_477_826, 8_978_681_036_800),
    Planned("resenc_xl", PROSTATE, 2, 3, (20, 320, 320), 7, 140_400_323, 2_510_602_240_000),
]


def config_of(plan: Planned) -> ModelConfig:
    kernels = plan_kernels(plan_pooling(plan.patch, plan.spacing, plan.depth), plan.spacing)
    return ModelConfig(preset=plan.preset, depth=plan.depth, kernels=kernels)  # type: ignore[arg-type]


def theirs(
    config: ModelConfig, patch: tuple[int, ...], spacing: Any, channels: int, outputs: int
) -> nn.Module:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    settled, dims = config.settled, config.dims
    pools = plan_pooling(patch[-dims:], spacing[-dims:], config.depth)
    three = [[config.kernel_size] * dims] * config.depth
    net: nn.Module = unet.ResidualEncoderUNet(
        channels,
        config.depth,
        [min(settled.filters * 2**level, settled.max_filters) for level in range(config.depth)],
        nn.Conv2d if dims == 2 else nn.Conv3d,
        [list(k)[-dims:] for k in settled.kernels] or three,
        [[1] * dims, *map(list, pools)],
        list(settled.blocks),
        outputs,
        [1] * (config.depth - 1),
        True,
        nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return net


def flop_of(model: nn.Module, channels: int, patch: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, channels, *patch, device="meta"))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.preset}-{p.patch}")
def test_presets_have_nnunets_parameters_and_arithmetic(plan: Planned) -> None:
    with torch.device("meta"):
        model = build_model(config_of(plan), plan.patch, plan.spacing, plan.channels, plan.outputs)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(plan.parameters, rel=0.01)
    assert flop_of(model, plan.channels, plan.patch) == pytest.approx(plan.flop, rel=0.01)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.preset}-{p.patch}")
def test_the_numbers_written_down_are_the_networks_own(plan: Planned) -> None:
    with torch.device("meta"):
        model = theirs(config_of(plan), plan.patch, plan.spacing, plan.channels, plan.outputs)
    heads = f"decoder.seg_layers.{plan.depth - 2}"
    used = [p for name, p in model.named_parameters() if "seg_layers" not in name or name.startswith(heads)]
    assert sum(p.numel() for p in used) == plan.parameters
    assert flop_of(model, plan.channels, plan.patch) == plan.flop


@pytest.mark.parametrize(
    ("patch", "spacing"),
    [(plan.patch, plan.spacing) for plan in PLANS]
    + [
        ((32, 128, 128), (5.0, 1.0, 1.0)),
        ((64, 64, 64), (2.0, 1.0, 1.0)),
        ((16, 320, 256), (9.0, 1.0, 1.4)),
    ],
)
def test_kernels_and_strides_are_those_that_nnunet_plans(
    patch: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    name = "nnunetv2.experiment_planning.experiment_planners.network_topology"
    topology = pytest.importorskip(name)
    _, strides, kernels, padded, _ = topology.get_pool_and_conv_props(spacing, patch, 4, 999999)
    assert tuple(padded) == patch
    pools = plan_pooling(patch, spacing, len(strides))
    assert ((1, 1, 1), *pools) == strides
    assert plan_kernels(pools, spacing) == kernels


def test_presets_are_what_nnunet_publishes() -> None:
    assert ModelConfig(preset="resenc_l", depth=7).settled.blocks == (1, 3, 4, 6, 6, 6, 6)
    flat = ModelConfig(preset="resenc_l", dims=2, depth=8).settled
    assert (flat.filters, flat.max_filters, flat.norm) == (32, 512, "instance")
    plain = ModelConfig(depth=5)
    assert plain.settled == plain
    for wrong in ({"filters": 8}, {"norm": "batch"}, {"residual": True}, {"max_filters": 100}):
        with pytest.raises(VoxelscaleError, match=r"model\.preset"):
            from_dict({"model": {"preset": "resenc_m", **wrong}})


CASES = [
    (ModelConfig(depth=3, filters=4, blocks=(1, 2, 3)), (8, 12, 16), (1.0, 1.0, 1.0)),
    (ModelConfig(depth=3, filters=4, max_filters=8, blocks=(1, 1, 2)), (8, 16, 16), (3.0, 1.0, 1.0)),
    (
        ModelConfig(depth=2, filters=4, blocks=(2, 1), kernels=((1, 3, 3), (3, 3, 3))),
        (8, 16, 16),
        (1.0, 1.0, 1.0),
    ),
    (ModelConfig(dims=2, depth=3, filters=4, blocks=(1, 1, 1)), (1, 16, 24), (1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize(("config", "patch", "spacing"), CASES)
@pytest.mark.parametrize("last", [False, True])
def test_with_their_weights_it_gives_their_logits(
    config: ModelConfig, patch: tuple[int, int, int], spacing: tuple[float, float, float], last: bool
) -> None:
    torch.manual_seed(0)
    reference = theirs(config, patch, spacing, 2, 3)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = build_model(config, patch, spacing, 2, 3)
    with torch.no_grad():
        copy_weights(reference, model, config.depth)
    image = torch.randn(2, 2, *patch[-config.dims :])
    if last:
        to_channels_last(model)
    mine = image.movedim(1, -1).contiguous().movedim(-1, 1) if last else image
    assert torch.allclose(model(mine), reference(image), atol=1e-4)


def copy_weights(reference: nn.Module, model: nn.Module, depth: int) -> None:
    """Theirs into ours, whose decoder has the skip first and goes up by a 1-wide convolution."""
    old, new = reference.state_dict(), model.state_dict()

    def put(name: str, other: str, norm: str | None = None, bias: bool = True) -> None:
        new[f"{name}.weight"].copy_(old[f"{other}.weight"])
        if bias:
            new[f"{name}.bias"].copy_(old[f"{other}.bias"])
        if norm:
            put(norm, other.removesuffix("conv") + "norm")

    put("encode.stem.conv1", "encoder.stem.convs.0.conv", "encode.stem.norm1")
    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock):
            _, _, stage, block = name.split(".")
            other = f"encoder.stages.{stage}.blocks.{block}"
            put(f"{name}.conv1", f"{other}.conv1.conv", f"{name}.norm1")
            put(f"{name}.conv2", f"{other}.conv2.conv", f"{name}.norm2")
            if module.norm3 is not None:
                places = [
                    key for key in old if key.startswith(f"{other}.skip.") and key.endswith(".conv.weight")
                ]
                put(f"{name}.conv3", places[0].removesuffix(".weight"), f"{name}.norm3", bias=False)
    for level in range(depth - 1):
        weight = old[f"decoder.transpconvs.{level}.weight"]
        count = weight[0, 0].numel()
        rows = weight.movedim(1, -1).reshape(len(weight), -1).T
        new[f"decode.levels.{level}.up.weight"].copy_(rows.view_as(new[f"decode.levels.{level}.up.weight"]))
        new[f"decode.levels.{level}.up.bias"].copy_(old[f"decoder.transpconvs.{level}.bias"].repeat(count))
        ours, other = f"decode.levels.{level}.level", f"decoder.stages.{level}.convs.0"
        put(f"{ours}.conv1", f"{other}.conv", f"{ours}.norm1")
        up, skip = old[f"{other}.conv.weight"].chunk(2, 1)
        new[f"{ours}.conv1.weight"].copy_(torch.cat([skip, up], 1))
    put("head", f"decoder.seg_layers.{depth - 2}")


@pytest.mark.parametrize("norm", ["instance", "batch", "sync_batch", "group", "none"])
@pytest.mark.parametrize("size", [(9, 13, 11), (8, 16, 12)])
def test_any_size_and_norm(norm: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(depth=3, filters=4, blocks=(1, 2, 2), norm=norm)  # type: ignore[arg-type]
    model = build_model(config, (16, 16, 16), (1, 1, 1), 2, 3)
    image = torch.randn(2, 2, *size)
    logits = model(image)
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    last = to_channels_last(copy.deepcopy(model))
    assert torch.allclose(last(image.contiguous(memory_format=torch.channels_last_3d)), logits, atol=1e-4)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 2)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9)])
def test_mean_pooling(stride: tuple[int, ...], last: bool, size: tuple[int, ...]) -> None:
    """By NumPy's means of blocks, of which those at a border are smaller."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size[-len(stride) :])
    wanted = x.numpy()
    for axis, step in enumerate(stride, start=2):
        starts = range(0, wanted.shape[axis], step)
        parts = [wanted.take(range(i, min(i + step, wanted.shape[axis])), axis) for i in starts]
        wanted = np.stack([part.mean(axis) for part in parts], axis)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    assert mean_pool(x, stride).numpy() == pytest.approx(wanted, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_pool(x.bfloat16(), stride).dtype == torch.bfloat16


def test_it_begins_as_its_skips() -> None:
    model = build_model(ModelConfig(depth=3, filters=4, blocks=(1, 2, 2)), (16, 16, 16), (1, 1, 1))
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 5
    x = torch.randn(1, 4, 8, 8, 8)
    assert torch.equal(blocks[0](x), nn.functional.leaky_relu(x, 0.01))


def test_folding_and_checkpointing_change_nothing() -> None:
    torch.manual_seed(0)
    config = ModelConfig(depth=3, filters=4, blocks=(1, 2, 2), norm="batch")
    model = build_model(config, (16, 16, 16), (1, 1, 1))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 1, 16, 16, 16)
    light = checkpoint_activations(copy.deepcopy(model))
    for each in (model, light):
        each(image).square().mean().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), light.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), name
    with torch.inference_mode():
        before = model.eval()(image)
        folded = fold_batch_norms(model)
        assert torch.allclose(folded(image), before, rtol=1e-3, atol=1e-3)
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
