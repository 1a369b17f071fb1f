"""How ranks of several machines find each other, in a stated time and with one clear error.

PyTorch's own start waits half an hour without a word, deaf to Ctrl-C, and Gloo then talks through the
interface of the machine's name, which on many machines is the loopback.
"""

from __future__ import annotations

import fcntl
import functools
import os
import socket
import struct
import time
from datetime import timedelta
from typing import Any

from voxelscale.console import count, notice
from voxelscale.errors import VoxelscaleError

WAIT = "VOXELSCALE_WAIT"
"""Environment variable: seconds that ranks and machines wait for each other; `LONGEST` without it."""

LONGEST = 300.0
QUIET = 5.0
"""Seconds before a wait is reported."""

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface (netdevice(7))."""

HINT = "start it on every machine, and see that a firewall lets them reach this name and port"


def longest_wait() -> float:
    """Seconds that ranks and machines wait for each other."""
    return float(os.environ.get(WAIT) or LONGEST)


@functools.cache
def meet(address: str, port: int, rank: int, ranks: int) -> Any:
    """The store of all ranks, at rank 0, once all of them have come to it.

    Gloo then uses the interface through which the others are reached, where none is set.

    Raises:
        VoxelscaleError: rank 0 cannot be reached, or others did not come, in `longest_wait` seconds.
        torch.distributed.DistError: a rank was lost meanwhile, under torchrun's engine.
    """
    import torch.distributed as dist

    where, until = f"{address}:{port}", time.monotonic() + longest_wait()
    patient = timedelta(seconds=longest_wait())
    own = "" if rank == 0 else reach(address, port, quiet=os.environ.get("LOCAL_RANK", "0") != "0")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=rank == 0, timeout=patient, wait_for_workers=False
        )
        store.set(f"address {rank}", own)
        come = store.add("come", 1)
        report_at = time.monotonic() + QUIET
        while come < ranks:
            if time.monotonic() > until:
                problem = f"{come} of {ranks} ranks came to {where} within {longest_wait():.0f} s"
                raise VoxelscaleError(problem, HINT)
            if rank == 0 and time.monotonic() > report_at:
                report_at = until + 1
                notice(
                    f"waiting at {where} for {count(ranks - come, 'rank')}, at most {longest_wait():.0f} s"
                )
            time.sleep(0.05)
            come = store.add("come", 0)
        if os.environ.get("LOCAL_WORLD_SIZE") != str(ranks):
            _choose_interface([store.get(f"address {other}").decode() for other in range(ranks)], rank)
    except dist.DistError as error:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise  # a rank was lost meanwhile, and all are started again
        problem = f"rank {rank}: the meeting at {where} failed ({str(error).splitlines()[0]})"
        raise VoxelscaleError(problem, "try again, or set another MASTER_PORT") from None
    return store


def reach(host: str, port: int, quiet: bool = False) -> str:
    """This machine's address on the way to another, once that answers; interruptible, unlike PyTorch's.

    Args:
        quiet: whether not to tell of a long wait.

    Raises:
        VoxelscaleError: it did not answer in `longest_wait` seconds.
    """
    began = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=2) as way:
                return str(way.getsockname()[0])
        except OSError as error:
            why = error.strerror or error
        if (waited := time.monotonic() - began) > longest_wait():
            raise VoxelscaleError(
                f"{host}:{port} was not reached within {longest_wait():.0f} s ({why})", HINT
            )
        if waited > QUIET and not quiet:
            quiet = True
            notice(f"waiting for {host}:{port} ({why}), at most {longest_wait():.0f} s")
        time.sleep(0.2)


def _choose_interface(addresses: list[str], rank: int) -> None:
    """Tell Gloo the interface on the way to the others: rank 0's machine knows its own as the loopback."""
    far = [address for address in addresses if address and not address.startswith("127.")]
    if not far or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = addresses[rank] if addresses[rank] in far else source_towards(far[0])
    if name := interface_of(own):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def source_towards(address: str) -> str:
    """This machine's own address on the way to another; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((address, 9))
        return str(way.getsockname()[0])


def interface_of(address: str) -> str:
    """The name of the interface that has this IPv4 address; empty where none is known to."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            try:
                asked = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(asking, _SIOCGIFADDR, asked)[20:24]
            except OSError:
                continue
        if socket.inet_ntoa(found) == address:
            return name
    return ""


def is_here(host: str) -> bool:
    """Whether an address or a name is this machine's own, even by another of its names."""
    try:
        places = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, place in places:
        with socket.socket(family, kind, protocol) as trial:
            try:
                trial.bind(place)
            except OSError:
                continue
            return True
    return False
