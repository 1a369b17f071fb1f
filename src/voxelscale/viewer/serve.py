"""Start the viewer's server and, where there is a desktop, the browser."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
import webbrowser
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import quote

from voxelscale.console import notice, warn
from voxelscale.errors import HOSPITAL_EXTRA, VoxelscaleError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from voxelscale.viewer.guard import Door

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def needs_server() -> None:
    """Raise a VoxelscaleError where Starlette or uvicorn is missing."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise VoxelscaleError(f"{missing[0]} is not installed", HOSPITAL_EXTRA)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any free one.

    Raises:
        VoxelscaleError: it cannot listen there, or no browser can ask for that address.
    """
    if host in ("", "0.0.0.0", "::"):  # noqa: S104
        raise VoxelscaleError(f"--host {host}: no address of one machine", "name the one that others use")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(64)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VoxelscaleError(
            f"{host}:{port}: cannot listen there ({reason})", "choose another --port"
        ) from None
    return listener


def door_of(host: str, listener: socket.socket) -> Door:
    """The names by which this server may be asked for."""
    from voxelscale.viewer.guard import Door

    port = listener.getsockname()[1]
    names = LOOPBACK if is_loopback(host) else (f"[{host}]" if ":" in host else host, *LOOPBACK)
    return Door(hosts=frozenset(f"{name.lower()}:{port}" for name in names))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    app: ASGIApp,
    door: Door,
    listener: socket.socket,
    host: str,
    fragment: str = "",
    open_browser: bool = True,
) -> None:
    """Serve until Ctrl-C.

    Args:
        fragment: of the address that is opened, which names a case and a finding.
        open_browser: whether the browser is opened, where there is a desktop.
    """
    import uvicorn

    if not is_loopback(host):
        warn(
            f"--host {host}: other machines can reach this server, and all is sent unencrypted; "
            "whoever has the address below sees the scans"
        )
    port = listener.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/?token={quote(door.token)}{fragment}"
    print(f"open {address}", flush=True)
    notice("Ctrl-C ends it")
    if open_browser and _has_desktop():
        webbrowser.open(address)
    # No access log: it would hold the token.
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=3
    )
    with contextlib.suppress(KeyboardInterrupt):  # it is how one ends it
        uvicorn.Server(config).run(sockets=[listener])


def _has_desktop() -> bool:
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
