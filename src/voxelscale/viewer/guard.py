"""Who may ask the viewer's server: this page in this browser, and nobody else.

Three things are checked of every request. The Host header must be the server's own, so that no foreign name
that resolves to this machine (DNS rebinding) is served. A request that another page made (Origin,
Sec-Fetch-Site) is refused, so that no page can act in the reader's name. And the random token must be
there: once in the URL that the command prints, from then on in a cookie that scripts cannot read and that
browsers send from this page only.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LONGEST_BODY = 2**26
"""Bytes of a request; a brush stroke has some thousands."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy: nothing is loaded from elsewhere, and no script runs that is not a file of ours.
NiiVue keeps its font and its material textures as ``data:`` URLs."""

HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, kw_only=True)
class Door:
    """Under which names the server may be asked for, and with which secret.

    Attributes:
        hosts: ``name:port`` in lower case, as browsers write it into Host and Origin.
        token: the secret of this start of the server.
    """

    hosts: frozenset[str]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def cookie(self) -> str:
        """The cookie's name: servers at other ports of this machine share its cookies."""
        ports = {host.rpartition(":")[2] for host in self.hosts}
        return f"voxelscale-{min(ports)}"

    def refusal(self, method: str, path: str, query: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason why a request is refused; None: it is not."""
        if headers.get("host", "").lower() not in self.hosts:
            return 421, "this server is not called so"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.hosts}:
            return 403, "another page must not ask this server"
        entering = path == "/" and method == "GET"
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") and not (entering and origin is None):
            return 403, "another page must not ask this server"
        if method != "GET" and origin is None:
            return 403, "only this server's page may change anything"
        length = headers.get("content-length", "")
        if method == "POST" and not (length.isdecimal() and int(length) <= LONGEST_BODY):
            return 413, "too long"
        if entering and self._is_token(parse_qs(query).get("token", [""])[0]):
            return None
        if not self._is_token(cookie_parser(headers.get("cookie", "")).get(self.cookie, "")):
            return 401, "open the address that voxelscale view printed: its token is missing or wrong"
        return None

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


class Guard:
    """Lets through what `Door` does not refuse, and adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if entering:
                    value = f"{self._door.cookie}={self._door.token}; Path=/; HttpOnly; SameSite=Strict"
                    headers.append("set-cookie", value)
            await send(message)

        query, headers = scope["query_string"].decode("latin-1"), Headers(scope=scope)
        refusal = self._door.refusal(scope["method"], scope["path"], query, headers)
        # No redirection: after a click on another page the browser would not send the cookie with it.
        entering = refusal is None and scope["path"] == "/" and "token" in parse_qs(query)
        refused = PlainTextResponse(f"{refusal[1]}\n", refusal[0]) if refusal else None
        await (refused or self._app)(scope, receive, with_headers)
