"""The scaling study of docs/benchmarks.md: what 1 to 64 workers do to time and Dice.

    python benchmarks/scaling.py study/            all of it, about an hour on two CPU cores
    python benchmarks/scaling.py study/ --quick    three minutes: fewer scans, samples, workers and seeds

Makes phantoms, prepares them and runs `voxelscale scale` with ``benchmarks/scaling.yaml``; prints its table
and leaves scaling.json, scaling.svg and scaling.html in the folder. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from voxelscale.config import load
from voxelscale.dataset.listing import list_sources
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.scale.report import table
from voxelscale.scale.scale import scale
from voxelscale.store.prepare import prepare

QUICK = [
    "phantom.cases=40",
    "train.samples=1024",
    "train.validate_every=512",
    "scale.workers=[1,16]",
    "scale.seeds=[0]",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for scans, store and study")
    parser.add_argument("--quick", action="store_true", help="the three-minute version")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one config key")
    arguments = parser.parse_args()
    sets = [*(QUICK if arguments.quick else []), *arguments.set]
    config = load(Path(__file__).with_suffix(".yaml"), sets)
    out: Path = arguments.out
    data = write_phantoms(config.phantom, out / "scans", config.prepare.workers)
    prepare(list_sources(data), out / "store", config.prepare)
    print(table(scale(config, out / "store", out / "study")))


if __name__ == "__main__":
    main()
