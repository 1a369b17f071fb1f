"""Slices of a scan with truth, prediction and marks outlined, as SVG in mm over an embedded picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.channels import Channel
from voxelscale.classes import IGNORED, LESION, Classes
from voxelscale.findings import components
from voxelscale.geometry import Scan, Triple, reorient
from voxelscale.pages.page import class_colour

LUNG_WINDOW = (-1350.0, 150.0)
"""HU from black to white: level -600, width 1500."""

WINDOW_NAME = "level -600 HU, width 1500 HU"
"""`LUNG_WINDOW` in words."""

OTHER_WINDOW = (1.0, 99.5)
"""Percentiles of an image that is no CT, from black to white."""

OTHER_WINDOW_NAME = "1st to 99.5th percentile of the values"
"""`OTHER_WINDOW` in words."""

SMALLEST_RING_MM = 6.0
"""Radius of the ring around a place: a ring as small as its finding would hide it."""

AXES = {"axial": 0, "coronal": 1, "sagittal": 2}
ZOOM_MM = 70.0


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice, top row first.

    Attributes:
        pixels: HU (rows, columns).
        truth, prediction: stored labels of the same shape.
        spacing: mm between rows, and between columns.
        ring: row, column (pixels, fractional) and radius (mm) of a place to be seen; None: there is none.
        classes: what the labels distinguish; several have a colour each.
        window: values from black to white.
    """

    pixels: NDArray[Any]
    truth: NDArray[Any]
    prediction: NDArray[Any]
    spacing: tuple[float, float]
    ring: tuple[float, float, float] | None = None
    classes: Classes = LESION
    window: tuple[float, float] = LUNG_WINDOW


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where to look.

    Attributes:
        centre: x, y, z, LPS mm.
        diameter_mm: of what is there.
    """

    centre: Triple
    diameter_mm: float


def overlay_views(
    image: Scan,
    truth: Scan,
    prediction: Scan,
    place: Place | None = None,
    classes: Classes = LESION,
    window: tuple[float, float] = LUNG_WINDOW,
) -> list[tuple[str, str]]:
    """Captions and SVGs of one case: a whole axial slice, and three close-ups around its centre.

    All three scans lie on one lattice. As a radiologist reads: axial from the feet, the patient's
    right on the left, the head on top.

    Args:
        truth, prediction: stored labels.
        place: the centre, with a ring around it; None: the slice with the most lesion.
        classes: what the labels distinguish.
        window: values from black to white.
    """
    image, truth, prediction = reorient(image), reorient(truth), reorient(prediction)
    if place is None:
        centre, exact = point_of_interest(truth.array > 0, prediction.array > 0), None
    else:
        exact = image.grid.mm_to_index([place.centre])[0]
        nearest = np.clip(np.rint(exact), 0, np.asarray(image.array.shape) - 1)
        z, y, x = (int(n) for n in nearest)
        centre = z, y, x
    radius = max(0.75 * place.diameter_mm, SMALLEST_RING_MM) if place else 0.0

    def cut_along(axis: int) -> Slice:
        cut = _cut(image, truth, prediction, axis, centre, exact, radius)
        return replace(cut, classes=classes, window=window)

    zoomed = []
    for name, axis in AXES.items():
        cut = cut_along(axis)
        rows, columns = (i for i in range(3) if i != axis)
        middle = (centre[rows], centre[columns])
        if axis:  # seen from the front or the side, the head is on top
            middle = (image.array.shape[0] - 1 - middle[0], middle[1])
        zoomed.append((name, draw_slice(_zoom(cut, middle), 10, f"{name}, close-up")))
    whole = cut_along(0)
    height = float(image.grid.index_to_mm(centre)[2])
    caption = f"axial, slice {centre[0] + 1} of {image.array.shape[0]} from the feet, z {height:.1f} mm"
    return [(caption, draw_slice(whole, 50, caption)), *zoomed]


def point_of_interest(truth: NDArray[Any], prediction: NDArray[Any]) -> tuple[int, int, int]:
    """The voxel (z, y, x) around which to look: amid the truth in the slice that has most of it.

    Where there is no truth, the prediction; where there is neither, the scan's middle.
    """
    mask = truth if truth.any() else prediction
    if not mask.any():
        z, y, x = (n // 2 for n in mask.shape)
        return z, y, x
    z = int(np.argmax(np.count_nonzero(mask, axis=(1, 2))))
    largest = max(components(mask[z : z + 1] > 0), key=len)
    _, y, x = largest[np.argmin(((largest - largest.mean(axis=0)) ** 2).sum(axis=1))]
    return z, int(y), int(x)


def draw_slice(cut: Slice, bar_mm: float, name: str = "a slice of the scan") -> str:
    """A slice as SVG: picture, outlines (classes ``truth``, ``prediction``, ``mark``) and a scale bar.

    Args:
        name: what it shows, for readers who do not see it.
    """
    height, width = (n * s for n, s in zip(cut.pixels.shape, cut.spacing, strict=True))
    outlines = "".join(_outlines(cut))
    if cut.ring is not None:
        row, column, radius = cut.ring
        x, y = (column + 0.5) * cut.spacing[1], (row + 0.5) * cut.spacing[0]
        outlines += f'<circle class="mark" cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}"/>'
    left, bottom = 0.04 * width, height - 0.04 * width
    bar = f'd="M{left:.2f} {bottom:.2f}h{bar_mm:g}"'
    return (
        f'<svg class="slice" viewBox="0 0 {width:.2f} {height:.2f}" role="img" aria-label="{escape(name)}">'
        f'<image width="{width:.2f}" height="{height:.2f}" preserveAspectRatio="none" '
        f'href="{_png(cut.pixels, cut.window)}"/>'
        # A dark line below the white one: it stays in sight on bright tissue.
        f'{outlines}<path class="bar back" {bar}/><path class="bar" {bar}/>'
        f'<text class="bar" x="{left:.2f}" y="{bottom - 0.02 * width:.2f}" '
        f'font-size="{0.045 * width:.2f}">{bar_mm:g} mm</text></svg>'
    )


def _cut(
    image: Scan,
    truth: Scan,
    prediction: Scan,
    axis: int,
    centre: Sequence[int],
    exact: NDArray[np.float64] | None,
    radius: float,
) -> Slice:
    row, column = (i for i in range(3) if i != axis)
    step = slice(None, None, -1 if axis else 1)
    pixels, true, found = (scan.array.take(centre[axis], axis)[step] for scan in (image, truth, prediction))
    ring = None
    if exact is not None:
        top = float(exact[row])
        ring = (len(pixels) - 1 - top if axis else top, float(exact[column]), radius)
    return Slice(pixels, true, found, (image.spacing[row], image.spacing[column]), ring)


def _zoom(cut: Slice, middle: tuple[int, int]) -> Slice:
    """`ZOOM_MM` around a pixel, less where the slice ends."""
    windows = []
    for centre, n, step in zip(middle, cut.pixels.shape, cut.spacing, strict=True):
        size = min(n, max(8, round(ZOOM_MM / step)))
        start = min(max(0, centre - size // 2), n - size)
        windows.append(slice(start, start + size))
    box = tuple(windows)
    ring = cut.ring
    if ring is not None:
        ring = (ring[0] - windows[0].start, ring[1] - windows[1].start, ring[2])
    return replace(
        cut, pixels=cut.pixels[box], truth=cut.truth[box], prediction=cut.prediction[box], ring=ring
    )


def window_of(image: NDArray[Any], channel: Channel) -> tuple[float, float]:
    """Values from black to white: `LUNG_WINDOW` of a CT, else `OTHER_WINDOW`."""
    if channel.scheme == "ct":
        return LUNG_WINDOW
    flat = image.reshape(-1)
    low, high = (float(v) for v in np.percentile(flat[:: -(-flat.size // 2**22)], OTHER_WINDOW))
    return (low, high) if high > low else (low, low + 1.0)


def window_name(channel: Channel) -> str:
    """What `window_of` gives, in words."""
    return WINDOW_NAME if channel.scheme == "ct" else OTHER_WINDOW_NAME


def _outlines(cut: Slice) -> Iterator[str]:
    """Paths around every class, in its colour where there are several, and around what is ignored."""
    classes = cut.classes
    for kind, stored in (("truth", cut.truth), ("prediction", cut.prediction)):
        if classes.single:
            if np.any(stored > 0):
                yield f'<path class="{kind}" d="{_outline(stored > 0, cut.spacing)}"/>'
            continue
        values = np.unique(stored[stored > 0])
        for at, name in enumerate(classes.names):
            if classes.where(values, at).any():
                line = _outline(classes.where(stored, at), cut.spacing)
                style, title = f"stroke:{class_colour(at)}", escape(f"{name}, {kind}")
                yield f'<path class="{kind}" style="{style}" d="{line}"><title>{title}</title></path>'
    if classes.ignore and np.any(cut.truth == IGNORED):
        line = _outline(cut.truth == IGNORED, cut.spacing)
        style = "stroke:#b0b0b0;stroke-dasharray:1 3"
        yield f'<path class="truth" style="{style}" d="{line}"><title>ignored</title></path>'


def _outline(mask: NDArray[Any], spacing: tuple[float, float]) -> str:
    """The border of a mask as an SVG path in mm, along pixel edges halfway to the next centre."""
    from contourpy import contour_generator

    padded = np.pad((mask > 0).astype(np.float32), 1)
    path = ""
    for line in contour_generator(z=padded).lines(0.5):
        # A padded pixel's centre lies half a pixel before the picture's edge.
        points = (np.asarray(line) - 0.5) * np.asarray(spacing[::-1])
        path += "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return path


def _png(pixels: NDArray[Any], window: tuple[float, float]) -> str:
    from PIL import Image

    low, high = window
    grey = np.clip((pixels.astype(np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
