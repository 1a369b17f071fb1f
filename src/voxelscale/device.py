"""The device: what arithmetic it does well, and how it is made to do it."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from voxelscale.errors import VoxelscaleError

Way = TypeVar("Way")


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def visible_gpus() -> list[str]:
    """Names for ``CUDA_VISIBLE_DEVICES`` of the GPUs that this process may use."""
    count = torch.cuda.device_count()
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given[:count] if given else [str(device) for device in range(count)]


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; ``auto`` takes bfloat16 where the device computes in it natively.

    Raises:
        VoxelscaleError: bf16 is asked of a GPU that has none.
    """
    native = has_bf16(device)
    if device.type == "cuda" and wanted == "bf16" and not native:
        raise VoxelscaleError(f"{device}: has no bfloat16", "set train.precision=fp32")
    return torch.bfloat16 if wanted == "bf16" or (wanted == "auto" and native) else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; a CPU emulates it otherwise, 70 times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


TRAINING_PRIORITY = -1
"""Of a training's CUDA stream; lower numbers go first, and 0, the default stream's, is the lowest."""


@contextmanager
def other_stream(device: torch.device, priority: int = 0) -> Iterator[None]:
    """Within it this thread's work on a GPU goes to another stream, in order with that before and after.

    Args:
        priority: against the streams of other threads.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


@lru_cache
def stream_of(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A GPU's stream, the same each time: PyTorch keeps the memory that a stream has freed for it.

    Args:
        priority: against the streams of other threads.
    """
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Within it a network computes in this precision, float32 or bfloat16; float32 is any device's own."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, precision)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from main memory a GPU's copy is queued, and nobody waits for it.

    A copy from ordinary memory would be waited for. From page-locked memory it is not, and PyTorch reuses
    that memory only once the copy is done.
    """
    if device.type != "cuda" or values.device.type != "cpu":
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
        graph: whether a GPU replays the forward and backward pass as one CUDA graph.
        deterministic: whether a GPU uses algorithms alone that give the same bits each time.
    """

    precision: str
    channels_last: bool
    compile: bool
    graph: bool = False
    deterministic: bool = False

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
        flags = all(isinstance(value, bool) for name, value in asdict(found).items() if name != "precision")
        if found.precision not in ("fp32", "bf16") or not flags:
            raise VoxelscaleError(f"recorded arithmetic: {dict(record)} is unknown", "begin a new run")
        return found


@contextmanager
def policy(device: torch.device, deterministic: bool = False) -> Iterator[None]:
    """Within it a GPU's libraries compute as a run says; nothing changes for a processor.

    float32 is float32: without TF32, which keeps 10 of its 23 bits and is PyTorch's default for
    convolutions. cuDNN tries its algorithms on each new shape and takes the fastest (``benchmark``); that
    choice, and some of the algorithms, differ from run to run. Deterministic, it does not try, and an
    operation that has no deterministic algorithm is an error.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic
    strict = torch.are_deterministic_algorithms_enabled()
    new: Any = torch.utils.deterministic
    filled = new.fill_uninitialized_memory
    if deterministic:
        # cuBLAS needs work space of a fixed size to be deterministic; PyTorch refuses without the setting.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    torch.use_deterministic_algorithms(deterministic)
    new.fill_uninitialized_memory = False  # with NaN, to show faults: a pass over every new tensor
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(strict)
        new.fill_uninitialized_memory = filled


@torch.inference_mode()
def choose_inference(
    model: nn.Module, shape: Sequence[int], device: torch.device, precision: str
) -> torch.dtype:
    """float32 or bfloat16 for a trained network; ``auto`` on a CPU is the faster, by a few passes.

    Args:
        model: on the device, channels last.
        shape: of an input, ``(batch, channel, ...)``.
        precision: that of the training; where the device has no bfloat16, a network trained in it
            computes in float32.
    """
    if not has_bf16(device):
        return torch.float32
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
    return quickest(passes, device, rounds=2)


def quickest(passes: Mapping[Way, Callable[[], None]], device: torch.device, rounds: int) -> Way:
    """The way whose fastest pass is the fastest, timed in turns."""
    times: dict[Way, list[float]] = {way: [] for way in passes}
    for _ in range(rounds):
        for way, step in passes.items():
            times[way].append(seconds_of(step, device))
    return min(times, key=lambda way: min(times[way]))


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
