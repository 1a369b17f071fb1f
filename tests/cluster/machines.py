"""Machines of the tests: network namespaces on a bridge, each with a name and an address of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class Machines:
    """Machines ``node1``, ``node2``, ... that reach each other by these names and share all files."""

    def __init__(self, folder: Path, number: int) -> None:
        self.names = [f"node{k + 1}" for k in range(number)]
        self._tag = f"vx{os.getpid() % 100_000}"
        self._subnet = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
        self._hosts = folder / "hosts"

    def address(self, name: str) -> str:
        last = 254 if name == "control" else self.names.index(name) + 1
        return f"{self._subnet}.{last}"

    def __enter__(self) -> Machines:
        control = self.address("control")
        lines = [f"{self.address(name)} {name}" for name in self.names]
        lines = ["127.0.0.1 localhost", *lines, f"{control} control"]
        self._hosts.write_text("\n".join(lines) + "\n")
        ip("link", "add", self._tag, "type", "bridge")
        ip("address", "add", f"{control}/24", "dev", self._tag)
        ip("link", "set", self._tag, "up")
        for name in self.names:
            space, plug = f"{self._tag}{name}", f"{self._tag}{name[4:]}"
            ip("netns", "add", space)
            ip("link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", plug, "master", self._tag, "up")
            for words in (
                ["link", "set", "lo", "up"],
                ["address", "add", f"{self.address(name)}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
            ):
                ip("-n", space, *words)
        return self

    def __exit__(self, *_: object) -> None:
        # The kernel removes a namespace's links some time after its last process: these go now.
        links = [["link", "delete", f"{self._tag}{name[4:]}"] for name in self.names]
        spaces = [["netns", "delete", f"{self._tag}{name}"] for name in self.names]
        for words in (*links, *spaces, ["link", "delete", self._tag]):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(*words)

    def on(self, name: str, command: Sequence[str | Path]) -> list[str]:
        """The command as it is run on a machine, or on ``control``, which is this one by another name."""
        inside = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        there = ["nsenter", f"--net=/run/netns/{self._tag}{name}"] if name in self.names else []
        here = ["unshare", "--mount", "--uts", "sh", "-c", inside, "sh", str(self._hosts), name]
        return [*there, *here, *map(str, command)]

    def start(self, name: str, command: Sequence[str | Path], **how: Any) -> subprocess.Popen[str]:
        """Start it in a session of its own, its stdout and stderr to be read from a pipe."""
        return subprocess.Popen(
            self.on(name, command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment(),
            **how,
        )

    def cut(self, name: str, up: bool = False) -> None:
        """Pull a machine's cable, or put it back."""
        ip("link", "set", f"{self._tag}{name[4:]}", "up" if up else "down")


def environment() -> dict[str, str]:
    """As a person's: commands of this checkout, and nothing that a launcher or another test said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "GLOO_"))}
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**kept, "PATH": ":".join(paths), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def ip(*words: str) -> None:
    """iproute2's ip(8)."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def machines(folder: Path, number: int = 2) -> Iterator[Machines]:
    """So many of them; the test is skipped where they cannot be made."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("ip or unshare is not installed: no network namespaces")
    made = Machines(folder, number)
    try:
        made.__enter__()
        subprocess.run(made.on("node1", ["true"]), check=True, capture_output=True)
    except (subprocess.CalledProcessError, OSError) as error:
        made.__exit__()
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)!r}")
    try:
        yield made
    finally:
        made.__exit__()
