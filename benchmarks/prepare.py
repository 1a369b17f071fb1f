"""From a scan and its mask to the training store: ours against nnU-Net's preprocessing, on one core.

    pip install -c constraints.txt --no-deps nnunetv2 einops imagecodecs yacs scikit-learn joblib requests \
        seaborn graphviz        (and what benchmarks/input_pipeline.py needs)
    python benchmarks/prepare.py [--scan IMAGE MASK] [--rounds 3] [--out prepare.json]

Every preparation is a process of its own on one thread, which reads the two files, resamples them to the
same spacing and writes its store; the contenders take turns. Time is processor time, of which other work
on the machine takes little, without the interpreter's start and imports; memory the process's greatest
resident set less what it had before. nnU-Net resamples images by cubic splines (its default); a second
entry of it is given the linear interpolation that ours uses. Voxels are those of the scan as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "BLOSC_NTHREADS": "1"}

CONTENDERS = ("ours", "nnU-Net", "nnU-Net, linear")
PATCH = (64, 64, 64)


def ours(image: Path, mask: Path, spacing: list[float], out: Path) -> Callable[[], object]:
    """`voxelscale.store.prepare.prepare_case`."""
    import SimpleITK as sitk

    from voxelscale.config import PrepareConfig
    from voxelscale.dataset.listing import Source
    from voxelscale.store.prepare import prepare_case

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    target = (spacing[0], spacing[1], spacing[2])
    config = PrepareConfig(spacing=target)
    source = Source(case="case", patient="case", image=image, labels=(mask,))
    return lambda: prepare_case(source, config, out, target)


def nnunet(image: Path, mask: Path, spacing: list[float], out: Path, order: int) -> Callable[[], object]:
    """Its default preprocessor, with the configuration that its planner writes for CT."""
    import blosc2
    import torch
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    scheme = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "plans_3d",
        "preprocessor_name": "DefaultPreprocessor",
        "architecture": {},  # it is not built here
        "patch_size": list(PATCH),
        "spacing": spacing,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": scheme,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**scheme, "is_seg": True, "order": 1},
    }
    hu = {"mean": -200.0, "std": 300.0, "percentile_00_5": -900.0, "percentile_99_5": 300.0}
    plans = PlansManager(
        {
            "dataset_name": "Dataset001_Bench",
            "plans_name": "plans",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "image_reader_writer": "SimpleITKIO",
            "foreground_intensity_properties_per_channel": {"0": hu},
            "configurations": {"3d": configuration},
        }
    )
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lesion": 1},
        "file_ending": "".join(image.suffixes),
    }
    worker = DefaultPreprocessor(verbose=False)
    manager = plans.get_configuration("3d")
    out.mkdir(parents=True, exist_ok=True)
    return lambda: worker.run_case_save(
        str(out / "case"), [str(image)], str(mask), plans, manager, described
    )


def one(name: str, image: Path, mask: Path, spacing: list[float], out: Path) -> dict[str, float]:
    """In a process of its own: seconds, MiB at the peak above the start, MiB on disk."""
    if name == "ours":
        work = ours(image, mask, spacing, out)
    else:
        work = nnunet(image, mask, spacing, out, order=1 if "linear" in name else 3)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.process_time()
    work()
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"seconds": seconds, "peak_mib": (peak - before) / 2**20, "disk_mib": size / 2**20}


def phantom(folder: Path) -> tuple[Path, Path]:
    """A chest of clinical size and its mask, as files."""
    from voxelscale.config import PhantomConfig
    from voxelscale.formats import write_scan
    from voxelscale.phantom import make_phantom

    made = make_phantom(PhantomConfig(spacing=(1.25, 0.75, 0.75)), 0)
    paths = folder / "image.nii.gz", folder / "mask.nii.gz"
    for scan, path in zip((made.image, made.label), paths, strict=True):
        write_scan(scan, path)
    return paths


def measure(image: Path, mask: Path, spacing: list[float], rounds: int) -> list[dict[str, Any]]:
    """The contenders in turns, each round's figures."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory() as folder:
                words = [sys.executable, __file__, "--one", name, "--scan", str(image), str(mask)]
                words += ["--spacing", *map(str, spacing), "--into", folder]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return [{"contender": name, **_summary(runs)} for name, runs in found.items()]


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        key: {"median": statistics.median(v), "least": min(v), "greatest": max(v)}
        for key in runs[0]
        for v in [[run[key] for run in runs]]
    }


def show(rows: list[dict[str, Any]], voxels: int) -> None:
    """A table; ratios are against ours."""
    base = rows[0]
    columns = f"{'s':>6} {'range':>14} {'Mvoxels/s':>10} {'x':>6} {'peak MiB':>9} {'x':>6} {'disk MiB':>9}"
    print(f"{'':16} {columns}")
    for row in rows:
        s, peak = row["seconds"], row["peak_mib"]
        print(
            f"{row['contender']:16} {s['median']:6.2f} {s['least']:6.2f} to {s['greatest']:5.2f}"
            f" {voxels / s['median'] / 1e6:10.2f} {s['median'] / base['seconds']['median']:6.2f}"
            f" {peak['median']:9.0f} {peak['median'] / base['peak_mib']['median']:6.2f}"
            f" {row['disk_mib']['median']:9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, nargs=2, metavar=("IMAGE", "MASK"))
    parser.add_argument("--spacing", type=float, nargs=3, default=[1.5, 1.0, 1.0], help="target, z y x, mm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        image, mask = arguments.scan
        print(json.dumps(one(arguments.one, image, mask, arguments.spacing, arguments.into)))
        return
    from voxelscale.formats import read_scan

    with tempfile.TemporaryDirectory() as folder:
        image, mask = arguments.scan or phantom(Path(folder))
        shape = read_scan(image).array.shape
        rows = measure(image, mask, arguments.spacing, arguments.rounds)
    print(f"{' x '.join(map(str, shape))} voxels to {arguments.spacing} mm, {arguments.rounds} rounds")
    show(rows, shape[0] * shape[1] * shape[2])
    if arguments.out:
        versions = {name: version(name) for name in ("nnunetv2", "blosc2", "SimpleITK", "numpy")}
        facts = {"shape": shape, "spacing": arguments.spacing, "versions": versions, "rows": rows}
        arguments.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
