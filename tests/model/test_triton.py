"""Our Triton kernels without a GPU: run by the interpreter, built by the compiler, and done without."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from voxelscale.console import set_verbosity
from voxelscale.model.fast import kernels
from voxelscale.model.fast.convolution import convolution, convolve_filled
from voxelscale.model.norm import make_norm

HERE = Path(__file__).parent
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
NAMES = ("voxelscale.model.fast.triton_norm", "voxelscale.model.fast.triton_pool")


REST = pytest.param("not quick", marks=pytest.mark.slow)  # over a minute


@pytest.mark.parametrize("part", ["quick", REST])
def test_in_the_interpreter(part: str) -> None:
    """`interpreted_kernels.py` in a process of its own: other tests must not run in the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed (it is on Linux on x86-64 only)")
    version = importlib.metadata.version("triton").split(".")
    numpy = np.lib.NumpyVersion(np.__version__)
    if (int(version[0]), int(version[1])) < (3, 7) and numpy >= "2.4.0":
        pytest.skip("the interpreter of Triton before 3.7 does not run with NumPy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", part]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "interpreted_kernels.py")],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# The compiler


@pytest.fixture
def compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton, keeping what it compiles in a folder of the test's own."""
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton's interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return pytest.importorskip("triton", reason="Triton is not installed (it is on Linux on x86-64 only)")


def built(triton: Any, kernel: Any, kind: str, constants: dict[str, int]) -> str:
    """The PTX that a kernel becomes for an H100, and that NVIDIA's assembler has taken."""
    from triton.backends.compiler import GPUTarget

    maps = dict.fromkeys(
        ("x", "out", "gradient", "added", "output", "of_added", "voxels", "windows"), f"*{kind}"
    )
    types = {**maps, "places": "*u8", "slope": "fp32", "eps": "fp32"}
    floats = dict.fromkeys(("partial", "kept", "weight", "bias", "sums"), "*fp32")
    names: list[str] = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**types, **floats}.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, fixed, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    assert done.asm["cubin"]
    return str(done.asm["ptx"])


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("channels", [32, 5])
def test_the_norms_kernels_compile_for_a_gpu(compiling: Any, channels: int, kind: str) -> None:
    """Channels that divide by 8 are read 16 bytes at once."""
    from voxelscale.model.fast import triton_norm as module

    split = module._Split(torch.empty(2, channels, 8, 64, 64), True, 0)
    whole: list[tuple[Any, dict[str, int]]] = [(module._moments, {}), (module._gradient, {})]
    for flag in (False, True):
        whole += [(kernel, {"ADDED": flag}) for kernel in (module._apply, module._sums)]
    for kernel, more in whole:
        code = built(compiling, kernel, kind, {**more, **split.tile})
        assert ("ld.global.v4" in code) == (channels == 32), kernel
    for kernel in (module._merge_moments, module._merge_sums):
        built(compiling, kernel, kind, split.group)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2)])
def test_the_poolings_kernels_compile_for_a_gpu(compiling: Any, stride: tuple[int, ...]) -> None:
    from voxelscale.model.fast import triton_pool as module

    constants = dict(zip("ZYX", stride, strict=True))
    for kernel in (module._largest, module._spread):
        code = built(compiling, kernel, "bf16", {"C": 32, "LENGTH": 64, "WIDTH": 32, **constants})
        assert "ld.global.v4" in code, kernel


# Without


@pytest.fixture
def processors_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Maps of CPUs are for the kernels, of which this process has checked none."""
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "_verdicts", {})
    kernels._has_triton.cache_clear()
    set_verbosity(1)
    yield monkeypatch
    kernels._has_triton.cache_clear()


def fail(*_: object) -> bool:
    raise RuntimeError("no compiler\nat all")


@pytest.mark.parametrize(
    ("agrees", "said"), [(lambda *_: False, "it disagrees with PyTorch's"), (fail, "no compiler")]
)
def test_a_kernel_that_fails_its_check_is_not_used(
    agrees: Any, said: str, processors_too: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processors_too.setitem(sys.modules, "triton", ModuleType("triton"))
    for name in NAMES:
        processors_too.setitem(sys.modules, name, SimpleNamespace(agrees=agrees))
    norm, x = make_norm("instance", 8), torch.randn(2, 4, 5, 8).movedim(-1, 1)
    for _ in range(3):
        y = norm(x, 0.1)
    assert torch.equal(y, F.leaky_relu(F.instance_norm(x, weight=norm.weight, bias=norm.bias), 0.1))  # type: ignore[arg-type]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"cpu: our Triton kernel for norm in torch.float32 is not used ({said}); using PyTorch's"


def test_a_kernel_that_passes_its_check_is_asked_once(processors_too: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def agrees(*case: object) -> bool:
        asked.append(case)
        return True

    processors_too.setitem(sys.modules, "triton", ModuleType("triton"))
    processors_too.setitem(sys.modules, NAMES[0], SimpleNamespace(agrees=agrees))
    x = torch.randn(2, 4, 5, 8).movedim(-1, 1)
    for each in (x, x, x.bfloat16()):
        assert kernels.takes_kernels(each, "triton_norm")
    assert asked == [(x.device, torch.float32), (x.device, torch.bfloat16)]
    refused = [x.contiguous(), x.double(), x[..., :0], x[:, :4], torch.randn(8, 8)]
    assert not any(kernels.takes_kernels(each, "triton_norm") for each in refused)


def test_without_triton_a_notice_says_so_once(
    processors_too: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processors_too.setitem(sys.modules, "triton", None)  # its import fails
    x = torch.randn(2, 4, 5, 8).movedim(-1, 1)
    assert not any(kernels.takes_kernels(each, "triton_norm") for each in (x, x.bfloat16(), x))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Triton: cannot be imported")


# Few channels


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_channels_of_zeros_change_no_convolution(dims: int, channels: int) -> None:
    torch.manual_seed(0)
    conv = convolution(dims, channels, 4, 3, bias=True).double()
    x = torch.randn(2, *[5, 6, 7][:dims], channels, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    results: list[list[Tensor]] = []
    for way in (conv, lambda image: convolve_filled(conv, image)):
        y = way(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *conv.parameters()))])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize(
    ("channels", "dtype", "counted"),
    [(1, torch.bfloat16, 8), (9, torch.bfloat16, 9), (1, torch.float32, 1)],
)
def test_few_channels_are_filled_up_where_a_gpu_computes_in_16_bits(
    channels: int, dtype: torch.dtype, counted: int
) -> None:
    conv = convolution(3, channels, 4, 3, bias=False).to("meta", dtype)
    with FlopCounterMode(display=False) as counter:
        conv(torch.empty(1, 4, 4, 4, channels, device="meta", dtype=dtype).movedim(-1, 1))
    assert counter.get_total_flops() == 2 * 64 * 27 * 4 * counted
