"""Checks that only the server's own web pages, under known host names, use the server.

A browser sends requests on behalf of any page that it shows. There are three checks:

- Host must be a name of the server. Otherwise, a page of another site whose name resolves to this machine could read
  the answers (DNS rebinding).
- Origin must be the server's or an allowed host. It identifies pages of other sites that send requests without reading
  the answers.
- Bodies must have the content type application/json, which a browser sends for another site's page only if the server
  allows it (CORS). This server never does.
"""

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from spt_jax.errors import ConfigError
from spt_jax.serving.limits import error_body

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-fA-F:.]+\])(:\d+)?", re.ASCII)


def allowed_hosts(host: str, names: Collection[str]) -> tuple[str, ...] | None:
    """Returns the host names that requests to a server may use; None for any.

    Args:
      host: the server's address.
      names: the names given by the user; without any, the names are known only for a loopback address.

    Raises:
      ConfigError: a name has a scheme, a port or a path.
    """
    for name in names:
        if not name or _name(name) != name.lower():
            raise ConfigError(
                f"--allowed-hosts {name}: give an ASCII host name, an IPv4 address, or an"
                " IPv6 address in brackets, without a scheme, port or path"
            )
    own = f"[{host}]" if ":" in host else host
    address = ipaddress.ip_address(host)
    if address.is_loopback or (address.is_unspecified and names):
        return (*LOOPBACK, own, *names)
    return (own, *names) if names else None


class BrowserChecks:
    """ASGI middleware that answers 403 to other host names and sites, and 415 to a body not declared as JSON."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str] | None):
        """Wraps an application.

        Args:
          app: the application.
          hosts: names and addresses, without ports, that Host and Origin may have; None for any.
        """
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An orchestrator's probes use addresses, or no host name at all.
        checked = scope["type"] == "http" and scope["path"] not in ("/healthz", "/readyz")
        if checked and (refusal := self._refusal(scope["method"], Headers(scope=scope))):
            status, message = refusal
            await JSONResponse(error_body(message, "invalid_request_error"), status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None:
            if _name(host) not in self._hosts:
                return 403, f"{host[:100]!r} is not a host name of this server; add names with --allowed-hosts"
            if origin is not None and not self._is_own(origin, host):
                return 403, f"pages of {origin[:100]!r} may not use this server; add names with --allowed-hosts"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return 415, "send the body as JSON, with the header Content-Type: application/json"
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page belongs to this server or an allowed host. Loopback names must have this server's port."""
        site = origin.lower().partition("://")[2]
        return site == host.lower() or _name(site) in (self._hosts or set()) - set(LOOPBACK)


def _name(host: str) -> str:
    """Returns a host without its port, in lower case; '' if it is not a host."""
    found = _HOST.fullmatch(host)
    return found["name"].lower().rstrip(".") if found else ""
