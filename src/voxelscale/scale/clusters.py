"""Clusters as people have them, by name: devices of a node, the links and the adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace

from voxelscale.config import ScaleConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.suggest import nearest


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A kind of cluster.

    Attributes:
        name: as ``scale.cluster``.
        devices: workers of a node.
        within, between: links, as names or figures (`voxelscale.scale.links.parse_link`).
        rails: adapters of a node.
        title: for people.
        source: where that is from, and what of it is assumed.
    """

    name: str
    devices: int
    within: str
    between: str
    rails: int = 1
    title: str
    source: str


_REEDBUSH = (
    "P100s a node: Sakai et al. (University of Tokyo), on operating the Reedbush system, "
    "fdokument.com/document/reedbush-.html. Assumed: one InfiniBand EDR adapter a node, and NVLink with "
    "two links between neighbours"
)

_KNOWN = (
    Cluster(
        name="reedbush-h",
        devices=2,
        within="nvlink-p100",
        between="infiniband-edr",
        title="Reedbush-H (2 NVIDIA P100 a node)",
        source=_REEDBUSH,
    ),
    Cluster(
        name="reedbush-l",
        devices=4,
        within="nvlink-p100",
        between="infiniband-edr",
        title="Reedbush-L (4 NVIDIA P100 a node)",
        source=_REEDBUSH,
    ),
    Cluster(
        name="dgx-a100",
        devices=8,
        within="nvlink-a100",
        between="infiniband-hdr",
        rails=8,
        title="NVIDIA DGX A100 (8 GPUs a node)",
        source="8 GPUs behind NVSwitch and 8 single-port 200 Gb/s adapters for the cluster: NVIDIA, "
        "'Defining AI Innovation with NVIDIA DGX A100', developer.nvidia.com/blog, 2020",
    ),
    Cluster(
        name="dgx-h100",
        devices=8,
        within="nvlink-h100",
        between="infiniband-ndr",
        rails=8,
        title="NVIDIA DGX H100 (8 GPUs a node)",
        source="8 GPUs, 4 NVSwitches, 8 single-port ConnectX-7 of up to 400 Gb/s: docs.nvidia.com, DGX "
        "BasePOD reference architecture, core components",
    ),
    Cluster(
        name="ethernet",
        devices=4,
        within="pcie-gen3",
        between="ethernet-10g",
        title="servers with 4 GPUs on PCI Express, 10 Gb/s Ethernet",
        source="assumed, as such servers have no standard",
    ),
    Cluster(
        name="laptop",
        devices=8,
        within="gloo-memory",
        between="ethernet-1g",
        title="a laptop with 8 cores, each a worker",
        source="assumed; more than 8 workers are several laptops on 1 Gb/s Ethernet",
    ),
)

CLUSTERS = {cluster.name: cluster for cluster in _KNOWN}
"""By name; each one's `source` says what is assumed."""

_PLAIN = Cluster(
    name="",
    devices=1,
    within="nvlink-a100",
    between="infiniband-edr",
    title="one device a node",
    source="no cluster is named (scale.cluster)",
)


def cluster_of(scale: ScaleConfig) -> Cluster:
    """The cluster of ``scale.cluster``, with the keys that are given beside it.

    Raises:
        VoxelscaleError: there is none of that name.
    """
    name = scale.cluster.lower()
    if name and name not in CLUSTERS:
        near = nearest(name, CLUSTERS)
        known = "known: " + ", ".join(CLUSTERS)
        raise VoxelscaleError(
            f"config: scale.cluster is {scale.cluster}", f"did you mean {near}? {known}" if near else known
        )
    base = CLUSTERS.get(name, _PLAIN)
    return replace(
        base,
        devices=base.devices if scale.node_devices is None else scale.node_devices,
        within=scale.node_link or base.within,
        between=scale.interconnect or base.between,
        rails=base.rails if scale.rails is None else scale.rails,
    )
