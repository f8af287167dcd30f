"""Who may ask a server: its own page, and programs; no page of another site, and where there is a token, who has it."""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A page of another site may not hold this one in a frame, read anything of it, or have it run anything.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
COOKIE = "stgfast-{port}"  # cookies are for all ports of a machine


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Lets requests through to an application, or refuses them; with a token, those that do not bring it.

    A browser says where a request comes from: `Origin` and `Sec-Fetch-Site` are not in a page's hands. A name that
    leads to this machine may be another site's, so that without a token the host has to be this machine's own.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"a connection: got {scope['type']}, expected http")
        status, why = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if not why and self._in_link(scope):
                    cookie = f"{self._cookie(scope)}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                    headers.append("Set-Cookie", cookie)
            await send(message)

        answer = PlainTextResponse(f"{why}\n", status) if why else self.app
        await answer(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        """Why a request is refused, '' where it is not."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.token and not is_loopback(_name(host)):
            return 403, "this server answers to localhost alone"
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not _follows_link(scope, headers):
            return 403, "a page of another site may not ask this server"
        origin = headers.get("origin")
        if origin is not None and not _same(origin, host):
            return 403, "a page of another site may not ask this server"
        if self.token and not self._has_token(scope, headers):
            return 401, "open the link that stgfast serve has printed"
        return 200, ""

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        if self._in_link(scope):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        found = cookies.get(self._cookie(scope))
        return found is not None and self._is_token(found.value)

    def _in_link(self, scope: Scope) -> bool:
        if not self.token or scope["path"] != "/":
            return False
        return self._is_token(QueryParams(scope["query_string"]).get("token", ""))

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    @staticmethod
    def _cookie(scope: Scope) -> str:
        server = scope.get("server") or ("", 0)
        return COOKIE.format(port=server[1])


def _name(host: str) -> str:
    """A host without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and parts.netloc.lower() == host.lower()


def _follows_link(scope: Scope, headers: Headers) -> bool:
    """Whether somebody followed a link to the page, from wherever."""
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return bool(navigates and scope["method"] == "GET" and scope["path"] == "/")
