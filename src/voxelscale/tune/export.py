"""A trained network for other programs: ONNX, torch.export, TorchScript, or a MONAI bundle.

Each file is tried before it takes its name: its own runtime must give the model's probabilities.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelscale.console import notice
from voxelscale.errors import EXPORT_EXTRA, VoxelscaleError
from voxelscale.files import check_output, not_written, put_in_place
from voxelscale.model.bundle import Bundle, read_bundle
from voxelscale.samples.batch import normalisation_of, prepared
from voxelscale.store.channels import Kept
from voxelscale.tune.exported import (
    CHEST,
    INPUT,
    OUTPUT,
    exported,
    facts_of,
    softmax_of,
    step_of,
    trial_inputs,
)

KINDS = {
    "onnx": ("onnx", "onnxruntime"),
    "torch-export": (),
    "torchscript": (),
    "monai-bundle": ("monai", "ignite", "fire"),
}
"""What can be written, and the packages that it takes."""

MOST_APART = 1e-4
"""Between the exported network's probabilities and the model's."""

OPSET = 18
"""Of ONNX, of 2022: all of its operators that we use are in older runtimes, too."""

FACTS = "voxelscale.json"
"""Name of the facts within a file of PyTorch; in ONNX the metadata's key is ``voxelscale``."""

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def export_model(model: Path, kind: str, out: Path, *, free: bool = False) -> float:
    """Write a model's network; return how far the file's probabilities are from the model's, at most.

    Args:
        model: a model file, or a run's folder.
        kind: of `KINDS`.
        out: the file, or the folder of a MONAI bundle.
        free: whether windows may have any size, and not the model's patch alone.

    Raises:
        VoxelscaleError: a package is missing, the model cannot be exported, or what was written differs by
            more than `MOST_APART` and was removed.
    """
    if kind not in KINDS:
        raise VoxelscaleError(f"--to {kind}: unknown", f"known: {', '.join(KINDS)}")
    check_output(out, file=kind != "monai-bundle")
    for package in KINDS[kind]:
        if find_spec(package) is None:
            raise VoxelscaleError(f"the package {package} is not installed", EXPORT_EXTRA)
    bundle = read_bundle(model)
    if any(one.false_positives for one in bundle.networks):
        notice("the network of false-positive reduction is not exported: scores are the first network's")
    if bundle.calibration is not None:
        notice("the calibration of the findings' confidence is not exported")
    if kind == "monai-bundle":
        return write_monai_bundle(bundle, out, free=free)
    write = {"onnx": write_onnx, "torch-export": write_torch_export, "torchscript": write_torchscript}[kind]
    return write(bundle, out, free=free)


def write_onnx(bundle: Bundle, out: Path, *, free: bool) -> float:
    """By PyTorch's exporter that traces; its facts are the metadata's key ``voxelscale``.

    PyTorch's two exporters are both right to 1e-6; the newer one takes 20 times as long and needs two
    packages more (docs/export.md).
    """

    def write(path: Path, network: nn.Module, example: Tensor) -> None:
        import onnx

        axes = {0: "batch"} | ({at: "zyx"[at - 5] for at in range(2, example.ndim)} if free else {})
        options: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": OPSET}
        dynamic = {INPUT: axes, OUTPUT: axes}
        torch.onnx.export(network, (example,), path, dynamo=False, dynamic_axes=dynamic, **options)
        made = onnx.load(path)
        onnx.helper.set_model_props(made, {"voxelscale": json.dumps(facts_of(bundle, free=free))})
        onnx.checker.check_model(made)
        onnx.save(made, path)

    def load(path: Path) -> Network:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda values: np.asarray(session.run([OUTPUT], {INPUT: values})[0])

    return _written(bundle, out, write, load, free=free)


def write_torch_export(bundle: Bundle, out: Path, *, free: bool) -> float:
    """A program of torch.export; free windows must be multiples of the network's step."""

    def write(path: Path, network: nn.Module, example: Tensor) -> None:
        dimension: Any = torch.export.Dim
        sizes: dict[int, Any] = {0: dimension("batch", min=1, max=1024)}
        if free:
            for axis, step in enumerate(step_of(bundle), start=2):
                sizes[axis] = step * dimension(f"{'zyx'[axis - example.ndim]}_steps", min=2, max=4096)
        # Of one sample it would take the batch for fixed.
        program = torch.export.export(network, (torch.cat([example] * 2),), dynamic_shapes=(sizes,))
        facts = facts_of(bundle, free=free, multiple=step_of(bundle))
        torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})

    def load(path: Path) -> Network:
        network = torch.export.load(path).module()
        return lambda values: np.asarray(network(torch.from_numpy(values)).numpy())

    return _written(bundle, out, write, load, free=free)


def write_torchscript(bundle: Bundle, out: Path, *, free: bool) -> float:
    """A traced module, which takes windows of any size."""

    def write(path: Path, network: nn.Module, example: Tensor) -> None:
        traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        facts = {FACTS: json.dumps(facts_of(bundle, free=free))}
        torch.jit.save(traced, path, _extra_files=facts)

    def load(path: Path) -> Network:
        network = torch.jit.load(path)  # type: ignore[no-untyped-call]
        return lambda values: np.asarray(network(torch.from_numpy(values)).numpy())

    return _written(bundle, out, write, load, free=free)


def write_monai_bundle(bundle: Bundle, out: Path, *, free: bool) -> float:
    """A folder with a TorchScript network, tried by MONAI itself on a synthetic scan of one window."""
    from voxelscale.tune import monai_bundle

    monai_bundle.check_bundle_of_monai(bundle)
    if out.is_dir() and any(out.iterdir()):
        raise VoxelscaleError(f"{out}: holds files already", "name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        part, scans = Path(folder, "bundle"), Path(folder, "scans")
        apart = write_torchscript(bundle, part / "models" / "model.ts", free=free)
        monai_bundle.write_texts(bundle, part, free=free)
        scans.mkdir()
        trial = monai_bundle.write_trial(bundle, scans)
        found = monai_bundle.probabilities_by_monai(bundle, part, trial, Path(folder, "found"))
        whole = float(np.abs(found - probabilities(bundle, trial.values)).max())
        if not whole <= MOST_APART:
            refuse(out, whole, f"{CHEST} by monai.bundle run")
        os.replace(part, out)
    return max(apart, whole)


def _written(
    bundle: Bundle,
    out: Path,
    write: Callable[[Path, nn.Module, Tensor], None],
    load: Callable[[Path], Network],
    *,
    free: bool,
) -> float:
    """Write under a temporary name, try it, and give it its name."""
    patch: tuple[int, ...] = bundle.patch[-bundle.config.model.dims :]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder, _plainly():
        part = Path(folder) / out.name
        network = exported(bundle)
        try:
            write(part, network, torch.zeros(1, len(bundle.channels), *patch))
            loaded = load(part)
        except OSError as error:
            raise not_written(out, error) from None
        except Exception as error:  # whatever an exporter says of a network, the person needs one line
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            hint = "choose another --to, or leave out --free-patch" if free else "choose another --to"
            raise VoxelscaleError(f"{out}: the network cannot be exported ({reason})", hint) from None
        worst = _apart(bundle, patch, loaded, out, "noise", CHEST)
        if free:
            more = [n + 2 * step for n, step in zip(patch, step_of(bundle), strict=True)]
            worst = max(worst, _apart(bundle, more, loaded, out, "noise"))
        put_in_place(part, out)
    return worst


def _apart(bundle: Bundle, shape: Sequence[int], loaded: Network, out: Path, *kinds: str) -> float:
    """How far a written network is from the model's own on windows of a shape.

    Args:
        kinds: of `trial_inputs`.

    Raises:
        VoxelscaleError: too far.
    """
    worst = 0.0
    for name, values in trial_inputs(bundle, shape, kinds).items():
        apart = np.abs(loaded(values) - probabilities(bundle, values)).max()
        if not apart <= MOST_APART:
            refuse(out, float(apart), name)
        worst = max(worst, float(apart))
    return worst


def refuse(out: Path, apart: float, name: str) -> None:
    """Raise the VoxelscaleError of an export that is not the model."""
    problem = (
        f"its probabilities differ from the model's by {apart:.1e} on {name}, more than {MOST_APART:g}"
    )
    raise VoxelscaleError(f"{out}: {problem}; it was removed", "choose another --to")


@torch.inference_mode()
def probabilities(bundle: Bundle, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The model's own, of what the exported network takes, ``(batch, channel, ...)``."""
    flat = values.ndim == 4
    given = torch.from_numpy(values[:, :, None] if flat else values)
    kept = Kept(mean=0.0, std=1.0, low=0.0, high=1.0)  # what goes by statistics has been normalised by them
    logits = []
    for one in bundle.networks:
        each = enumerate(one.channels)
        how = [normalisation_of(channel, kept, one.normalisation_at(at)) for at, channel in each]
        image = prepared(how)(given).contiguous(memory_format=torch.channels_last_3d)
        logits.append(one.network(torch.device("cpu"))(image).float())
    if bundle.nnunet:
        logits = [torch.stack(logits).mean(0)]
    found = torch.stack([one.softmax(1) if softmax_of(bundle) else one.sigmoid() for one in logits]).mean(0)
    return (found[:, :, 0] if flat else found).numpy()


@contextmanager
def _plainly() -> Iterator[None]:
    """Without the warnings and the log of PyTorch's exporters."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
