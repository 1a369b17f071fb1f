"""Whole trainings by real Gloo ranks against virtual workers, with the default loss and bf16.

    python benchmarks/emulation.py emulation/                     ten minutes of two cores, at low priority
    python benchmarks/emulation.py emulation/ --samples 8192 --seeds 5 --real-seeds 3       longer
    python benchmarks/emulation.py batch_norm/ --set model.norm=batch

Phantoms, network and patches of ``benchmarks/scaling.yaml``; loss, norm and precision the defaults. Each
number of workers is trained by one process that emulates all of them, with several seeds, and by as many
real ranks (one thread each, far more than there are cores), with some of these seeds. If emulation is
right, a real training differs from the emulated one of the same seed by less than the emulated ones of
different seeds differ from each other, and by no more than two ranks that emulate half of the workers each:
there, as between real and emulated, only the order differs in which gradients are summed.

Printed for each pair: the Dice of both; the distance of their final weights relative to how far the weights
have moved from their start. With one folder and config a training that is there is not repeated, an
interrupted one goes on, and more seeds can be asked for later.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxelscale.config import Config, dump, load
from voxelscale.dataset.listing import list_sources
from voxelscale.experiments.once import Training, train_once
from voxelscale.model.bundle import bundle_path, read_bundle
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.store.fingerprint import open_fold
from voxelscale.store.prepare import prepare
from voxelscale.train.loop import patch_task

DEFAULTS = (
    "loss.cross_entropy=5",
    "loss.small=0.5",
    "loss.top_k=0.1",
    "model.norm=instance",
    "train.precision=bf16",
)
"""The config's defaults where ``scaling.yaml`` has others."""
BUDGET = (
    "phantom.cases=32",
    "prepare.split=[0.75,0.25,0]",
    "train.validate_every=0",
    "train.checkpoint_every=320",
)


def trained(
    config: Config, seed: int, ranks: int, virtual: int, out: Path
) -> tuple[float, dict[str, Tensor]]:
    """Final Dice and weights of a training by `ranks` processes, each of `virtual` workers."""
    how = replace(config.train, seed=seed, ranks=ranks, virtual_workers=virtual, threads=1)
    run = out / "runs" / f"{ranks}x{virtual}_seed{seed}_{how.samples}"
    done, settings = run / "emulation.json", replace(config, train=how)
    facts = json.loads(done.read_text()) if done.exists() else None
    if facts is None:
        training = Training(config=settings, store=out / "store", run=run, threads=1)
        result = train_once(training, order=lambda: "go on")
        if result.ending != "finished" or result.dice is None:
            raise result.fault or RuntimeError(f"{run}: {result.ending}")
        facts = {"dice": result.dice, "config": dump(settings)}
        done.write_text(json.dumps(facts))
    if facts["config"] != dump(settings):
        raise SystemExit(f"error: {run} was trained with another config\nhint: choose another folder")
    return facts["dice"], read_bundle(bundle_path(run)).weights


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all weights of `one`, L2."""
    return math.sqrt(sum(float((one[key].double() - other[key].double()).square().sum()) for key in one))


def start_of(config: Config, seed: int, out: Path) -> dict[str, Tensor]:
    """The weights before the first update."""
    seeded = replace(config, train=replace(config.train, seed=seed))
    store = open_fold(out / "store", config.data.fold)
    return dict(patch_task(seeded, store, torch.device("cpu")).model.state_dict())


def compare(config: Config, workers: int, seeds: int, real_seeds: int, out: Path) -> dict[str, Any]:
    """Emulated and real trainings of so many workers."""
    emulated = [trained(config, seed, 1, workers, out) for seed in range(seeds)]
    dice = [score for score, _ in emulated]
    spread, pairs = statistics.stdev(dice), []
    for seed in range(real_seeds):
        start = start_of(config, seed, out)
        pair: dict[str, Any] = {"seed": seed, "emulated": dice[seed]}
        for name, ranks in (("real", workers), ("halves", 2)):
            score, weights = trained(config, seed, ranks, workers // ranks, out)
            apart = distance(emulated[seed][1], weights) / distance(emulated[seed][1], start)
            pair[name] = {"dice": score, "difference": score - dice[seed], "weights": apart}
        pairs.append(pair)
    return {"workers": workers, "dice_emulated": dice, "spread": spread, "pairs": pairs}


def show(found: dict[str, Any]) -> None:
    scores = ", ".join(f"{score:.3f}" for score in found["dice_emulated"])
    print(f"{found['workers']} workers, emulated: {scores}; standard deviation {found['spread']:.3f}")
    for pair in found["pairs"]:
        for name in ("real", "halves"):
            other = pair[name]
            text = f"{other['dice']:.4f} ({other['difference']:+.4f})"
            apart = f"weights differ by {100 * other['weights']:.2g} % of their way"
            print(f"  seed {pair['seed']}, {name}: {text}, {apart}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for scans, store and trainings")
    parser.add_argument("--workers", default="8,16")
    parser.add_argument("--samples", type=int, default=960)
    parser.add_argument(
        "--seeds", type=int, default=4, help="emulated trainings of each number, at least 2"
    )
    parser.add_argument("--real-seeds", type=int, default=2, help="of these, trained by real ranks, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one config key")
    arguments = parser.parse_args()
    if not 1 <= arguments.real_seeds <= arguments.seeds or arguments.seeds < 2:
        parser.error("--seeds is at least 2, and not less than --real-seeds")
    os.nice(10)
    out: Path = arguments.out
    sets = [*DEFAULTS, *BUDGET, f"train.samples={arguments.samples}", *arguments.set]
    config = load(Path(__file__).with_name("scaling.yaml"), sets)
    data = write_phantoms(config.phantom, out / "scans", config.prepare.workers)
    prepare(list_sources(data), out / "store", config.prepare)
    rows = []
    for workers in map(int, arguments.workers.split(",")):
        rows.append(compare(config, workers, arguments.seeds, arguments.real_seeds, out))
        show(rows[-1])
        facts = {"samples": config.train.samples, "norm": config.model.norm, "torch": torch.__version__}
        (out / "emulation.json").write_text(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
