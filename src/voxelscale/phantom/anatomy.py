"""Body, lungs, heart, great vessels and bones, as surfaces in mm.

Sizes are an adult's (ICRP Publication 89, 2002; organ shapes are much simplified), scaled with the
volume. LPS: x to the patient's left, y to the back, z to the head; the origin is in the body's
middle at the height of the volume's middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from voxelscale.phantom.canvas import Canvas, Field, Point

RIB_PITCH_MM = 25.0
VERTEBRA_MM = 26.0


@dataclass(frozen=True, kw_only=True)
class Chest:
    """One patient's measures, mm.

    Attributes:
        height: of the volume.
        body: half-axes x, y of the body's outline.
        fat: thickness under the skin.
        cage: half-axes x, y of the lungs' outline at its widest.
        spine: y of the vertebral bodies' centre.
        heart: its centre (x, y, z).
        heart_size: its half-axes.
        dome: z of the lungs' lowest rim, and the diaphragm's rise left and right.
        phase: shift of ribs and vertebrae along z.
        blood: HU in the heart and the vessels; above 60 with contrast medium.
        lung: HU of the lungs' tissue.
    """

    height: float
    body: tuple[float, float]
    fat: float
    cage: tuple[float, float]
    spine: float
    heart: Point
    heart_size: Point
    dome: tuple[float, float, float]
    phase: float
    blood: float
    lung: float

    @property
    def carina(self) -> Point:
        """Where the trachea divides."""
        return np.array([0.0, 0.12 * self.cage[1], 0.14 * self.height])


def draw_chest(random: np.random.Generator, size_mm: tuple[float, float, float]) -> Chest:
    """One patient for a volume of (z, y, x) mm."""
    height, depth, width = size_mm
    fat = random.uniform(6, 20)
    body = (0.47 * width * random.uniform(0.9, 1.0), 0.44 * depth * random.uniform(0.88, 1.0))
    cage = (body[0] - fat - 22, body[1] - fat - 14)
    contrast = random.random() < 0.4
    return Chest(
        height=height,
        body=body,
        fat=fat,
        cage=cage,
        spine=0.70 * cage[1],
        heart=np.array([0.17 * cage[0], -0.30 * cage[1], -0.17 * height]),
        heart_size=np.array([0.40 * cage[0], 0.47 * cage[1], 0.19 * height])
        * random.uniform(0.88, 1.08, 3),
        dome=(-0.46 * height, random.uniform(0.10, 0.18) * height, random.uniform(0.16, 0.24) * height),
        phase=random.uniform(0, RIB_PITCH_MM),
        blood=random.uniform(110, 220) if contrast else random.uniform(38, 50),
        lung=random.uniform(-890, -810),
    )


def body_depth(chest: Chest, canvas: Canvas) -> Field:
    """Distance inward from the skin."""
    taper = 1 - 0.16 * _smoothstep(0.30 * chest.height, 0.52 * chest.height, canvas.z)
    a, b = (np.float32(v) for v in chest.body)
    radius = (np.abs(canvas.x / a) ** 2.5 + np.abs(canvas.y / b) ** 2.5) ** np.float32(0.4)
    return np.asarray((taper - radius) * min(a, b), np.float32)


def cage_depth(chest: Chest, canvas: Canvas) -> Field:
    """Distance inward from the lungs' outer outline, as if they filled the whole thorax."""
    a, b = (np.float32(v) for v in chest.cage)
    height = np.float32(0.47 * chest.height)
    above = np.clip((canvas.z + 0.12 * chest.height) / (height + 0.12 * chest.height), 0, None)
    narrow = np.sqrt(np.clip(1 - above**2.6, 0, None)) - 1e3 * (above > 1)
    # Flat at the back and bulging at the sides, as a thorax is.
    radius = (np.abs(canvas.x / a) ** 2.2 + np.abs(canvas.y / b) ** 2.2) ** np.float32(1 / 2.2)
    return np.asarray((narrow - radius) * min(a, b), np.float32)


def lung_depth(chest: Chest, canvas: Canvas, cage: Field) -> Field:
    """Distance inward from the lungs' surface: outline less mediastinum, heart, spine, diaphragm."""
    x, y, z = canvas.x, canvas.y, canvas.z
    a, b = chest.cage
    waist = 0.14 * a + 0.10 * a * np.exp(-(((y - 0.05 * b) / (0.30 * b)) ** 2)) + 0.02 * np.abs(z)
    depth = np.minimum(cage, np.abs(x) - waist)
    depth = np.minimum(depth, -_ellipsoid(canvas, chest.heart, chest.heart_size + 3))
    spine = np.sqrt((x / 1.25) ** 2 + (y - chest.spine - 8) ** 2) - 24
    depth = np.minimum(depth, spine)
    rim, left, right = chest.dome
    for side, rise in ((1, left), (-1, right)):
        hill = np.exp(-(((x - side * 0.48 * a) / (0.55 * a)) ** 2) - ((y + 0.15 * b) / (0.75 * b)) ** 2)
        # A slope makes the vertical distance longer than the nearest one.
        depth = np.where(side * x > 0, np.minimum(depth, 0.8 * (z - rim - rise * hill)), depth)
    return np.asarray(depth, np.float32)


def paint_soft_tissue(chest: Chest, canvas: Canvas, body: Field, cage: Field, texture: Field) -> None:
    """Skin, fat, muscle; fatty mediastinum, heart, blood; the organs below the diaphragm."""
    canvas.paint(canvas.share(body), 40)
    front = chest.fat * (1 + 0.5 * (canvas.y < 0))
    under_skin = np.minimum(body - 2, front - body)
    canvas.paint(canvas.share(under_skin), -105 + 6 * texture)
    muscle = np.minimum(body - front, -cage)
    canvas.paint(canvas.share(muscle), 52 + 9 * texture)
    canvas.paint(canvas.share(np.minimum(muscle, 3 - np.abs(cage + 12))), -95)
    canvas.paint(canvas.share(cage), np.where(texture > 0.3, 35, -75).astype(np.float32))
    below = np.minimum(cage, chest.dome[0] + 0.9 * chest.dome[1] - canvas.z)
    canvas.paint(canvas.share(below), 55 + 10 * texture)
    canvas.paint(canvas.share(_ellipsoid(canvas, chest.heart, chest.heart_size)), 45 + 6 * texture)
    inner = _ellipsoid(canvas, chest.heart, chest.heart_size * 0.7)
    canvas.paint(canvas.share(inner), chest.blood)
    canvas.paint(canvas.tubes(_great_vessels(chest)), chest.blood)


def paint_bones(chest: Chest, canvas: Canvas, cage: Field, body: Field) -> None:
    """Ribs with their cartilage, vertebrae with discs and canal, sternum."""
    _paint_ribs(chest, canvas, cage, body)
    _paint_spine(chest, canvas, body)
    _paint_sternum(chest, canvas)


def _paint_ribs(chest: Chest, canvas: Canvas, cage: Field, body: Field) -> None:
    """Slanting bands around the cage: a shell of bone, marrow within it, cartilage in front."""
    x, y, z = canvas.x, canvas.y, canvas.z
    b = chest.cage[1]
    along = z - 0.5 * y + 0.0006 * x**2 + np.float32(chest.phase)
    off_axis = np.abs((along % RIB_PITCH_MM) - RIB_PITCH_MM / 2)
    rib = 4.2 - np.sqrt((cage + 6.5) ** 2 + (0.62 * off_axis) ** 2)
    rib = np.minimum(rib, np.minimum(body - 6, y + 0.93 * b))
    cartilage = (y < -0.62 * b) & (np.abs(x) < 0.6 * chest.cage[0])
    canvas.paint(canvas.share(rib), np.where(cartilage, 110, 620).astype(np.float32))
    canvas.paint(canvas.share(rib - 1.6) * ~cartilage, 260)


def _paint_spine(chest: Chest, canvas: Canvas, body: Field) -> None:
    """Discs between vertebral bodies, whose shell is denser than their inside; the canal; processes."""
    x, y, z = canvas.x, canvas.y, canvas.z
    height = (z + np.float32(chest.phase)) % VERTEBRA_MM
    across = np.sqrt((x / 1.2) ** 2 + (y - chest.spine - 2) ** 2)
    waist = 15.5 + 1.5 * (np.abs(height - VERTEBRA_MM / 2) / (VERTEBRA_MM / 2)) ** 2
    bone = np.minimum(waist - across, np.minimum(height - 2.5, VERTEBRA_MM - 2.5 - height))
    canvas.paint(canvas.share(np.asarray(waist - across, np.float32)), 85)
    canvas.paint(canvas.share(np.asarray(bone, np.float32)), 480)
    canvas.paint(canvas.share(np.asarray(bone - 1.8, np.float32)), 170)
    ring = np.sqrt(x**2 + (y - chest.spine - 25) ** 2)
    canvas.paint(canvas.share(np.asarray(12.5 - ring + 0 * z, np.float32)), 520)
    canvas.paint(canvas.share(np.asarray(9 - ring + 0 * z, np.float32)), 30)
    processes = np.minimum(canvas.tubes(_processes(chest)), canvas.share(body - chest.fat))
    canvas.paint(processes, 420)


def _paint_sternum(chest: Chest, canvas: Canvas) -> None:
    """A plate in front, denser at its surface."""
    x, y, z = canvas.x, canvas.y, canvas.z
    plate = np.minimum(6 - np.abs(y + chest.cage[1] + 7), 17 - np.abs(x))
    sternum = np.minimum(plate, np.minimum(0.33 * chest.height - z, z + 0.22 * chest.height))
    canvas.paint(canvas.share(sternum), 420)
    canvas.paint(canvas.share(sternum - 2), 160)


def paint_table(canvas: Canvas, chest: Chest) -> None:
    """The scanner's curved couch under the back."""
    arc = canvas.y - np.float32(chest.body[1] + 8) + np.float32(0.0006) * canvas.x**2 + 0 * canvas.z
    canvas.paint(canvas.share(np.asarray(1.2 - np.abs(arc), np.float32)), -300)
    canvas.paint(canvas.share(np.asarray(6 - np.abs(arc - 8), np.float32)), -930)


def airways(chest: Chest, hila: dict[int, Point]) -> list[tuple[Point, Point, float, float]]:
    """Trachea and main bronchi, as tubes of their lumen's radius."""
    top = np.array([0.0, chest.carina[1] - 12, 0.55 * chest.height])
    tubes = [(top, chest.carina, 8.5, 8.0)]
    tubes += [(chest.carina, hilum, 6.5, 4.8) for hilum in hila.values()]
    return tubes


def hila(chest: Chest) -> dict[int, Point]:
    """Where vessels and bronchus enter a lung; by side, +1 left, -1 right."""
    a, b = chest.cage
    return {side: np.array([side * 0.27 * a, 0.10 * b, 0.05 * chest.height]) for side in (1, -1)}


def _great_vessels(chest: Chest) -> list[tuple[Point, Point, float, float]]:
    """Aorta: up from the heart, over the arch, down along the spine; vena cava; pulmonary trunk."""
    b, h = chest.cage[1], chest.height
    arch = np.linspace(0, np.pi, 9)
    front, back = np.array([-8.0, -0.15 * b]), np.array([20.0, chest.spine - 26])
    middle, half = (front + back) / 2, (back - front) / 2
    over = [np.array([*(middle - np.cos(t) * half), 0.20 * h + 0.08 * h * np.sin(t)]) for t in arch]
    points = [np.array([*front, -0.05 * h]), *over, np.array([*back, -0.6 * h])]
    aorta = [(p, q, 13.5, 12.5) for p, q in pairwise(points)]
    cava_top, cava_low = np.array([-24, -0.12 * b, 0.5 * h]), np.array([-24, -0.12 * b, -0.05 * h])
    trunk = np.array([8, -0.25 * b, 0.02 * h])
    pulmonary = [(trunk, hilum, 12.0, 8.0) for hilum in hila(chest).values()]
    return [*aorta, (cava_top, cava_low, 9.0, 10.0), *pulmonary]


def _processes(chest: Chest) -> list[tuple[Point, Point, float, float]]:
    """Spinous and transverse processes of every vertebra."""
    tubes = []
    first = -0.5 * chest.height - (chest.phase % VERTEBRA_MM)
    for level in np.arange(first, 0.55 * chest.height, VERTEBRA_MM):
        z = level + VERTEBRA_MM / 2
        root = np.array([0.0, chest.spine + 36, z])
        tubes.append((root, root + np.array([0, 18, -9]), 3.5, 3.0))
        for side in (-1, 1):
            start = np.array([side * 11.0, chest.spine + 24, z])
            tubes.append((start, start + np.array([side * 22, 8, 2]), 4.5, 3.5))
    return tubes


def _ellipsoid(canvas: Canvas, centre: Point, half: Point) -> Field:
    """Distance inward from an ellipsoid's surface, near enough around it."""
    (cx, cy, cz), (a, b, c) = centre, half
    radius = np.sqrt(((canvas.x - cx) / a) ** 2 + ((canvas.y - cy) / b) ** 2 + ((canvas.z - cz) / c) ** 2)
    return np.asarray((1 - radius) * min(half), np.float32)


def _smoothstep(low: float, high: float, value: Field) -> Field:
    t = np.clip((value - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)
