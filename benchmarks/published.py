"""What the time model says of published trainings on many GPUs: from their smallest run, without a fit.

    python benchmarks/published.py [--out published.json]

Computed in a second; nothing is measured here. What is taken from where:

- NVIDIA's nnU-Net on a DGX A100 (8 x A100 80 GB), mixed precision, 3-D, images a second on 1 and 8 GPUs:
  NVIDIA/DeepLearningExamples, PyTorch/Segmentation/nnUNet/README.md, commit 4da7bf2.
- MLPerf Training v3.1, 3-D U-Net, NVIDIA's Eos, on 1 and 9 DGX H100: mlcommons/training_results_v3.1,
  commit f33f944, NVIDIA/results/eos_ngc23.04_mxnet and eos_n9_ngc23.04_mxnet (unet3d/result_00.txt), and
  the configs config_DGXH100_1x8x7.sh and _9x8x1.sh. 9 nodes train on 7 (1 sample a GPU) and validate on 2.
  The minutes are means of 40 runs; MLCommons multiplies those on one node by 1.083 (unet3d/scaling.json),
  as they needed fewer epochs than the reference.

Assumed: nnU-Net's plain U-Net of 6 levels (32 to 320 filters, 128^3 voxels); a step is one third forward
and two thirds backward pass, shared out over the layers by their multiplications; gradients of 4 bytes, for
MLPerf's fp16 weights of 2; no worker is slower than another; MLPerf's batch of 1 takes a seventh of its
batch of 7; links as in `voxelscale.scale.links`, eight adapters a DGX H100.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxelscale.scale.cost import Interconnect, StepCost, update_time
from voxelscale.scale.links import LINKS

FILTERS = (32, 64, 128, 256, 320, 320)
DGX_A100 = Interconnect(within=LINKS["nvlink-a100"], per_node=8)
DGX_H100 = Interconnect(within=LINKS["nvlink-h100"], between=LINKS["infiniband-ndr"], per_node=8, rails=8)

NNUNET = ((1, 24.61, 187.07), (2, 27.48, 220.83), (4, 29.96, 234.5))
"""Samples of a batch, images a second on 1 GPU and on 8."""

BLOCK = 20 * 168
"""Samples from one validation to the next: 20 epochs; from epoch 1,000 on."""
ONE_NODE = {"rate": 568.4, "rate_before_1000": 560.0, "start": 3.31, "validation": 1.83}
"""Samples a second, and seconds, of run 0 on 8 GPUs."""
NINE_NODES = {"rate": 3525.0, "seconds": 87.0, "samples": 87 * BLOCK}
"""The same of run 0 on 72."""
MINUTES = (12.18, 1.89)
"""Published for 8 and 72 GPUs."""


def unet_gradients(
    filters: Sequence[int], side: int, channels: int, bytes_each: int
) -> tuple[tuple[float, int], ...]:
    """When the gradients of a plain 3-D U-Net are ready (share of the backward pass), and their bytes.

    Two convolutions of 3^3 a level and side, transposed ones of 2^3 upwards, from the last layer to the
    first. Weights only.
    """
    layers: list[tuple[int, int]] = []  # weights and voxels, in the order of the forward pass
    voxels = [(side >> level) ** 3 for level in range(len(filters))]
    before = channels
    for width, size in zip(filters, voxels, strict=True):
        layers += [(27 * before * width, size), (27 * width * width, size)]
        before = width
    for level in reversed(range(len(filters) - 1)):
        width, size = filters[level], voxels[level]
        layers += [(8 * before * width, size // 8), (54 * width * width, size), (27 * width * width, size)]
        before = width
    layers.reverse()
    total = sum(weights * size for weights, size in layers)
    done, ready = 0, []
    for weights, size in layers:
        done += weights * size
        ready.append((done / total, bytes_each * weights))
    return tuple(ready)


def step_of(seconds: float, channels: int, bytes_each: int) -> StepCost:
    """A step of so many seconds without communication."""
    return StepCost(
        forward_seconds=seconds / 3,
        backward_seconds=2 * seconds / 3,
        update_seconds=0.0,
        input_seconds=0.0,
        batch_seconds=(),
        gradients=unet_gradients(FILTERS, 128, channels, bytes_each),
    )


def row(what: str, predicted: float, ideal: float, published: float, unit: str) -> dict[str, Any]:
    """With the errors of the prediction and of `ideal`, as if communication cost nothing."""
    percent = {"percent": 100 * (predicted / published - 1), "ideal_percent": 100 * (ideal / published - 1)}
    return {"what": what, "predicted": predicted, "published": published, "unit": unit, **percent}


def nnunet() -> list[dict[str, Any]]:
    """8 A100 from 1."""
    rows = []
    for batch, one, eight in NNUNET:
        update = update_time(step_of(batch / one, channels=4, bytes_each=4), DGX_A100, 8)
        what = f"nnU-Net, 8 A100, {batch} a GPU"
        rows.append(row(what, 8 * batch / update.total, 8 * one, eight, "images/s"))
    return rows


def mlperf() -> list[dict[str, Any]]:
    """72 H100, 56 of which train, from 8."""
    step, measured = step_of(1.0, channels=1, bytes_each=2), 56 / ONE_NODE["rate"]
    exposed = update_time(step, DGX_H100, 8).exposed
    alone = (measured - exposed) / 7
    step = replace(step, forward_seconds=alone / 3, backward_seconds=2 * alone / 3)
    update = update_time(step, DGX_H100, 56).total
    last = ONE_NODE["validation"] * 8 / 16  # the others are hidden behind the training of the 7 nodes

    def run(what: str, samples: float, published: float, unit: str, divisor: float) -> dict[str, Any]:
        predicted, ideal = (
            (ONE_NODE["start"] + samples / 56 * each + last) / divisor for each in (update, measured / 7)
        )
        return row(what, predicted, ideal, published, unit)

    block = BLOCK / ONE_NODE["rate"] + ONE_NODE["validation"]
    early = 50 * BLOCK / ONE_NODE["rate_before_1000"]
    late = (60 * MINUTES[0] - ONE_NODE["start"] - early) / block
    what = "MLPerf 3-D U-Net, 72 H100"
    return [
        row(f"{what}, training", 56 / update, 7 * ONE_NODE["rate"], NINE_NODES["rate"], "samples/s"),
        run(f"{what}, run 0", NINE_NODES["samples"], NINE_NODES["seconds"], "s", 1),
        run(f"{what}, all runs", (50 + late) * BLOCK, MINUTES[1], "min", 60),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    rows = nnunet() + mlperf()
    for r in rows:
        print(
            f"{r['what']:36} {r['predicted']:8.2f} predicted {r['published']:8.2f} published {r['unit']:9}"
            f" {r['percent']:+.1f} % (without communication {r['ideal_percent']:+.1f} %)"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
