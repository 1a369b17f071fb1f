"""What connects workers: a message of n bytes takes alpha + n / beta seconds (Hockney 1994).

Presets by name, a person's own figures as text, and the fit of measured all-reduces.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.errors import VoxelscaleError


@dataclass(frozen=True, kw_only=True)
class Link:
    """One device's way to the others.

    Attributes:
        name: for tables.
        alpha_seconds: of a step of a ring, however small the message.
        tree_alpha_seconds: of a step of a tree; None: as of a ring.
        beta_bytes_per_second: in one direction, as NCCL's or Gloo's rings reach it, not the wire's rate.
        source: where the two figures come from, and which of them is assumed.
        residual: of a measured link, the root mean square of (fitted - measured) / measured.
    """

    name: str
    alpha_seconds: float
    beta_bytes_per_second: float
    source: str
    residual: float = 0.0
    tree_alpha_seconds: float | None = None

    @property
    def tree_alpha(self) -> float:
        """Seconds of a step of a tree."""
        return self.alpha_seconds if self.tree_alpha_seconds is None else self.tree_alpha_seconds


_NCCL_NET = (
    "alpha: 4.0 us a step between nodes, NCCL src/graph/tuning.cc (commit 01afd20, 2020), hwLat, network, "
    "ring, LL128 (2.7 us for LL, 9.6 us for Simple); of a tree 8.5 us, LL128, in later versions of it "
    "(5.0 us for LL, 14 to 28 us for Simple); the 10 us of launching a collective are left out"
)
_NCCL_NVLINK = (
    "alpha: 1.9 us a step, NCCL src/graph/tuning.cc (commit 01afd20, 2020), hwLat, NVLink, ring, LL128 "
    "(0.47 us for LL, 3.4 us for Simple); of a tree 1.25 us, LL128, in later versions"
)
_NCCL_PCIE = "alpha: 2.5 us a step of a ring, 1.9 us of a tree, NCCL src/graph/tuning.cc, hwLat, PCI, LL128"
_TCP = (
    "beta: IEEE 802.3 line rate x 1448 / 1538, the payload of a 1500-byte frame with TCP timestamps "
    "(computed; it assumes enough sockets to fill the wire). alpha: 20 us between applications, measured "
    "on 10 GbE by Hurwitz and Feng, 'Initial end-to-end performance evaluation of 10-Gigabit Ethernet', "
    "Hot Interconnects 2003"
)
_TCP_ASSUMED = f"{_TCP}; assumed alike at this rate, as the host's TCP stack takes most of it"

_PRESETS = (
    Link(
        name="infiniband-edr",
        alpha_seconds=4.0e-6,
        tree_alpha_seconds=8.5e-6,
        beta_bytes_per_second=12.2e9,
        source="beta: 12.2 GB/s of bus bandwidth over one 100 Gb/s adapter, 'as good as you can get' "
        "(S. Jeaugey, github.com/NVIDIA/nccl-tests/issues/29, 2019); nominal 12.5 GB/s (4 lanes of "
        f"25.78125 Gb/s less 64b/66b, InfiniBand Architecture Specification). {_NCCL_NET}",
    ),
    Link(
        name="infiniband-hdr",
        alpha_seconds=4.0e-6,
        tree_alpha_seconds=8.5e-6,
        beta_bytes_per_second=24e9,
        source="beta: 24 GB/s an adapter: 96 GB/s over 4 (github.com/NVIDIA/nccl-tests/issues/119), "
        "48 GB/s over 2 (S. Jeaugey, github.com/NVIDIA/nccl/issues/307, 2020); nominal 25 GB/s "
        f"(200 Gb/s). {_NCCL_NET}",
    ),
    Link(
        name="infiniband-ndr",
        alpha_seconds=4.0e-6,
        tree_alpha_seconds=8.5e-6,
        beta_bytes_per_second=47e9,
        source="beta: 46 to 48 GB/s an adapter (NVIDIA, github.com/NVIDIA/nccl-tests/issues/290, 2025); "
        f"nominal 50 GB/s (400 Gb/s). {_NCCL_NET}; assumed unchanged since",
    ),
    Link(
        name="nvlink-a100",
        alpha_seconds=1.9e-6,
        tree_alpha_seconds=1.25e-6,
        beta_bytes_per_second=235e9,
        source="beta: NCCL's own bound on an A100's bus bandwidth, 235 GB/s (src/graph/tuning.cc, same "
        "commit); nominal 300 GB/s a direction (NVIDIA A100 data sheet: 12 links, 600 GB/s in both). "
        f"{_NCCL_NVLINK}",
    ),
    Link(
        name="nvlink-h100",
        alpha_seconds=1.9e-6,
        tree_alpha_seconds=1.25e-6,
        beta_bytes_per_second=370e9,
        source="beta: 370 GB/s of a ring (S. Jeaugey, github.com/NVIDIA/nccl-tests/issues/212, 2024), "
        "without NVLink SHARP; nominal 450 GB/s a direction (NVIDIA H100 data sheet: 900 GB/s in both). "
        f"{_NCCL_NVLINK}; assumed unchanged since",
    ),
    Link(
        name="nvlink-p100",
        alpha_seconds=1.9e-6,
        tree_alpha_seconds=1.25e-6,
        beta_bytes_per_second=36e9,
        source="beta: 18 GB/s a link in NCCL src/graph/topo.h (SM60_NVLINK_BW), times 2 links between "
        "neighbours, which is assumed; nominal 20 GB/s a link and direction (NVIDIA P100 white paper). "
        f"{_NCCL_NVLINK}; assumed alike for NVLink 1",
    ),
    Link(
        name="pcie-gen3",
        alpha_seconds=2.5e-6,
        tree_alpha_seconds=1.9e-6,
        beta_bytes_per_second=12e9,
        source="beta: 12 GB/s, NCCL src/graph/topo.h (PCI_BW, generation 3, 16 lanes); nominal 15.75 GB/s "
        f"(16 lanes of 8 GT/s, 128b/130b). {_NCCL_PCIE}",
    ),
    Link(
        name="gloo-memory",
        alpha_seconds=80e-6,
        beta_bytes_per_second=1.8e9,
        source="alpha and beta: fitted to all-reduces of two Gloo processes of one thread on a virtual "
        "machine with two cores of an AMD EPYC, residual 22 to 24 %; assumed alike elsewhere",
    ),
    Link(
        name="ethernet-1g",
        alpha_seconds=20e-6,
        beta_bytes_per_second=125e6 * 1448 / 1538,
        source=_TCP_ASSUMED,
    ),
    Link(name="ethernet-10g", alpha_seconds=20e-6, beta_bytes_per_second=1.25e9 * 1448 / 1538, source=_TCP),
    Link(
        name="ethernet-25g",
        alpha_seconds=20e-6,
        beta_bytes_per_second=3.125e9 * 1448 / 1538,
        source=_TCP_ASSUMED,
    ),
    Link(
        name="ethernet-100g",
        alpha_seconds=20e-6,
        beta_bytes_per_second=12.5e9 * 1448 / 1538,
        source=_TCP_ASSUMED,
    ),
)

LINKS = {link.name: link for link in _PRESETS}
"""By name; each one's `source` says what is nominal, measured and assumed."""

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES = {
    **{f"{prefix}B/s": 10.0**power for prefix, power in (("", 0), ("k", 3), ("M", 6), ("G", 9))},
    **{f"{prefix}b/s": 10.0**power / 8 for prefix, power in (("k", 3), ("M", 6), ("G", 9))},
    **{f"{prefix}iB/s": 2.0**power for prefix, power in (("K", 10), ("M", 20), ("G", 30))},
}
_HINT = "write alpha=5us,beta=12GB/s, or a name: " + ", ".join(LINKS)


def parse_link(text: str) -> Link:
    """A preset by its name, or figures: ``alpha=5us,beta=12GB/s``, optionally with ``tree=9us``.

    alpha, and a tree's own where it differs, in ns, us, ms or s; beta in B/s, kB/s, MB/s, GB/s, in bits
    (Gb/s) or in powers of two (GiB/s).

    Raises:
        VoxelscaleError: neither; it names the part that is wrong.
    """
    text = text.strip()
    if "=" not in text:
        if text.lower() in LINKS:
            return LINKS[text.lower()]
        near = difflib.get_close_matches(text.lower(), LINKS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? Else {_HINT}" if near else _HINT
        raise VoxelscaleError(f"--interconnect {text}: unknown", hint)
    given: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        units = {"alpha": _SECONDS, "beta": _RATES, "tree": _SECONDS}.get(key)
        if units is None:
            raise VoxelscaleError(f"--interconnect {text}: unknown part {part.strip()!r}", _HINT)
        if key in given:
            raise VoxelscaleError(f"--interconnect {text}: {key} is given twice", _HINT)
        given[key] = _quantity(value, units, f"--interconnect {text}: {key}")
    missing = {"alpha", "beta"} - set(given)
    if missing:
        raise VoxelscaleError(f"--interconnect {text}: {missing.pop()} is missing", _HINT)
    if given["beta"] == 0:
        raise VoxelscaleError(f"--interconnect {text}: beta is 0", "give a rate above 0")
    return Link(
        name=text,
        alpha_seconds=given["alpha"],
        tree_alpha_seconds=given.get("tree"),
        beta_bytes_per_second=given["beta"],
        source="given by the user",
    )


def _quantity(text: str, units: dict[str, float], what: str) -> float:
    known = ", ".join(units)
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(\S*)", text)
    if not found:
        raise VoxelscaleError(f"{what}={text} is not a number with a unit", f"units: {known}")
    number, unit = found.groups()
    if unit not in units:
        problem = f"has no unit {unit!r}" if unit else "needs a unit"
        raise VoxelscaleError(f"{what}={text} {problem}", f"units: {known}")
    if not math.isfinite(float(number)):
        raise VoxelscaleError(f"{what}={text} is not finite", f"units: {known}")
    return float(number) * units[unit]


def fit_link(name: str, workers: int, sizes: Sequence[int], seconds: Sequence[float], source: str) -> Link:
    """The link whose ring all-reduces come closest to measured ones, relative to each.

    Least squares of ((2(N-1) alpha + 2(N-1)/N n/beta - t) / t)^2 over all (n, t), so that four bytes
    count as much as 64 MB; alpha and 1/beta are not below 0.

    Args:
        workers: N, 2 or more.
        sizes: bytes of each message; not all alike.
        seconds: of each all-reduce, above 0.

    Raises:
        VoxelscaleError: the times do not grow with the sizes.
    """
    import numpy as np
    from scipy.optimize import nnls

    steps, t = 2 * (workers - 1), np.asarray(seconds)
    rows = np.stack([steps / t, steps / workers * np.asarray(sizes) / t], axis=1)
    scale = rows.max(axis=0)
    (alpha, inverse), distance = nnls(rows / scale, np.ones(len(t)))
    alpha, inverse = alpha / scale[0], inverse / scale[1]
    if inverse <= 0 or len(set(sizes)) == 1:
        raise VoxelscaleError(
            f"{name}: measured all-reduces take no longer for more bytes",
            "measure again on a quieter machine",
        )
    return Link(
        name=name,
        alpha_seconds=float(alpha),
        beta_bytes_per_second=float(1 / inverse),
        source=source,
        residual=float(distance / math.sqrt(len(t))),
    )
