"""One optimisation step: ours and others' in turns, and its memory."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from benchmarks.gpu_phases.common import Record, Setting, Skipped, channels_last, described
from torch import Tensor, nn
from torch.nn import functional as F

from voxelscale.config import Config, LossConfig, from_dict
from voxelscale.device import choose_precision, seconds_of, to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_loss
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.model.unet import UNet
from voxelscale.train.memory import TooLarge, require_memory, simulate, step_memory
from voxelscale.train.passes import TrainingPass

Loss = Callable[[Any, Tensor], Any]
Step = Callable[[], None]
ROUNDS = 10
COMPILING = 0.55
"""Share of the phase's time after which no further network is compiled."""
SCALE = 1024.0
"""Of a loss in fp16; a fixed one, so that no contender waits to look at its gradients."""
WAYS = (("bf16", False), ("bf16", True), ("fp16", False))
"""Precision, and whether cuDNN tries its kernels, of the others."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def our_loss(logits: Tensor, target: Tensor) -> Tensor:
    return dice_cross_entropy(logits, target)[0]


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of each sample and cross-entropy, written with PyTorch's functions."""
    logits = logits.float()
    probability, flat = logits.sigmoid().flatten(1), target.flatten(1)
    overlap = (probability * flat).sum(1)
    dice = (2 * overlap + 1) / (probability.sum(1) + flat.sum(1) + 1)
    return 1 - dice.mean() + F.binary_cross_entropy_with_logits(logits, target)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A network, what it is trained with, and how it computes.

    Attributes:
        way: ``eager``, ``compiled`` or ``graph`` (ours alone: `voxelscale.train.passes`).
        tried: whether cuDNN tries its kernels on every shape (``cudnn.benchmark``), as nnU-Net lets it.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Loss = our_loss
    precision: str = "bf16"
    last: bool = True
    way: str = "eager"
    tried: bool = False
    foreign: bool = False

    @property
    def label(self) -> str:
        order = "channels last" if self.last else "contiguous"
        return f"{self.name}, {self.way}, {self.precision}, {order}{', tried' * self.tried}"


def shape_of_step(setting: Setting) -> tuple[tuple[int, ...], int, int]:
    """Of the batch, and the network's depth and filters."""
    return ((2, 1, 16, 16, 16), 3, 4) if setting.tiny else ((2, 1, 128, 128, 128), 6, 32)


def make_step(
    contender: Contender,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    backend: str = "inductor",
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[Step, nn.Module]:
    """An optimisation step of a fresh network, and the network; the same data and AdamW for all."""
    torch.manual_seed(0)
    model = contender.make().to(device)
    image, target = torch.randn(shape).to(device), (torch.rand(shape) > 0.95).float().to(device)
    if contender.last:
        # Ours knows how to mark a weight of one input channel; the others get what PyTorch offers.
        if contender.foreign:
            model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        else:
            to_channels_last(model)
        image = channels_last(image)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    run = wrap(model)
    graph = graph_of(model, contender, device) if contender.way == "graph" else None
    if contender.way == "compiled":
        run.compile(backend=backend)
    scale = SCALE if contender.precision == "fp16" else 1.0
    kind = TYPES[contender.precision]

    def step() -> None:
        torch.backends.cudnn.benchmark = contender.tried
        if graph is not None:
            graph.clear_gradients()
            graph(image, target)
        else:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, kind, enabled=kind != torch.float32):
                logits = run(image)
            value = contender.loss(logits, target)
            ((value[0] if isinstance(value, tuple) else value) * scale).backward()
            if scale != 1:
                torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / scale)
        optimizer.step()

    for _ in range(3 if graph is not None else 0):
        step()  # it is recorded at the second
    if graph is not None and not graph.recorded:
        raise RuntimeError("no CUDA graph could be recorded; see log.txt")
    return step, model


def graph_of(model: nn.Module, contender: Contender, device: torch.device) -> TrainingPass:
    """Forward, loss and backward pass as one CUDA graph.

    Raises:
        Skipped: the device is no GPU.
    """
    if device.type != "cuda":
        raise Skipped("CUDA graphs need a GPU")
    return TrainingPass(model, contender.loss, TYPES[contender.precision], device, graph=True)


def ours(setting: Setting) -> list[Contender]:
    """Ours: in both memory formats, as a graph, and with the loss that a training has by default."""
    _, depth, filters = shape_of_step(setting)
    first = Contender(name="ours", make=lambda: UNet(depth=depth, filters=filters))
    default: Loss = build_loss(LossConfig())
    return [
        first,
        replace(first, last=False),
        *(replace(first, last=last, tried=True) for last in (True, False) if setting.cuda),
        replace(first, way="graph", loss=dice_cross_entropy),
        replace(first, name="ours, default loss", loss=default),
        replace(first, name="ours, default loss", loss=default, way="graph"),
    ]


def others(setting: Setting, record: Record) -> list[Contender]:
    """MONAI's DynUNet and nnU-Net's PlainConvUNet of the same size, where they are installed."""
    _, depth, filters = shape_of_step(setting)
    widths = [min(320, filters * 2**level) for level in range(depth)]
    strides = [1] + [2] * (depth - 1)
    makers: dict[str, Callable[[], nn.Module]] = {}
    try:
        dynunet: Any = importlib.import_module("monai.networks.nets.dynunet")
        makers["MONAI DynUNet"] = lambda: dynunet.DynUNet(
            3, 1, 1, [3] * depth, strides, strides[1:], filters=widths
        )
    except ImportError as error:
        record.put(monai=f"skipped: {error}")
    try:
        unet: Any = importlib.import_module("dynamic_network_architectures.architectures.unet")
        norm, act = {"eps": 1e-5, "affine": True}, {"inplace": True}
        makers["PlainConvUNet"] = lambda: unet.PlainConvUNet(
            *(1, depth, widths, nn.Conv3d, 3, strides, 2, 1, 2, True),
            *(nn.InstanceNorm3d, norm, None, None, nn.LeakyReLU, act),
        )
    except ImportError as error:
        record.put(dynamic_network_architectures=f"skipped: {error}")
    return [
        Contender(
            name=name, make=make, loss=plain_loss, precision=kind, last=last, tried=tried, foreign=True
        )
        for name, make in makers.items()
        for kind, tried in (WAYS[:1] if setting.tiny else WAYS)
        for last in (True, False)
    ]


def speed(setting: Setting, record: Record) -> None:
    """Ours and the others' without torch.compile, in turns."""
    contenders = [*ours(setting), *others(setting, record)]
    times = in_turns(contenders, setting, record, ROUNDS if not setting.tiny else 2)
    summarise(contenders, times, record)


def compiled(setting: Setting, record: Record) -> None:
    """Ours and the others' with torch.compile beside the best without it, in turns."""
    until = time.monotonic() + COMPILING * setting.seconds
    mine = ours(setting)
    eager = [c for c in mine if c.way == "eager" and c.loss is our_loss] + others(setting, record)
    quick = in_turns(eager, setting, record, 2)
    record.put(trial_ms=quick, times_ms={})
    chosen = [c for c in mine if c.way == "graph" and c.loss is dice_cross_entropy]
    for name in dict.fromkeys(c.name for c in eager):
        if same := [c for c in eager if c.name == name and c.label in quick]:
            best = min(same, key=lambda c: min(quick[c.label]))
            chosen += [best, replace(best, way="compiled")]
    times = in_turns(chosen, setting, record, ROUNDS if not setting.tiny else 2, until)
    summarise(chosen, times, record)


def in_turns(
    contenders: list[Contender],
    setting: Setting,
    record: Record,
    rounds: int,
    until: float = math.inf,
) -> dict[str, list[float]]:
    """Milliseconds of every contender's steps, taken in turns; those that fail are left out, with why."""
    shape, _, _ = shape_of_step(setting)
    steps: dict[str, Step] = {}
    out: dict[str, str] = {}
    first: dict[str, float] = {}
    norms: dict[str, float] = {}
    for contender in contenders:
        try:
            if contender.way == "compiled" and time.monotonic() > until:
                raise Skipped("no time left to compile it")
            # On a processor the compiler itself would take most of the time.
            step, model = make_step(
                contender, shape, setting.device, backend="eager" if setting.tiny else "inductor"
            )
            first[contender.label] = seconds_of(step, setting.device)
            for _ in range(2):
                step()
            norms[contender.label] = norm_of_gradients(model, contender)
        except Skipped as skipped:
            out[contender.label] = f"skipped: {skipped}"
        except Exception as error:  # whatever a kernel or a compiler raises, the others remain
            out[contender.label] = f"failed: {described(error)}"
            if not contender.foreign:
                record.wrong.append(f"{contender.label}: {described(error)}")
        else:
            steps[contender.label] = step
        record.put(left_out=out, first_step_seconds=first, gradient_norms=norms)
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            times[label].append(1e3 * seconds_of(step, setting.device))
        record.put(times_ms=times)
    return times


def norm_of_gradients(model: nn.Module, contender: Contender) -> float:
    """After the third step; alike for all ways to compute one network.

    Raises:
        RuntimeError: a weight of ours has none, so that what was timed was no training.
    """
    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    if not contender.foreign and len(slopes) < len(list(model.parameters())):
        raise RuntimeError("there are weights without a gradient")
    return float(nn.utils.get_total_norm(slopes))


def summarise(contenders: list[Contender], times: Mapping[str, list[float]], record: Record) -> None:
    """Median and spread of each, and how many times as fast as the others' fastest, round by round."""
    rows: dict[str, dict[str, float]] = {}
    rivals = [c.label for c in contenders if c.foreign and c.label in times]
    fastest = min(rivals, key=lambda label: statistics.median(times[label]), default=None)
    for label, spent in times.items():
        rows[label] = {"median_ms": statistics.median(spent), "min_ms": min(spent), "max_ms": max(spent)}
        if fastest is not None:
            ratios = [theirs / mine for theirs, mine in zip(times[fastest], spent, strict=True)]
            rows[label]["times_as_fast"] = statistics.median(ratios)
    record.put(rows=rows, fastest_other=fastest)
    mine = [c.label for c in contenders if not c.foreign and c.label in times]
    best = {min(group, key=lambda label: rows[label]["median_ms"]) for group in (mine, rivals) if group}
    record.says = "; ".join(
        f"{label}: {rows[label]['median_ms']:.1f} ms" for label in sorted(best, reverse=True)
    )
    if fastest is not None:
        ratio = max(rows[label]["times_as_fast"] for label in mine)
        record.says += f"; ours is {ratio:.2f} times as fast as the fastest other"


NEAR = (0.75, 1.33)
"""Of what a step took, over the tensors that were estimated to be alive (`memory.RESERVED` plans with)."""
SPACING = (1.0, 1.0, 1.0)


def configs(setting: Setting) -> dict[str, Config]:
    """Whose memory is estimated and measured."""
    if setting.tiny:
        # Smaller ones are dominated by what the C library itself holds.
        return {"32^3": _config([32] * 3, {"depth": 2, "filters": 16}, precision="fp32")}
    six = {"depth": 6, "filters": 32}
    return {
        "default": _config([64] * 3, {}),
        "128^3, depth 6": _config([128] * 3, six),
        "128^3, depth 6, checkpointed": _config([128] * 3, six, checkpoint_activations=True),
        "128^3, depth 6, fp32": _config([128] * 3, six, precision="fp32"),
        "96^3, batch norm, 6 patches": _config(
            [96] * 3, {"depth": 5, "filters": 32, "norm": "batch"}, batch_size=6
        ),
        "128^3, residual encoder M": _config([128] * 3, {"depth": 6, "preset": "resenc_m"}),
        "512^2, 2-D, 8 slices": _config(
            [1, 512, 512], {"dims": 2, "depth": 6, "filters": 32}, batch_size=8
        ),
    }


def _config(patch: list[int], model: dict[str, Any], **train: Any) -> Config:
    return from_dict(
        {"data": {"patch_size": patch}, "model": model, "train": {"precision": "bf16", **train}}
    )


def memory(setting: Setting, record: Record) -> None:
    """What real steps took against the estimate of the tensors alive, and a patch that is too large."""
    rows: dict[str, dict[str, float]] = {}
    if setting.cuda:  # libraries' own memory, which belongs to no step
        step_memory(_config([32] * 3, {"depth": 2}), SPACING, setting.device)
    for name, config in configs(setting).items():
        alive = simulate(config, SPACING, choose_precision(config.train.precision, setting.device)).alive
        found = step_memory(config, SPACING, setting.device)
        ratio = found / alive
        rows[name] = {"alive_mib": alive / 2**20, "measured_mib": found / 2**20, "ratio": ratio}
        record.put(rows=rows)
        if setting.cuda and not NEAR[0] <= ratio <= NEAR[1]:
            record.wrong.append(f"{name}: a step took {ratio:.2f} times what was estimated to be alive")
    ratios = [row["ratio"] for row in rows.values()]
    record.says = f"measured / estimated to be alive {min(ratios):.2f} to {max(ratios):.2f}"
    too_large(setting, record)


def too_large(setting: Setting, record: Record) -> None:
    """A patch beyond all memory: refused before a step, and on a GPU one clear error of a step itself."""
    huge = _config([1024] * 3, {"depth": 2, "filters": 64}, precision="fp32", batch_size=8)
    try:
        require_memory(huge, SPACING, setting.device)
        record.wrong.append("a step of 8 patches of 1024^3 was not refused")
    except TooLarge as error:
        record.put(refused=str(error))
    if not setting.cuda:
        return
    try:
        step_memory(huge, SPACING, setting.device)
        record.wrong.append("a step of 8 patches of 1024^3 went through")
    except VoxelscaleError as error:
        record.put(ran_out=str(error))
    step_memory(_config([32] * 3, {"depth": 2}), SPACING, setting.device)  # the GPU still works
