"""Several machines that train together: each runs the same command, and they meet at one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from voxelscale.console import count, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.ranks.meeting import HINT, is_here, longest_wait, reach


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a training.

    Attributes:
        count: how many they are.
        host, port: where they meet; the host is one of them.
    """

    count: int = 1
    host: str = "localhost"
    port: int = 0

    @property
    def meeting(self) -> str:
        """The host and its port."""
        return f"{self.host}:{self.port}"

    @staticmethod
    def of(number: int, meeting: str) -> Nodes:
        """So many machines that meet at ``HOST:PORT``.

        Raises:
            VoxelscaleError: it is no such place.
        """
        host, _, port = meeting.rpartition(":")
        if number < 1 or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            hint = "name one of the machines and a free port of it: --nodes 2 --meet node1:29500"
            raise VoxelscaleError(f"--nodes {number} --meet {meeting or '(missing)'}: not possible", hint)
        return Nodes(count=number, host=host, port=int(port))


ALONE = Nodes()
"""This machine alone."""


def launch_with_others(nodes: Nodes, options: dict[str, Any], command: Sequence[str]) -> None:
    """torchrun's engine on this machine, as one of several; started again where the host was lost.

    Args:
        options: of its `LaunchConfig`.

    Raises:
        VoxelscaleError: the machines did not meet in `longest_wait` seconds, or the others have ended.
    """
    from torch.distributed.elastic.rendezvous.api import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Else restarted ranks find the addresses of those that are gone: each agent counts restarts by itself.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    here, wait = is_here(nodes.host), round(longest_wait())
    others = count(nodes.count - 1, "other machine")
    for _ in range(options["max_restarts"] + 1):
        notice(f"waiting for {others} at {nodes.meeting}, at most {wait} s")
        address = nodes.host if here else reach(nodes.host, nodes.port, quiet=True)
        waits = {"is_host": here, "join_timeout": wait, "read_timeout": wait}
        config = LaunchConfig(**options, local_addr=address, rdzv_configs=waits)
        try:
            elastic_launch(config, sys.executable)(*command)
            return
        except RendezvousTimeoutError:
            problem = f"not all of {nodes.count} machines came to {nodes.meeting} within {wait} s"
            raise VoxelscaleError(problem, HINT) from None
        except RendezvousClosedError:
            problem = "the training on the other machines has ended"
            hint = "see what they say; to resume, start it on all of them"
            raise VoxelscaleError(problem, hint) from None
        except RendezvousConnectionError:
            if here:
                problem = f"{nodes.meeting} cannot be used: another program may have that port"
                raise VoxelscaleError(problem, "choose another port, the same on all machines") from None
            notice(f"{nodes.meeting} was lost")
    raise VoxelscaleError(f"{nodes.meeting} was lost", "the same command on all machines resumes")
