"""What arithmetic the device does well."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError

Way = TypeVar("Way")


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; ``auto`` takes bfloat16 where the device computes in it natively.

    Raises:
        VoxelscaleError: bf16 is asked of a GPU that has none.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not native:
            raise VoxelscaleError(f"{device}: has no bfloat16", "set train.precision=fp32")
    else:
        cpu = torch.cpu
        native = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return torch.bfloat16 if wanted == "bf16" or (wanted == "auto" and native) else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Within it a network computes in this precision, float32 or bfloat16; float32 is any device's own."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, precision)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor in main memory as one on a device; a GPU's copy is queued, and nobody waits for it.

    A copy from ordinary memory would be waited for. From page-locked memory it is not, and PyTorch reuses
    that memory only once the copy is done.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_channels_last(model: nn.Module) -> nn.Module:
    """The same network with its convolutions' weights channels last in memory, 2-D and 3-D each."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight = module.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
            # A weight of one input channel is contiguous in both formats, and PyTorch goes by the
            # channel's stride: with the other format's the output would come channels first.
            strides = [1 if axis == 1 else stride for axis, stride in enumerate(weight.stride())]
            module.weight.data = weight.as_strided(weight.shape, strides)
    return model


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a run computes; recorded with the run, so that a resumed run computes in the same way.

    Attributes:
        precision: ``fp32`` or ``bf16``, of the forward and backward pass.
        channels_last: memory format of activations and weights.
        compile: whether the network goes through torch.compile.
    """

    precision: str
    channels_last: bool
    compile: bool

    @property
    def dtype(self) -> torch.dtype:
        """What autocast computes in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def to_dict(self) -> dict[str, str | bool]:
        """Of plain values, for JSON or YAML."""
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Arithmetic:
        """What `to_dict` gave.

        Raises:
            VoxelscaleError: it is something else.
        """
        try:
            found = Arithmetic(**record)
        except TypeError as error:
            raise VoxelscaleError(f"recorded arithmetic: {error}", "begin a new run") from error
        flags = isinstance(found.channels_last, bool) and isinstance(found.compile, bool)
        if found.precision not in ("fp32", "bf16") or not flags:
            raise VoxelscaleError(f"recorded arithmetic: {dict(record)} is unknown", "begin a new run")
        return found


def choose_arithmetic(
    make_model: Callable[[], nn.Module],
    shape: Sequence[int],
    device: torch.device,
    *,
    precision: str = "auto",
    channels_last: bool | None = None,
    compile: bool | None = False,
    rounds: int = 2,
) -> Arithmetic:
    """The way to compute that is right on this device and, of those left open, the fastest.

    bfloat16 is taken only if it agrees with float32 here (see `bf16_agrees`); otherwise a notice says
    so and float32 is taken. What is None is decided by timing forward and backward passes in turns.
    The answer depends on the moment: ask once a run, in one rank, and record it. The global random
    state is left as it was.

    Args:
        make_model: gives a network to try on; it is not used further.
        shape: of an input, ``(batch, channel, ...)``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        channels_last, compile: True or False where the user has decided.
        rounds: timed passes of each way, after one that is not timed.

    Raises:
        VoxelscaleError: bf16 is asked of a GPU that has none.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        name: Literal["fp32", "bf16"] = (
            "bf16" if choose_precision(precision, device) == torch.bfloat16 else "fp32"
        )
        if name == "bf16" and not bf16_agrees(make_model, shape, device):
            notice(f"{device}: bfloat16 disagrees with float32 here; computing in float32")
            name = "fp32"
        # A processor may have bfloat16 and yet be slower in it; GPUs never are.
        open_still = name == "bf16" and precision == "auto" and device.type == "cpu"
        names: list[Literal["fp32", "bf16"]] = ["bf16", "fp32"] if open_still else [name]
        formats = [True, False] if channels_last is None else [channels_last]
        compiles = [False, True] if compile is None else [compile]
        ways = [
            Arithmetic(precision=p, channels_last=f, compile=c)
            for p in names
            for f in formats
            for c in compiles
        ]
        return ways[0] if len(ways) == 1 else _fastest(ways, make_model, shape, device, rounds)


@torch.inference_mode()
def choose_inference(
    model: nn.Module, shape: Sequence[int], device: torch.device, precision: str
) -> torch.dtype:
    """float32 or bfloat16 for a trained network; ``auto`` on a CPU is the faster, by a few passes.

    Args:
        model: on the device, channels last.
        shape: of an input, ``(batch, channel, ...)``.

    Raises:
        VoxelscaleError: bf16 is asked of a GPU that has none.
    """
    dtype = choose_precision(precision, device)
    if dtype == torch.float32 or precision != "auto" or device.type != "cpu":
        return dtype
    image = torch.zeros(*shape).movedim(1, -1).contiguous().movedim(-1, 1)

    def step(dtype: torch.dtype) -> None:
        with autocast(device, dtype):
            model(image)

    passes = {dtype: partial(step, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for warm in passes.values():
        warm()
    return _quickest(passes, device, rounds=2)


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
        with _no_tf32():
            right = _pass(model, image, torch.float32)
        contiguous = _pass(model, image, torch.bfloat16)
        channels_last = image.movedim(1, -1).contiguous().movedim(-1, 1)
        others = [contiguous, _pass(to_channels_last(model), channels_last, torch.bfloat16)]
    except torch.OutOfMemoryError:
        return True
    return all(_alike(right, other) for other in others)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Within it float32 is computed as float32, also where a GPU's default is TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _pass(model: nn.Module, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A network's output and gradients, float32."""
    model.zero_grad(set_to_none=True)
    with autocast(image.device, dtype):
        outputs = _listed(model(image))
    _energy(outputs).backward()  # type: ignore[no-untyped-call]
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


def _fastest(
    ways: Sequence[Arithmetic],
    make_model: Callable[[], nn.Module],
    shape: Sequence[int],
    device: torch.device,
    rounds: int,
) -> Arithmetic:
    """The way whose fastest pass is the fastest; one that fails (no compiler, say) is out."""
    passes: dict[Arithmetic, Callable[[], None]] = {}
    for way in ways:
        step = _trial(way, make_model, shape, device)
        try:
            step()
        except Exception as error:  # whatever a compiler or a kernel raises, the others remain
            notice(f"{device}: {way} does not work here: {type(error).__name__}", level=2)
        else:
            passes[way] = step
    if not passes:
        return ways[0]
    return _quickest(passes, device, rounds)


def _quickest(passes: Mapping[Way, Callable[[], None]], device: torch.device, rounds: int) -> Way:
    """The way whose fastest pass is the fastest, timed in turns."""
    times: dict[Way, list[float]] = {way: [] for way in passes}
    for _ in range(rounds):
        for way, step in passes.items():
            times[way].append(seconds_of(step, device))
    return min(times, key=lambda way: min(times[way]))


def _trial(
    way: Arithmetic, make_model: Callable[[], nn.Module], shape: Sequence[int], device: torch.device
) -> Callable[[], None]:
    """A forward and backward pass computed this way."""
    model = make_model().to(device)
    image = torch.randn(*shape, device=device)
    if way.channels_last:
        to_channels_last(model)
        image = image.movedim(1, -1).contiguous().movedim(-1, 1)
    if way.compile:
        model.compile()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(device, way.dtype):
            outputs = _listed(model(image))
        _energy(outputs).backward()  # type: ignore[no-untyped-call]

    return step


def _listed(output: Tensor | list[Tensor]) -> list[Tensor]:
    """A network's logits; with deep supervision there are several."""
    return output if isinstance(output, list) else [output]


def _energy(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient reaches every weight."""
    return torch.stack([logits.float().square().mean() for logits in outputs]).sum()


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Seconds that a piece of work takes on a device, once it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, where the C library is glibc; whether it does.

    By default glibc gives every large block back to the kernel, which zeroes it page by page when the
    next step asks for it again: a tenth of a CPU training step. Peak memory stays the same. To be
    called once, before large tensors are made.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1))
    return all([mallopt(option, value) == 1 for option, value in settings])
