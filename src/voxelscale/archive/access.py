"""Where an archive is, and by which right it is used: nothing secret stands on a command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from voxelscale.archive.troubles import missing_extra
from voxelscale.config.values import read_yaml
from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError

if TYPE_CHECKING:
    import requests

USER, PASSWORD, TOKEN = (f"VOXELSCALE_DICOMWEB_{name}" for name in ("USER", "PASSWORD", "TOKEN"))
"""The environment's variables."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Access:
    """A DICOMweb service.

    Attributes:
        url: its root, such as ``https://pacs.example.org/dicom-web``.
        credentials: YAML file with ``user`` and ``password``, or with ``token``; None: the environment's
            `USER` and `PASSWORD`, or `TOKEN`, where they are set.
        ca_file: certificates to trust, PEM; None: those of the system.
        timeout: seconds to wait for a connection, and for each piece of an answer.
    """

    url: str
    credentials: Path | None = None
    ca_file: Path | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname)
            secret = parts.username is not None or parts.password is not None
            _ = parts.port
        except ValueError:
            known = secret = False
        if secret:  # not shown
            hint = "name a file with user and password as the credentials"
            raise VoxelscaleError("the archive's URL holds a user or a password", hint)
        if not known:
            raise VoxelscaleError(f"{self.url}: not a URL", "write it as https://HOST/dicom-web")
        if self.ca_file is not None and not self.ca_file.is_file():
            raise VoxelscaleError(f"{self.ca_file}: no such file", "name a PEM file with certificates")
        secrets = self.secrets()
        if secrets and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            warn(f"{parts.hostname}: the credentials are sent without encryption; use https")

    def secrets(self) -> Mapping[str, str]:
        """``user`` and ``password``, or ``token``; nothing where nobody asks for them.

        Read again each time, because tokens expire.

        Raises:
            VoxelscaleError: the file is missing or holds something else.
        """
        if self.credentials is not None:
            return _from_file(self.credentials)
        if token := os.environ.get(TOKEN):
            return {"token": token}
        user, password = os.environ.get(USER), os.environ.get(PASSWORD)
        if (user is None) != (password is None):
            raise VoxelscaleError(f"only one of {USER} and {PASSWORD} is set", "set both, or neither")
        return {} if user is None or password is None else {"user": user, "password": password}

    def session(self) -> requests.Session:
        """A session of HTTP that presents the credentials and checks the certificate."""
        try:
            import requests
            from requests.auth import AuthBase, _basic_auth_str
        except ImportError:
            raise missing_extra("dicomweb-client") from None

        access = self

        class Presented(AuthBase):
            """The credentials as they are now."""

            def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
                secrets = access.secrets()
                if "token" in secrets:
                    request.headers["Authorization"] = f"Bearer {secrets['token']}"
                elif secrets:
                    request.headers["Authorization"] = _basic_auth_str(
                        secrets["user"].encode(), secrets["password"].encode()
                    )
                return request

        session: Any = requests.Session()
        session.auth = Presented()
        session.max_redirects = 0  # one could lead out of the hospital, and would turn a POST into a GET
        # Given with each request: of the session's own, an environment variable would take the place.
        session.request = partial(
            session.request, verify=True if self.ca_file is None else str(self.ca_file)
        )
        found: requests.Session = session
        return found


def _from_file(path: Path) -> Mapping[str, str]:
    hint = "write the lines 'user: ...' and 'password: ...', or 'token: ...'"
    if not path.is_file():
        raise VoxelscaleError(f"{path}: no such file", hint)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise VoxelscaleError(f"{path}: others can read it", f"chmod 600 {path}")
    tree = read_yaml(path)
    if set(tree) not in ({"user", "password"}, {"token"}):
        raise VoxelscaleError(f"{path}: not user and password, nor a token", hint)
    return {str(key): str(value) for key, value in tree.items()}
