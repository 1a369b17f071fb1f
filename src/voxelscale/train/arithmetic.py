"""How a training computes: what is right on the device and, of that, what is fastest, found by trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from voxelscale.config import OptimConfig
from voxelscale.console import notice, warn
from voxelscale.device import (
    Arithmetic,
    autocast,
    choose_precision,
    has_bf16,
    policy,
    quickest,
    seconds_of,
    to_channels_last,
)
from voxelscale.train.optim import make_optimizer
from voxelscale.train.passes import TrainingPass

Loss = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]]

GRAPH_GAIN = 0.98
"""Maximum share of the time that a step takes with a CUDA graph, which holds memory of its own."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a user has decided; None is decided by trial.

    Attributes:
        precision: ``auto``, ``fp32`` or ``bf16``.
        channels_last, compile, graph: as in `voxelscale.device.Arithmetic`.
        deterministic: whether bits are to be the same each time.
    """

    precision: str = "auto"
    channels_last: bool | None = None
    compile: bool | None = False
    graph: bool | None = False
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The training step that is tried.

    Attributes:
        make_model: gives a network to try on; it is not used further.
        loss: output and target to what `TrainingPass` takes.
        shape: of an input, ``(batch, channel, ...)``; the target, of zeros, has one channel.
        optim: of the update.
        device: where it runs.
        rounds: timed steps of each way, after some that are not timed.
    """

    make_model: Callable[[], nn.Module]
    loss: Loss
    shape: Sequence[int]
    device: torch.device
    optim: OptimConfig
    rounds: int = 2


def choose_arithmetic(trial: Trial, wanted: Wanted) -> Arithmetic:
    """The way to compute that is right on this device and, of those left open, the fastest.

    bfloat16 is taken only if it agrees with float32 here (see `bf16_agrees`); otherwise a notice says so
    and float32 is taken. What is left open is decided by timing training steps in turns: memory format
    and compiling first, then the CUDA graph. The answer depends on the moment: ask once a run, in one rank,
    and record it. The global random state is left as it was.

    Raises:
        VoxelscaleError: bf16 is asked of a GPU that has none.
    """
    device = trial.device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), policy(device, wanted.deterministic):
        torch.manual_seed(0)
        ways = _ways(trial, wanted)
        way = ways[0] if len(ways) == 1 else _fastest(ways, trial)
        way = replace(way, deterministic=wanted.deterministic)
        if device.type == "cuda" and wanted.graph is None:
            way = _with_graph(way, trial)
        else:
            way = replace(way, graph=bool(wanted.graph) and device.type == "cuda")
    if way.deterministic and device.type == "cuda":
        _report_price(way, trial)
    return way


def _ways(trial: Trial, wanted: Wanted) -> list[Arithmetic]:
    """Every combination of what is left open but the graph, the preferred one first."""
    device = trial.device
    name: Literal["fp32", "bf16"] = (
        "bf16" if choose_precision(wanted.precision, device) == torch.bfloat16 else "fp32"
    )
    if name == "bf16" and not has_bf16(device):
        warn(f"{device}: has no bfloat16 and emulates it, many times slower; set train.precision=auto")
    if name == "bf16" and not bf16_agrees(trial.make_model, trial.shape, device):
        notice(f"{device}: bfloat16 disagrees with float32 here; computing in float32")
        name = "fp32"
    # A processor may have bfloat16 and yet be slower in it; GPUs never are.
    open_still = name == "bf16" and wanted.precision == "auto" and device.type == "cpu"
    names: list[Literal["fp32", "bf16"]] = ["bf16", "fp32"] if open_still else [name]
    formats = [True, False] if wanted.channels_last is None else [wanted.channels_last]
    compiles = [False, True] if wanted.compile is None else [wanted.compile]
    combinations = itertools.product(names, formats, compiles)
    return [Arithmetic(precision=p, channels_last=f, compile=c) for p, f, c in combinations]


def bf16_agrees(make_model: Callable[[], nn.Module], shape: Sequence[int], device: torch.device) -> bool:
    """Whether a network's outputs and gradients in bfloat16 are those of float32, but for rounding.

    Some library versions compute bf16 3-D convolutions wrongly (cuDNN before 9.15: PyTorch issues 163539,
    166122 and 166643); this sees it on the device at hand. It looks at one sample in both memory formats,
    as each has kernels of its own, against float32 without TF32. Outputs may differ by a quarter of their
    own spread, gradients must point the same way (cosine above 0.9); wrong kernels give outputs and
    gradients that have nothing to do with the right ones. Where even one sample does not fit, the training
    will say so.
    """
    image = torch.randn(1, *shape[1:], device=device)
    model = make_model().to(device)
    try:
        with policy(device):
            right = _pass(model, image, torch.float32)
            contiguous = _pass(model, image, torch.bfloat16)
            channels_last = image.movedim(1, -1).contiguous().movedim(-1, 1)
            others = [contiguous, _pass(to_channels_last(model), channels_last, torch.bfloat16)]
    except torch.OutOfMemoryError:
        return True
    return all(_alike(right, other) for other in others)


def _pass(model: nn.Module, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A network's output and gradients, float32."""
    model.zero_grad(set_to_none=True)
    with autocast(image.device, dtype):
        outputs = model(image)
    # With deep supervision there are several. A scalar whose gradient reaches every weight.
    outputs = outputs if isinstance(outputs, list) else [outputs]
    torch.stack([logits.float().square().mean() for logits in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    grads = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return outputs[0].detach().float(), torch.cat(grads)


def _alike(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether outputs and gradients are the same but for the rounding of bfloat16."""
    (right, slope), (logits, gradient) = one, other
    if not (torch.isfinite(logits).all() and torch.isfinite(gradient).all()):
        return False
    error = (logits - right).square().mean().sqrt()
    alike = torch.nn.functional.cosine_similarity(slope, gradient, dim=0)
    return bool(error <= 0.25 * right.std() + 1e-6) and bool(alike > 0.9)


def _fastest(ways: Sequence[Arithmetic], trial: Trial) -> Arithmetic:
    """The way whose fastest step is the fastest; one that fails (no compiler, say) is left out."""
    working = {way: step for way in ways if (step := _working(way, trial))}
    return quickest(working, trial.device, trial.rounds) if working else ways[0]


def _with_graph(way: Arithmetic, trial: Trial) -> Arithmetic:
    """The way, with a CUDA graph if that is faster."""
    recorded = replace(way, graph=True)
    steps = {each: step for each in (way, recorded) if (step := _working(each, trial))}
    if len(steps) < 2:
        return way
    times: Mapping[Arithmetic, float] = {
        each: min(seconds_of(step, trial.device) for _ in range(trial.rounds + 1))
        for each, step in steps.items()
    }
    return recorded if times[recorded] < GRAPH_GAIN * times[way] else way


def _report_price(way: Arithmetic, trial: Trial) -> None:
    """Say how much longer a step takes for being deterministic."""
    seconds = []
    for strict in (True, False):
        with torch.random.fork_rng(devices=[trial.device]), policy(trial.device, strict):
            step = _working(way, trial)
            seconds.append(min(seconds_of(step, trial.device) for _ in range(trial.rounds)) if step else 0)
    if all(seconds):
        times = seconds[0] / seconds[1]
        notice(
            f"train.deterministic: a step takes {times:.2f} times as long as with the fastest algorithms"
        )


def _working(way: Arithmetic, trial: Trial) -> Callable[[], None] | None:
    """A training step computed this way, warmed up; None, after a notice, if it does not work here."""
    try:
        step = _step(way, trial)
        for _ in range(4 if way.graph else 1):  # a graph is recorded at the second
            step()
    except Exception as error:  # whatever a compiler or a kernel raises, the others remain
        notice(f"{trial.device}: {way} does not work here: {type(error).__name__}", level=2)
        return None
    return step


def _step(way: Arithmetic, trial: Trial) -> Callable[[], None]:
    device = trial.device
    model = trial.make_model().to(device)
    image = torch.randn(*trial.shape, device=device)
    target = torch.zeros_like(image[:, :1])
    if way.channels_last:
        to_channels_last(model)
        image = image.movedim(1, -1).contiguous().movedim(-1, 1)
    if way.compile:
        model.compile()
    optimizer = make_optimizer(model, trial.optim)
    training_pass = TrainingPass(model, trial.loss, way.dtype, device, way.graph)

    def step() -> None:
        training_pass.clear_gradients()
        training_pass(image, target)
        optimizer.step()

    return step
