"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")
PACKAGES = ("voxelscale", "torch", "numpy", "monai", "nnunetv2", "batchgeneratorsv2")


def processor() -> tuple[str, list[str]]:
    """Its model, and which of the flags that matter here it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor(), []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", "").split()
    return known.get("model name", platform.machine()), [flag for flag in FLAGS if flag in flags]


def machine() -> dict[str, Any]:
    """Processor, flags, cores, load, and versions; no name of the machine."""
    model, flags = processor()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": model,
        "flags": flags,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **versions},
    }
